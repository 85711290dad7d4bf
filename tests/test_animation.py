"""Animations of the tokens kept of a video, and drawing videos with the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKEN_PRUNING, load_script, make_video_config, make_vim_config
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForVideoClassification
from videos import numbered_frames, write_video

from hf_vssm_prune.animation import animate, animated_frames
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.panels import DROPPED
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.visualization import frames_from_pixel_values, visualize


GREY = (128, 128, 128)


def make_model(**changes):
    torch.manual_seed(0)
    config = make_video_config(**{"token_pruning": dict(TOKEN_PRUNING), **changes})
    model = AutoModelForVideoClassification.from_config(config).eval()
    return model, new_image_processor(config, [0.5] * 3, [0.5] * 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = make_model(token_pruning=None)
    return save_for_hub(model, tmp_path_factory.mktemp("model") / "video", processor)


def covered(picture: Image.Image) -> int:
    """Number of pixels that are more blue than grey."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    return int((pixels[..., 2] - pixels[..., 0] > DROPPED[2] // 3).sum())


def test_each_frame_shows_what_is_dropped_of_it() -> None:
    """With grey frames, the covered area of each picture equals the area of the patches dropped from its frame."""
    model, processor = make_model()
    frames = [Image.new("RGB", (40, 32), GREY)] * 3
    pictures = animated_frames(model, processor, frames)
    assert len(pictures) == 3
    assert len({picture.size for picture in pictures}) == 1
    with torch.no_grad():
        kept = model(**processor(frames, return_tensors="pt")).kept_tokens
    patch = 160 // 4
    for time, picture in enumerate(pictures):
        of_frame = [ids[(ids >= 1 + 16 * time) & (ids < 17 + 16 * time)] for ids in kept]
        dropped = sum(16 - len(ids) for ids in of_frame)
        assert covered(picture) == pytest.approx(dropped * patch**2, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves(method, tmp_path) -> None:
    model, processor = make_model(token_pruning={"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": method})
    frames = [Image.fromarray(frame) for frame in numbered_frames(3)]
    for suffix in ("gif", "webp"):
        animate(model, processor, frames, tmp_path / f"kept.{suffix}")
        with Image.open(tmp_path / f"kept.{suffix}") as picture:
            assert 1 < picture.n_frames <= 3
            assert picture.info["loop"] == 0
        assert (tmp_path / f"kept.{suffix}").stat().st_size < 100_000


def test_tubelets_are_one_picture_each() -> None:
    model, processor = make_model(num_frames=5, tubelet_size=2)
    assert len(animated_frames(model, processor, [Image.new("RGB", (32, 32), GREY)] * 5)) == 2


def test_a_tubelet_is_shown_by_its_first_frame() -> None:
    """Frames left over at the end are not shown."""
    clip = (torch.arange(11.0) / 255).view(11, 1, 1, 1).expand(11, 3, 32, 32)
    config = make_video_config(num_frames=11, tubelet_size=4)
    shown = frames_from_pixel_values(clip, [0.0] * 3, [1.0] * 3, config)
    assert [frame.getpixel((0, 0))[0] for frame in shown] == [0, 4]


def test_what_cannot_be_animated(tmp_path) -> None:
    model, processor = make_model()
    frames = [Image.new("RGB", (32, 32))] * 3
    with pytest.raises(ValueError, match=r"kept\.png does not end in \.gif or \.webp"):
        animate(model, processor, frames, tmp_path / "kept.png")
    with pytest.raises(ValueError, match=r"`frames` is empty"):
        animate(model, processor, [], tmp_path / "kept.gif")
    with pytest.raises(ValueError, match=r"The model is dense"):
        animate(*make_model(token_pruning=None), frames, tmp_path / "kept.gif")
    config = make_vim_config(token_pruning=dict(TOKEN_PRUNING))
    images, processor = (
        AutoModelForImageClassification.from_config(config),
        new_image_processor(config, [0] * 3, [1] * 3),
    )
    with pytest.raises(ValueError, match=r"This is an image model"):
        animate(images, processor, frames, tmp_path / "kept.gif")


def test_videos_of_other_lengths_are_not_drawn_together() -> None:
    frames = [Image.new("RGB", (32, 32), GREY)] * 4
    with pytest.raises(ValueError, match=r"the videos have \[3, 4\] frames; only videos of one length"):
        visualize(*make_model(), [frames, frames[:3]])


def test_a_sheet_of_many_frames_is_larger_than_a_single_image() -> None:
    model, processor = make_model(num_frames=16, token_pruning={**TOKEN_PRUNING, "keep_ratios": [0.5, 0.5]})
    sheet = visualize(model, processor, [Image.new("RGB", (32, 32), GREY)] * 16)
    assert sheet.width > 3 * 400


def test_the_script_draws_videos(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.mp4", numbered_frames(20))
    write_video(tmp_path / "tall.webm", [f.transpose(1, 0, 2) for f in numbered_frames(2)], codec="libvpx-vp9")
    main = load_script("visualize").main
    model = ["--model_name_or_path", str(checkpoint)]
    assert main(["video.mp4", "tall.webm", *model, "--importance"]) == 0
    assert main(["video.mp4", *model, "--flops_reduction", "0.3", "--output", "kept.webp"]) == 0
    assert main(["video.mp4", *model, "--frame_sampling", "segments", "--output", "kept.gif"]) == 0
    assert Image.open("kept_tokens.png").height > 2 * Image.open("kept.webp").height
    assert Image.open("kept.gif").n_frames == 3
    capsys.readouterr()
    assert main(["video.mp4", "tall.webm", *model, "--output", "kept.gif"]) == 1
    assert "an animation shows one video" in capsys.readouterr().err
    (tmp_path / "bad.mp4").write_bytes(b"x" * 100)
    assert main(["bad.mp4", *model]) == 1
    assert (
        capsys.readouterr().err
        == "error: The video 'bad.mp4' cannot be read: Invalid data found when processing input\n"
    )

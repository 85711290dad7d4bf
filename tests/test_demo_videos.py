"""The demo's page of videos, without a browser."""

import sys
from pathlib import Path

import gradio as gr
import pytest
from conftest import make_video_config
from transformers import AutoModelForVideoClassification
from videos import numbered_frames, write_video

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import app
import clips


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> app.PrunedModel:
    config = make_video_config(num_hidden_layers=8, hidden_size=32)
    video_model = AutoModelForVideoClassification.from_config(config)
    processor = new_image_processor(config, [0.5] * 3, [0.5] * 3)
    return app.PrunedModel(str(save_for_hub(video_model, tmp_path_factory.mktemp("model") / "m", processor)))


def test_a_clip_is_classified_and_drawn(model, tmp_path: Path) -> None:
    write_video(tmp_path / "video.mp4", numbered_frames(20))
    page = app.Page(model, False, clips.opener(model))
    (chosen, first), (_, second) = page.upload(str(tmp_path / "video.mp4"), 30, next(iter(model.methods)))
    assert chosen.shape == (1, 3, 3, 32, 32)
    assert "48 patches" in first
    assert "measuring…" in first
    assert "times as fast" in second
    blocks = app.build(app.Page(app.PrunedModel(str(EXAMPLE_MODEL)), True), page)
    assert [name for _, name, *_ in blocks.pages] == ["Home", "Videos"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: write_video(file, numbered_frames(601, 16, 22)), "has 601 frames; at most 600 are accepted"),
        (lambda file: file.write_bytes(bytes(10 * 1024**2 + 1)), "is larger than 10 MB"),
        (lambda file: file.write_text("no video"), r"clip\.mp4 cannot be read"),
    ],
    ids=["long", "large", "text"],
)
def test_a_bad_upload_is_refused_by_name(model, write, message, tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4")
    page = app.Page(model, False, clips.opener(model))
    with pytest.raises(gr.Error, match=message):
        list(page.upload(str(tmp_path / "clip.mp4"), 30, next(iter(model.methods))))


def test_a_model_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="is an image model: name a video model"):
        clips.opener(app.PrunedModel(str(EXAMPLE_MODEL)))

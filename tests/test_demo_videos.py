"""The demo's page for videos, without a browser."""

import sys
from pathlib import Path

import gradio as gr
import pytest
from videos import numbered_frames, save_video_model, write_video

from hf_vssm_prune import EXAMPLE_MODEL


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import app
import clips


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> app.PrunedModel:
    folder = tmp_path_factory.mktemp("model") / "m"
    return app.PrunedModel(str(save_video_model(folder, num_hidden_layers=8, hidden_size=32)))


def test_a_clip_is_classified_and_drawn(model, tmp_path: Path) -> None:
    write_video(tmp_path / "video.mp4", numbered_frames(20))
    page = app.Page(model, clips.opener(model))
    how = (30, next(iter(model.methods)))
    session = app.Session()
    first = page.upload(session, 1, *how, str(tmp_path / "video.mp4"))
    second = page.add_times(session, *how)
    assert session.chosen.shape == (1, 3, 3, 32, 32)
    assert "48 patches" in first
    assert "measuring…" in first
    assert "ms per clip" in first
    assert "times as fast" in second
    images = app.Page(app.PrunedModel(str(EXAMPLE_MODEL)))
    assert [name for _, name, *_ in app.build(images, page).pages] == ["Home", "Videos"]
    alone = app.build(images)
    assert [name for _, name, *_ in alone.pages] == ["Home"]
    texts = [block.value for block in alone.blocks.values() if isinstance(block, gr.Markdown)]
    assert texts[-1] == app.NO_VIDEOS, "the page says how to get the other"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: write_video(file, numbered_frames(601, 16, 22)), "has 601 frames; at most 600 are accepted"),
        (lambda file: file.write_bytes(bytes(10 * 1024**2 + 1)), "is larger than 10 MB"),
        (
            lambda file: write_video(file, numbered_frames(1, 3000, 3002)),
            "frames of 3002 x 3000 pixels: at most 9,000,000",
        ),
        (lambda file: file.write_text("no video"), r"clip\.mp4 cannot be read"),
    ],
    ids=["long", "large", "large frames", "text"],
)
def test_a_bad_upload_is_refused_by_name(model, write, message, tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4")
    page = app.Page(model, clips.opener(model))
    with pytest.raises(gr.Error, match=message):
        page.upload(app.Session(), 1, 30, next(iter(model.methods)), str(tmp_path / "clip.mp4"))


def test_a_model_of_videos_is_refused_for_images(model, monkeypatch, capsys) -> None:
    monkeypatch.setattr(app, "PrunedModel", lambda _: model)
    monkeypatch.setattr(app, "build", lambda *_: pytest.fail("the page was made"))
    assert app.main([]) == 1
    assert "is a video model: name an image model" in capsys.readouterr().err


def test_a_model_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="is an image model: name a video model"):
        clips.opener(app.PrunedModel(str(EXAMPLE_MODEL)))

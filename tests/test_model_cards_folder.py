"""Cards in `model_cards/`: up to date, valid, and with code that will run once the model is uploaded."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MAKE_CONFIG, load_script, make_video_config
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForVideoClassification
from videos import numbered_frames, write_video

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_classifier, new_image_processor


FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
CARDS = sorted(FOLDER.glob("*.md"))
OWN_MODEL = "plainmamba-trashnet"
OWN_CARDS = [FOLDER / f"{OWN_MODEL}.md", FOLDER / f"{OWN_MODEL}-pruned.md"]


def test_there_is_a_page_for_each_model_and_its_pruned_form() -> None:
    names = {f"plainmamba-l{size}" for size in "123"} | {f"vim-{size}" for size in "tsb"}
    names |= {f"videomamba-{size}{of}" for size in ("ti", "s", "m") for of in ("", "-image")}
    names.add(OWN_MODEL)
    assert {card.stem for card in CARDS} == names | {f"{name}-pruned" for name in names}


def test_pages_are_what_the_script_writes(tmp_path: Path) -> None:
    load_script("write_model_cards").main(["--output_dir", str(tmp_path)])
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        card.name: card.read_text() for card in CARDS
    }


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_metadata_is_valid(card: Path) -> None:
    metadata = ModelCard.load(card, ignore_metadata_errors=False).data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == f"{'video' if is_of_videos(card) else 'image'}-classification"
    assert ("token-pruning" in metadata["tags"]) == card.stem.endswith("-pruned")
    assert metadata["datasets"]
    assert "## Limits and biases" in card.read_text()
    # What was not measured may not stand there as measured.
    assert ("model-index" in yaml.safe_load(card.read_text().split("---")[1])) == (card in OWN_CARDS)
    assert ("has not evaluated the model" in card.read_text()) == (card not in OWN_CARDS)
    assert ("What papers report" in card.read_text()) <= ("none of them was measured" in card.read_text())


def is_of_videos(card: Path) -> bool:
    return card.stem.startswith("videomamba") and "-image" not in card.stem


def test_the_page_of_the_shipped_model_lies_beside_it() -> None:
    assert (EXAMPLE_MODEL / "README.md").read_text() == OWN_CARDS[0].read_text()


@pytest.mark.parametrize(("file", "which"), list(zip(OWN_CARDS, ("dense", "pruned"), strict=True)))
def test_figures_are_those_of_the_evaluation(file: Path, which: str) -> None:
    results = json.loads(file.with_suffix(".json").read_text())
    card = ModelCard.load(file)
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    metrics = results[which]["metrics"]
    assert figures == pytest.approx({"accuracy": metrics["top1"], "top_5_accuracy": metrics["top5"]}, abs=1e-5)
    assert f"{results[which]['num_images']:,} images" in card.text
    if which == "dense":
        return
    picture = re.search(r"!\[.*\]\((.+)\)", card.text)[1]
    assert (FOLDER / picture).stat().st_size < 100_000


def stand_in(card: Path) -> torch.nn.Module:
    """A small model of the same family instead of the real weights; for our own cards, the packaged model."""
    if card in OWN_CARDS:
        model = load_classifier(EXAMPLE_MODEL)
        model.set_token_pruning({"flops_reduction": 0.416} if card.stem.endswith("-pruned") else None)
        return model
    schedule = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]} if card.stem.endswith("-pruned") else None
    if is_of_videos(card):
        return AutoModelForVideoClassification.from_config(make_video_config(token_pruning=schedule))
    return AutoModelForImageClassification.from_config(MAKE_CONFIG[card.stem.split("-")[0]](token_pruning=schedule))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_code_runs(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_in(card)
    processor = new_image_processor(model.config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    monkeypatch.chdir(tmp_path)
    save_for_hub(model, card.stem, processor)
    Image.new("RGB", (40, 30), "teal").save("image.png")
    write_video(tmp_path / "video.mp4", numbered_frames(30))
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    if "outputs" in names:
        assert names["outputs"].logits.shape == (1, model.config.num_labels)

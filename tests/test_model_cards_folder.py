"""The pages in `model_cards/`: up to date, valid, and with code that runs once the model is there."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import MAKE_CONFIG, load_script
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor


FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
CARDS = sorted(FOLDER.glob("*.md"))


def test_there_is_a_page_for_each_model_and_its_pruned_form() -> None:
    names = {f"plainmamba-l{size}" for size in "123"} | {f"vim-{size}" for size in "tsb"}
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
    assert metadata["pipeline_tag"] == "image-classification"
    assert ("token-pruning" in metadata["tags"]) == card.stem.endswith("-pruned")
    # Nothing was measured, so that nothing may stand there as measured.
    assert "model-index" not in yaml.safe_load(card.read_text().split("---")[1])
    assert "has not evaluated it" in card.read_text()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_code_runs(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model of the family in the place of the weights."""
    schedule = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]} if card.stem.endswith("-pruned") else None
    config = MAKE_CONFIG[card.stem.split("-")[0]](token_pruning=schedule)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    monkeypatch.chdir(tmp_path)
    save_for_hub(AutoModelForImageClassification.from_config(config), card.stem, processor)
    Image.new("RGB", (40, 30), "teal").save("image.png")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["outputs"].logits.shape == (1, 3)

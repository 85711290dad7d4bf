"""Writes `model_cards/`: a page for each published model, as it is once converted, and for its pruned form; and for the
small models that this project trained.

    python scripts/write_model_cards.py

The project has no ImageNet weights of its own to publish; whoever converts or fine-tunes one finds its page here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub import ModelCardInfo, TrainingRecipe, create_model_card
from hf_vssm_prune.hub.loading import load_classifier, load_image_processor, new_image_processor
from hf_vssm_prune.hub.model_card_file import read_model_card_info


SOURCES = Path(__file__).resolve().parents[1] / "model_cards"
OWN_MODEL = "plainmamba-fashion-mnist"
LIMITS = [
    "This project has not evaluated it: ImageNet was not at hand. The papers' figures are not its own.",
    "It tells the 1,000 classes of ImageNet-1k apart; any other image gets one of these labels all the same.",
    "Whom and what ImageNet's photos show, and under which names, is skewed (arXiv 1912.07726), and a model that "
    "learned from them has taken that over.",
]
LIMIT_OF_PRUNING = (
    "What a dropped token showed is lost to the later layers. Whether small objects or rare classes suffer more from "
    "that than others was not measured."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="model_cards", help="default: %(default)s")
    folder = Path(parser.parse_args(arguments).output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES.values():
        for preset in family.config.published:
            for pruned in (False, True):
                file = folder / f"{model_name(family.config, preset, pruned)}.md"
                file.write_text(card_text(family.config, preset, pruned), encoding="utf-8")
                print(file)
    for name, text in (("", own_card_text()), ("-pruned", own_pruned_card_text())):
        file = folder / f"{OWN_MODEL}{name}.md"
        file.write_text(text, encoding="utf-8")
        print(file)
    return 0


def own_card_text() -> str:
    """The page that lies beside the weights in the package."""
    return (EXAMPLE_MODEL / "README.md").read_text(encoding="utf-8")


def own_pruned_card_text() -> str:
    """Of what `scripts/demo.py` makes from it; its YAML file has the figures of one run, of `top`."""
    model = load_classifier(EXAMPLE_MODEL)
    model.set_token_pruning({"flops_reduction": 0.416, "method": "top"})
    info = read_model_card_info(SOURCES / f"{OWN_MODEL}-pruned.yaml")
    return str(create_model_card(model, info, load_image_processor(EXAMPLE_MODEL)))


def model_name(family: type[VisionMambaConfig], preset: str, pruned: bool) -> str:
    return f"{family.model_type}-{preset.lower()}" + ("-pruned" if pruned else "")


def card_text(family: type[VisionMambaConfig], preset: str, pruned: bool) -> str:
    published = family.published[preset]
    config = family.from_preset(preset, token_pruning=published.token_pruning if pruned else None)
    with torch.device("meta"):  # a card needs sizes, not weights
        model = FAMILIES[config.model_type].classifier(config)
    info = ModelCardInfo(
        name=model_name(family, preset, pruned),
        summary=f"{family.paper.name}-{preset} for ImageNet-1k" + (", with token pruning." if pruned else ", dense."),
        license_notice="The original weights' licence applies: see where they were published.",
        original_weights=family.paper.repository,
        base_model=published.weights if pruned else None,
        datasets=["ILSVRC/imagenet-1k"],
        training=finetuning(config, model_name(family, preset, pruned=False)) if pruned else None,
        limits=[*LIMITS, LIMIT_OF_PRUNING] if pruned else LIMITS,
    )
    processor = new_image_processor(config, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], crop_pct=0.875)
    return str(create_model_card(model, info, processor))


def finetuning(config: VisionMambaConfig, base: str) -> TrainingRecipe:
    pruning = config.token_pruning or {}
    layers, ratios = (" ".join(f"{value:g}" for value in pruning[name]) for name in ("layers", "keep_ratios"))
    return TrainingRecipe(
        command=(
            f"accelerate launch -m hf_vssm_prune finetune --model_name_or_path {base} --dataset_name <ImageNet-1k> \\\n"
            f"    --prune_method {pruning['method']} --prune_layers {layers} --keep_ratios {ratios} \\\n"
            f"    --output_dir {base}-pruned"
        ),
        description="The command that makes it, with the paper's length, optimizer and rates. Nobody has run it yet.",
    )


if __name__ == "__main__":
    sys.exit(main())

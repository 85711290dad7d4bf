"""Writes `model_cards/`: a page for each published model, as it is once converted, and for its pruned form; and for the
small models that this project trained.

    python scripts/write_model_cards.py

The project has no ImageNet weights of its own to publish; whoever converts or fine-tunes one finds its page here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub import ModelCardInfo, TrainingRecipe, create_model_card
from hf_vssm_prune.hub.loading import load_classifier, load_image_processor, new_image_processor
from hf_vssm_prune.hub.model_card_file import read_model_card_info
from hf_vssm_prune.publication import PublishedModel


SOURCES = Path(__file__).resolve().parents[1] / "model_cards"
OWN_MODEL = "plainmamba-trashnet"
LIMITS = {
    "ImageNet-1k": [
        "This project has not evaluated it: ImageNet was not at hand. The papers' figures are not its own.",
        "It tells the 1,000 classes of ImageNet-1k apart; any other image gets one of these labels all the same.",
        "Whom and what ImageNet's photos show, and under which names, is skewed (arXiv 1912.07726), and a model that "
        "learned from them has taken that over.",
    ],
    "Kinetics-400": [
        "This project has not evaluated it: Kinetics was not at hand. The papers' figures are not its own.",
        "It tells the 400 actions of Kinetics-400 apart; any other video gets one of these labels all the same.",
        "Kinetics was collected from YouTube by search words: whom it shows doing what is skewed, and a model that "
        "learned from it has taken that over.",
    ],
}
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
        for models in (family.config.published, family.config.published_images):
            for preset, published in models.items():
                for pruned in (False, True):
                    name, text = published_card(family.config, preset, published, pruned)
                    file = folder / f"{name}.md"
                    file.write_text(text, encoding="utf-8")
                    print(file)
    for name, pruning in ((OWN_MODEL, None), (f"{OWN_MODEL}-pruned", {"flops_reduction": 0.416})):
        file = folder / f"{name}.md"
        file.write_text(own_card_text(name, pruning), encoding="utf-8")
        print(file)
    return 0


def own_card_text(name: str, token_pruning: dict[str, Any] | None) -> str:
    """Of the model in the package, whose page lies beside its weights, and of what the demo makes from it."""
    model = load_classifier(EXAMPLE_MODEL)
    model.set_token_pruning(token_pruning)
    info = read_model_card_info(SOURCES / f"{name}.yaml")
    return str(create_model_card(model, info, load_image_processor(EXAMPLE_MODEL)))


def published_card(
    family: type[VisionMambaConfig], preset: str, published: PublishedModel, pruned: bool
) -> tuple[str, str]:
    """The name of a published model, once it is converted, and its page."""
    options = {**published.options, "token_pruning": published.token_pruning if pruned else None}
    config, dataset = family.from_preset(preset, **options), published.dataset.split(",")[0]
    base = f"{family.model_type}-{preset.lower()}" + ("-image" if published.options else "")
    with torch.device("meta"):  # a card needs sizes, not weights
        model = FAMILIES[config.model_type].classifier(config)
    info = ModelCardInfo(
        name=base + ("-pruned" if pruned else ""),
        summary=f"{family.paper.name}-{preset} for {dataset}, {'with token pruning' if pruned else 'dense'}.",
        license_notice="The original weights' licence applies: see where they were published.",
        original_weights=family.paper.repository,
        base_model=published.weights if pruned else None,
        datasets=[published.dataset_id],
        training=finetuning(config, base, dataset) if pruned else None,
        limits=[*LIMITS[dataset], LIMIT_OF_PRUNING] if pruned else LIMITS[dataset],
    )
    processor = new_image_processor(config, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return info.name, str(create_model_card(model, info, processor))


def finetuning(config: VisionMambaConfig, base: str, dataset: str) -> TrainingRecipe:
    pruning = config.token_pruning or {}
    task = "    --task video-classification \\\n" if config.modality == "video" else ""
    layers, ratios = (" ".join(f"{value:g}" for value in pruning[name]) for name in ("layers", "keep_ratios"))
    return TrainingRecipe(
        command=(
            f"accelerate launch -m hf_vssm_prune finetune --model_name_or_path {base} --dataset_name <{dataset}> \\\n"
            f"{task}"
            f"    --prune_method {pruning['method']} --prune_layers {layers} --keep_ratios {ratios} \\\n"
            f"    --output_dir {base}-pruned"
        ),
        description="The command that makes it, with the paper's length, optimizer and rates. Nobody has run it yet.",
    )


if __name__ == "__main__":
    sys.exit(main())

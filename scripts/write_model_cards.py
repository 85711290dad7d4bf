"""Writes `model_cards/`: a card for each published model after conversion, for its pruned version, and for the small
models that this project trained.

    python scripts/write_model_cards.py

The project has no ImageNet weights to publish; the cards are for people who convert or fine-tune a model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vssm_prune import EXAMPLE_MODEL  # first: it chooses how idle threads wait, which torch reads when loaded


# isort: split
import torch

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
        "This project has not evaluated the model, because ImageNet was not available. The papers' figures are not "
        "from this project.",
        "The model distinguishes the 1,000 classes of ImageNet-1k, and assigns one of these labels to any other "
        "image, too.",
        "ImageNet is biased in whom and what its photos show, and in its labels (arXiv 1912.07726); a model trained on "
        "it inherits these biases.",
    ],
    "Kinetics-400": [
        "This project has not evaluated the model, because Kinetics was not available. The papers' figures are not "
        "from this project.",
        "The model distinguishes the 400 actions of Kinetics-400, and assigns one of these labels to any other "
        "video, too.",
        "Kinetics was collected from YouTube by search terms, so it is biased in who is shown doing what; a model "
        "trained on it inherits these biases.",
    ],
}
LIMIT_OF_PRUNING = (
    "Later layers cannot see the content of dropped tokens. Whether small objects or rare classes suffer more from "
    "this than others was not measured."
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
    """The card of the package's model, which is also saved with its weights, or of the model that the demo creates from
    it."""
    model = load_classifier(EXAMPLE_MODEL)
    model.set_token_pruning(token_pruning)
    info = read_model_card_info(SOURCES / f"{name}.yaml")
    return str(create_model_card(model, info, load_image_processor(EXAMPLE_MODEL)))


def published_card(
    family: type[VisionMambaConfig], preset: str, published: PublishedModel, pruned: bool
) -> tuple[str, str]:
    """The name of a published model after conversion, and its card."""
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
        description=(
            "This command trains the model with the paper's number of epochs, optimizer and learning rate. It has not "
            "been run yet."
        ),
    )


if __name__ == "__main__":
    sys.exit(main())

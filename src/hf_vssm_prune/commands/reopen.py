"""Loads a saved classifier with transformers' Auto classes and pipeline, as its users will, and prints the logits and
labels of the given images as JSON.

    hf-vssm-prune reopen <folder or Hub model> image.png ...
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.configuration_common import has_head
from hf_vssm_prune.hub.loading import load_config, packaged_model


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("model", help="a classifier, in a folder or on the Hub")
    parser.add_argument("images", nargs="+", help="image files")
    return parser


@one_line_errors(Image.DecompressionBombError)
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    print(json.dumps(classify(options.model, options.images)))
    return 0


def classify(name: str, files: Sequence[str]) -> dict[str, list[Any]]:
    """The logits and labels of images.

    Raises:
        ValueError, OSError: the model is not an image classifier, or something cannot be read; the message names it.
    """
    config = load_config(name)
    if has_head(config) or config.modality != "image":
        raise ValueError(f"{name} is a {config.model_type!r} model; it must be an image classifier.")
    name = packaged_model(name)
    image_processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    # Upright, as the pipeline sees them.
    images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    inputs = image_processor(images, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    by_pipeline = pipeline("image-classification", model=name, top_k=1)(list(files))
    return {"logits": logits.tolist(), "labels": [guesses[0]["label"] for guesses in by_pipeline]}

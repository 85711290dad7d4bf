"""Loads a saved classifier with transformers' Auto classes and pipeline, as its users will, and prints the logits and
labels of the given images as JSON.

    hf-vssm-prune reopen <folder or Hub model> image.png ...
"""

import argparse
import json
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_vssm_prune  # noqa: F401  (registers the models)
from hf_vssm_prune.commands.parsing import command_parser


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("model", help="a classifier, in a folder or on the Hub")
    parser.add_argument("images", nargs="+", help="image files")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    name, files = options.model, options.images
    image_processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    inputs = image_processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    by_pipeline = pipeline("image-classification", model=name, top_k=1)(files)
    answers = {"logits": logits.tolist(), "labels": [guesses[0]["label"] for guesses in by_pipeline]}
    print(json.dumps(answers))
    return 0

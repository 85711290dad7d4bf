"""Opens a saved classifier as its users will, with transformers' Auto classes and its pipeline, and prints as JSON what
each of them says about some images.

    python scripts/reopen.py <folder or Hub model> image.png ...
"""

import json
import sys
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_vssm_prune  # noqa: F401  (registers the models)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    name, *files = arguments
    image_processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    inputs = image_processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    by_pipeline = pipeline("image-classification", model=name, top_k=1)(files)
    answers = {"logits": logits.tolist(), "labels": [guesses[0]["label"] for guesses in by_pipeline]}
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Opens a saved folder like a user who has not installed hf_vssm_prune, and prints the results as JSON.

test_remote_code.py runs it in a separate environment: `python -I open_without_package.py FOLDER IMAGE`.
"""

import importlib.util
import json
import sys
from unittest import mock

import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)


def main(folder: str, image_file: str) -> None:
    if importlib.util.find_spec("hf_vssm_prune") is not None:
        raise SystemExit("hf_vssm_prune can be imported here, so that this would prove nothing")
    image = Image.open(image_file)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    # AutoBackbone looks for a repository of this name on the Hub, and only then for a folder; there is no Hub here.
    with mock.patch("huggingface_hub.HfApi.repo_exists", return_value=True):
        backbone = AutoBackbone.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        base_output, output, features = base(pixel_values), classifier(pixel_values), backbone(pixel_values)

    classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")
    result = {
        "config": {"model_type": config.model_type, "token_pruning": config.token_pruning},
        "pixel_values": pixel_values.tolist(),
        "last_hidden_state": base_output.last_hidden_state.tolist(),
        "logits": output.logits.tolist(),
        "kept_tokens": [kept.tolist() for kept in output.kept_tokens],
        "feature_maps": [feature_map.tolist() for feature_map in features.feature_maps],
        "pipeline": classify(image, top_k=config.num_labels),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

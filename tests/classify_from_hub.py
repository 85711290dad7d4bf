"""Classifies a photo with models loaded from a Hub by name, and prints the results as JSON.

test_presets_from_hub.py runs it as `python classify_from_hub.py with|without PHOTO NAME...`: "with" the package, or
"without" it, using the code in the repositories, in an environment where it is not installed.
"""

import importlib.util
import json
import sys

from transformers import AutoModel, pipeline


def main(how: str, photo: str, *names: str) -> None:
    if how == "with":
        import hf_vssm_prune  # noqa: F401  (registers the models)

        options = {"dtype": "float32"}
    else:
        if importlib.util.find_spec("hf_vssm_prune") is not None:
            raise SystemExit("hf_vssm_prune can be imported here, so that this would prove nothing")
        options = {"dtype": "float32", "trust_remote_code": True}
    answers = {}
    for name in names:
        base = AutoModel.from_pretrained(name, **options)
        classify = pipeline("image-classification", model=name, device="cpu", **options)
        module = type(classify.model).__module__.split(".")[0]
        answers[name] = {
            "module": module,
            "token_pruning": base.config.token_pruning,
            "parameters": classify.model.num_parameters(),
            "guesses": classify(photo, top_k=3),
        }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])

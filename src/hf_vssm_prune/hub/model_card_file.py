"""Reads the information for a model card from a YAML file.

```yaml
name: plainmamba-clothes
license: apache-2.0
training: {command: hf-vssm-prune finetune ..., description: Two epochs.}
evaluation: {results: results.json, dataset_name: Clothes, dataset_id: someone/clothes, split: test}
limits: [It knows only ten kinds of clothes.]
```

The names are those of `ModelCardInfo`, `TrainingRecipe` and `Evaluation`; `results` is a file written by
`hf-vssm-prune evaluate --json`, from which the measurements are taken. Paths are relative to the YAML file.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from hf_vssm_prune.hub.model_card import Evaluation, ModelCardInfo, TrainingRecipe


def read_model_card_info(file: str | os.PathLike[str]) -> ModelCardInfo:
    """Reads a YAML file as a `ModelCardInfo`.

    Raises:
        ValueError: the file does not have this format; the message says what is wrong.
        OSError: the file, or a file that it names, cannot be read.
    """
    file = Path(file)
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError(f"it must map names to values, but is {fields!r}")
        return ModelCardInfo(**_with_objects(fields, file.parent))
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a model card: {error}") from error


def _with_objects(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "training" in fields:
        fields["training"] = TrainingRecipe(**fields["training"])
    if "evaluation" in fields:
        about = dict(fields["evaluation"])
        if "results" not in about:
            raise TypeError(f"evaluation has {sorted(about)}, but no results (a file of `evaluate --json`)")
        fields["evaluation"] = Evaluation.from_results(folder / about.pop("results"), **about)
    if "picture" in fields:
        fields["picture"] = folder / fields["picture"]
    return fields

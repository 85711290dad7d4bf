"""Outputs of models that can drop tokens on the way."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_common import STAGE_FIELDS


_STAGE_ENTRY = re.compile(rf"({'|'.join(STAGE_FIELDS)})_\d+")


class StageFields:
    """What a pruned model tells of each stage, for a `ModelOutput`.

    Each stage's tensor is an entry of its own, `kept_tokens_0`, `kept_tokens_1`, ...: whatever cuts a batch's output
    into samples, or gathers it from several devices, takes each entry for a tensor with one row for each sample
    (transformers' pipelines and Trainer, Accelerate, `DataParallel`). As attributes, and by their names as keys, they
    are tuples with one tensor for each stage; None without pruning.

    Attributes:
        kept_tokens: the tokens that are left after the stage, in raster order, int64 of shape (batch, n). A class token
            counts and is always there.
        token_scores: the scores by which the method compared the patch tokens that were there, in many methods their
            importance, shape (batch, candidates).
        merged_tokens: for each token of the full sequence the one that it was merged into, at this stage or before, its
            own where it is left or was dropped, int64 of shape (batch, all tokens). None: the method merges nothing.
        added_entries: what else a class adds to transformers' own, whose constructor does not know it. Outputs are made
            anew from their entries, by DDP for one.
    """

    added_entries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *values: Any, **entries: Any) -> None:
        stages = {name: entries.pop(name) for name in [*entries] if _STAGE_ENTRY.fullmatch(name)}
        for field in STAGE_FIELDS:
            stages |= {f"{field}_{stage}": tensor for stage, tensor in enumerate(entries.pop(field, None) or ())}
        added = {name: entries.pop(name) for name in self.added_entries if name in entries}
        super().__init__(*values, **entries)
        for name, entry in {**added, **stages}.items():
            if entry is not None:
                self[name] = entry  # type: ignore[index]

    def _of_stages(self, field: str) -> tuple[Tensor, ...] | None:
        return tuple(tensor for name, tensor in self.items() if name.startswith(f"{field}_")) or None  # type: ignore[attr-defined]

    def __getitem__(self, key: Any) -> Any:
        return self._of_stages(key) if key in STAGE_FIELDS else super().__getitem__(key)  # type: ignore[misc]

    @property
    def kept_tokens(self) -> tuple[Tensor, ...] | None:
        return self._of_stages("kept_tokens")

    @property
    def token_scores(self) -> tuple[Tensor, ...] | None:
        return self._of_stages("token_scores")

    @property
    def merged_tokens(self) -> tuple[Tensor, ...] | None:
        return self._of_stages("merged_tokens")


@dataclass(init=False)
class PrunedModelOutput(StageFields, BaseModelOutputWithPooling):
    """Output of a model that can drop tokens on the way; see `StageFields`.

    Attributes:
        mixer_states: with `output_mixer_states=True` what each layer's mixer adds to the residual stream, shapes
            (batch, tokens that are there, hidden).
    """

    mixer_states: tuple[Tensor, ...] | None = None
    added_entries: ClassVar[tuple[str, ...]] = ("mixer_states",)


@dataclass(init=False)
class PrunedImageClassifierOutput(StageFields, ImageClassifierOutput):
    """Output of an image classifier that can drop tokens on the way; see `StageFields`."""


@dataclass(init=False)
class PrunedBackboneOutput(StageFields, BackboneOutput):
    """Feature maps of a model that can drop tokens on the way; see `StageFields`."""


def stage_fields(output: StageFields) -> dict[str, tuple[Tensor, ...] | None]:
    """What an output tells of the stages, to hand it on to another."""
    return {field: getattr(output, field) for field in STAGE_FIELDS}

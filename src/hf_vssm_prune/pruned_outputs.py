"""Outputs of models that can drop tokens."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_common import STAGE_FIELDS


# Entries that are recorded on request. Those of transformers' outputs have no such names.
_RECORDED = ("block_gates", "mixer_states")
_STAGE_ENTRY = re.compile(rf"({'|'.join(STAGE_FIELDS)})_\d+")


class StageFields:
    """The results of each pruning stage, for a `ModelOutput`.

    Each stage's tensor is a separate entry, `kept_tokens_0`, `kept_tokens_1`, ..., because code that splits the output
    of a batch into samples, or gathers it from several devices (transformers' pipelines and Trainer, Accelerate,
    `DataParallel`), expects every entry to be a tensor with one row per sample. The attributes `kept_tokens` etc., and
    the keys of the same names, are tuples with one tensor per stage; None without pruning.

    Attributes:
        kept_tokens: the tokens that are left after the stage, in raster order, int64 of shape (batch, n). The class
            token is counted and always kept.
        token_scores: the scores by which the method compared the current patch tokens (in many methods, their
            importance), shape (batch, candidates).
        merged_tokens: for each token of the full sequence, the token that it was merged into, at this stage or before,
            or itself if it was kept or dropped, int64 of shape (batch, all tokens). None: the method does not merge.
        block_gates: with `output_block_gates=True`, for each layer that selects blocks whether each scan direction ran,
            1 or 0, shape (batch, directions); see `pruning_block_selection`.
        mixer_states: with `output_mixer_states=True`, what each layer's mixer adds to the residual stream, shapes
            (batch, current tokens, hidden).
        added_entries: other entries that a class adds to those of transformers, whose constructor does not know them.
            Outputs can be recreated from their entries, for instance by DDP.
    """

    added_entries: ClassVar[tuple[str, ...]] = ()
    block_gates = None
    mixer_states = None

    def __init__(self, *values: Any, **entries: Any) -> None:
        stages = {name: entries.pop(name) for name in [*entries] if _STAGE_ENTRY.fullmatch(name)}
        for field in STAGE_FIELDS:
            stages |= {f"{field}_{stage}": tensor for stage, tensor in enumerate(entries.pop(field, None) or ())}
        added = {name: entries.pop(name) for name in (*_RECORDED, *self.added_entries) if name in entries}
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
    """Output of a model that can drop tokens; see `StageFields`."""


@dataclass(init=False)
class PrunedImageClassifierOutput(StageFields, ImageClassifierOutput):
    """Output of an image classifier that can drop tokens; see `StageFields`."""


@dataclass(init=False)
class PrunedBackboneOutput(StageFields, BackboneOutput):
    """Feature maps of a model that can drop tokens; see `StageFields`."""


def stage_fields(output: StageFields) -> dict[str, tuple[Tensor, ...] | None]:
    """The entries of an output for the stages, and those that were recorded, to pass them on to another output."""
    return {field: getattr(output, field) for field in (*STAGE_FIELDS, *_RECORDED)}

"""Runs a model's layers and drops tokens between them: this connects families, pruning methods and schedules."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .mixer_output import MixerOutput
from .pruned_outputs import PrunedModelOutput
from .pruning_importances import IMPORTANCES
from .pruning_options import TokenPruning
from .pruning_stage import Reduction, Stage, TokenView
from .token_pruning import count_kept, fill_dropped_tokens, gather_tokens


class TokenLayout(Protocol):
    """What a family's layers need to know about the remaining tokens."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the full grid, in patches."""

    @property
    def cls_row(self) -> Tensor | None:
        """Row of the class token in each sample, shape (batch, 1). None: there is no class token."""

    @property
    def view(self) -> TokenView:
        """How the layers see the tokens: its `scale` covers the class token too, its stand-ins are rows of patches."""

    def keep(self: "Layout", kept: Tensor, alignment: str, view: TokenView) -> "Layout":
        """The layout with only the tokens `kept` of the full sequence, int64 (batch, n)."""


Layout = TypeVar("Layout", bound=TokenLayout)


@dataclass(frozen=True)
class Encoding(Generic[Layout]):
    """The result of the layers.

    Attributes:
        hidden_states: hidden states of the remaining tokens, shape (batch, tokens left, hidden).
        layout: layout of these tokens.
        kept_tokens, token_scores, merged_tokens: as in `pruned_outputs.StageFields`.
        sizes: how many patches were merged into each remaining patch token, shape (batch, patches left). None: one
            each, or the method does not count them.
    """

    hidden_states: Tensor
    layout: Layout
    kept_tokens: tuple[Tensor, ...] = ()
    token_scores: tuple[Tensor, ...] = ()
    merged_tokens: tuple[Tensor, ...] = ()
    sizes: Tensor | None = None

    @property
    def stages(self) -> dict[str, tuple[Tensor, ...]]:
        """The results of each stage, in the form of a model's output."""
        return {
            "kept_tokens": self.kept_tokens,
            "token_scores": self.token_scores,
            "merged_tokens": self.merged_tokens,
        }

    def with_states(self, hidden_states: Tensor) -> "Encoding[Layout]":
        """The same with other hidden states. If these are on another device, because the model is spread over several,
        everything else follows them."""
        parts = (self.layout, self.kept_tokens, self.token_scores, self.merged_tokens, self.sizes)
        if hidden_states.device != self.hidden_states.device:
            parts = _on_device(parts, hidden_states.device)
        return Encoding(hidden_states, *parts)


def _on_device(values: Any, device: torch.device) -> Any:
    """Tensors in nested tuples, moved to a device; other values are unchanged."""
    if isinstance(values, Tensor):
        return values.to(device)
    if not isinstance(values, tuple):
        return values
    moved = [_on_device(value, device) for value in values]
    return type(values)(*moved) if hasattr(values, "_fields") else tuple(moved)


def encode(
    layers: Iterable[nn.Module],
    stage_modules: nn.ModuleDict,
    hidden_states: Tensor,
    layout: Layout,
    token_pruning: TokenPruning | None,
) -> Encoding[Layout]:
    """Runs the layers; the pruning method reduces the tokens at the input of those in the schedule.

    Args:
        layers: each maps (hidden states, layout, whether its mixer's results are needed, the scale in the layout's
            `view`) to the next hidden states and, if they are needed, the results of its mixer for the tokens. The
            scale, which may need a gradient, is also an argument because reentrant checkpointing only knows tensors
            that are arguments.
        stage_modules: by layer, the parameters of the pruning method, if it has any.
        hidden_states: all tokens, shape (batch, tokens, hidden).
        layout: layout of all tokens.
        token_pruning: the schedule. None: no token is dropped.
    """
    stages = {} if token_pruning is None else token_pruning.stages
    reads_mixer = token_pruning is not None and token_pruning.method.reads_mixer
    modules = dict(stage_modules.items())
    encoding = Encoding(hidden_states, layout)
    for index, layer in enumerate(layers, start=1):
        states, layout = encoding.hidden_states, encoding.layout
        hidden_states, mixer = layer(states, layout, reads_mixer and index in stages, layout.view.scale)
        encoding = encoding.with_states(hidden_states)
        if token_pruning is not None and index in stages:
            encoding = _reduce(encoding, mixer, stages[index], token_pruning, modules.get(str(index)))
    return encoding


def _reduce(
    encoding: Encoding[Layout],
    mixer: MixerOutput,
    keep_ratio: float,
    token_pruning: TokenPruning,
    module: nn.Module | None,
) -> Encoding[Layout]:
    """One stage: the method reduces the tokens, and the layout is updated."""
    stage, tokens = _make_stage(encoding, mixer, keep_ratio)
    importance = IMPORTANCES.get(token_pruning.get("importance", ""))
    reduction = token_pruning.method.reduce(stage._replace(importance=importance, module=module))
    rows, hidden_states, view = _with_cls_token(stage, reduction)
    kept = tokens.gather(1, rows)
    merged_tokens = encoding.merged_tokens
    if reduction.merged_into is not None:
        merged_tokens += (_merge_tokens(encoding, stage, tokens, reduction.merged_into),)
    return Encoding(
        hidden_states,
        encoding.layout.keep(kept, token_pruning["alignment"], view),
        (*encoding.kept_tokens, kept),
        (*encoding.token_scores, reduction.scores),
        merged_tokens,
        reduction.sizes,
    )


def _make_stage(encoding: Encoding, mixer: MixerOutput, keep_ratio: float) -> tuple[Stage, Tensor]:
    """The patch tokens as a `Stage`, and the index of every remaining token in the full sequence, (batch, n)."""
    hidden_states, layout = encoding.hidden_states, encoding.layout
    batch, num_tokens, _ = hidden_states.shape
    rows = torch.arange(num_tokens, device=hidden_states.device).expand(batch, -1)
    tokens = encoding.kept_tokens[-1] if encoding.kept_tokens else rows
    if layout.cls_row is None:
        stage = Stage(hidden_states, count_kept(num_tokens, keep_ratio), tokens, layout.grid, mixer)
        return stage._replace(sizes=encoding.sizes, view=layout.view), tokens
    patch_rows = rows[:, :-1] + (rows[:, :-1] >= layout.cls_row)
    patches, cls_token = tokens.gather(1, patch_rows), tokens.gather(1, layout.cls_row)
    scale = None if layout.view.scale is None else layout.view.scale.gather(1, patch_rows)
    stage = Stage(
        gather_tokens(hidden_states, patch_rows),
        count_kept(num_tokens - 1, keep_ratio),
        patches - (patches > cls_token).long(),
        layout.grid,
        mixer,
        patch_rows,
        layout.cls_row,
        gather_tokens(hidden_states, layout.cls_row).squeeze(1),
        encoding.sizes,
        layout.view._replace(scale=scale),
    )
    return stage, tokens


def _with_cls_token(stage: Stage, reduction: Reduction) -> tuple[Tensor, Tensor, TokenView]:
    """Puts the class token, if there is one, back among the remaining patch tokens.

    Returns:
        The rows of all remaining tokens, ascending, (batch, n), their hidden states, and how layers see them.
    """
    if stage.patch_rows is None or stage.cls_row is None or stage.cls_token is None:
        return reduction.rows, reduction.hidden_states, reduction.view
    rows = torch.cat([stage.patch_rows.gather(1, reduction.rows), stage.cls_row], dim=1)
    rows, order = rows.sort(dim=-1)
    hidden_states = gather_tokens(torch.cat([reduction.hidden_states, stage.cls_token.unsqueeze(1)], dim=1), order)
    view, scale = reduction.view, reduction.view.scale
    if scale is not None:
        view = view._replace(scale=torch.cat([scale, torch.ones_like(scale[:, :1])], dim=1).gather(1, order))
    return rows, hidden_states, view


def _merge_tokens(encoding: Encoding, stage: Stage, tokens: Tensor, merged_into: Tensor) -> Tensor:
    """For each token of the full sequence, the token that it has been merged into so far, (batch, all tokens)."""
    patches = stage.of_patches(tokens)
    num_tokens = math.prod(stage.grid) + int(stage.cls_row is not None)
    everything = torch.arange(num_tokens, device=tokens.device).expand(tokens.shape[0], -1)
    merges = everything.scatter(1, patches, patches.gather(1, merged_into))
    return merges.gather(1, encoding.merged_tokens[-1]) if encoding.merged_tokens else merges


def scale_tokens(tokens: Tensor, scale: Tensor | None) -> Tensor:
    """Tokens (batch, n, hidden) as the mixers see them, see `TokenView`."""
    return tokens if scale is None else tokens * scale.unsqueeze(-1).to(tokens.dtype)


def full_states(backbone: Any, outputs: PrunedModelOutput, token_pruning: TokenPruning | None) -> list[Tensor]:
    """The hidden states that a backbone's `out_features` name, for all tokens: each (batch, all tokens, hidden).

    Args:
        backbone: its `config.feature_fill` says what the cell of a dropped token contains.
        outputs: outputs of its model, with hidden states and, if feature maps are made from them, mixer states.
        token_pruning: the schedule that was used.
    """
    hidden_states, kept_tokens = outputs.hidden_states or (), outputs.kept_tokens or ()
    if backbone.config.feature_source == "mixer":
        hidden_states = (*hidden_states[:1], *(outputs.mixer_states or ()))
    merged_tokens = outputs.merged_tokens if backbone.config.feature_fill == "merged" else None
    filled = []
    for index in map(backbone.stage_names.index, backbone.out_features):
        layers = [layer for layer in (token_pruning.stages if token_pruning else ()) if layer < index]
        states = tuple(hidden_states[layer] for layer in (*layers, index))
        merged = merged_tokens[len(layers) - 1] if merged_tokens and layers else None
        parts = _on_device((states, kept_tokens[: len(layers)], merged), states[-1].device)
        filled.append(fill_dropped_tokens(*parts))
    return filled

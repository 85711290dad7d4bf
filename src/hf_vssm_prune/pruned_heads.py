"""Makes transformers' dense prediction models with a backbone of this package prunable."""

import functools
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .pruned_outputs import StageFields, stage_fields


def backbone_of(model: nn.Module) -> Any:
    """The model of this package (a `TokenPruningMixin`) in a model: the model itself, or its backbone.

    Raises:
        ValueError: there is none.
    """
    # No `isinstance`: the class may come from another copy of the code.
    found = next((module for module in model.modules() if hasattr(type(module), "_pruning_of_call")), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no backbone of hf_vssm_prune, so there is nothing to prune.")
    return found


class _Call(NamedTuple):
    """A call of a model with a head: the options for its backbone, and what the backbone returns."""

    backbone: Any
    options: dict[str, Any]
    outputs: list[Any]


# Its `call` is the current `_Call`: threads that run the same model, and replicas of `DataParallel`, share its hooks.
# These hooks stay, because `torch.compile` cannot trace code that adds hooks.
_thread = threading.local()
_thread.call = None  # so that the second call of a compiled model finds what the first one found


def _listen(backbone: nn.Module) -> None:
    """Adds these hooks, unless the backbone has them: before the first call, which may be compiled, and in each call,
    because the backbone may have been exchanged."""
    if _add_options not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(_add_options, with_kwargs=True)
    if _see not in backbone._forward_hooks.values():
        backbone.register_forward_hook(_see)


def _add_options(backbone: nn.Module, inputs: Any, given: dict[str, Any]) -> Any:
    call = getattr(_thread, "call", None)
    return None if call is None or call.backbone is not backbone else (inputs, {**given, **call.options})


def _see(backbone: nn.Module, inputs: Any, output: Any) -> None:
    call = getattr(_thread, "call", None)
    if call is not None and call.backbone is backbone:
        call.outputs.append(output)


class PrunedHead:
    """Lets a model with a backbone be used like the models of this package; this class comes before the model's own
    class.

    In addition to the model's own outputs, there are `kept_tokens`, `token_scores` and `merged_tokens`, and
    `backbone_hidden_states` if hidden states are requested. `forward` also accepts `token_pruning`, the schedule for
    this call, and `output_block_gates`.
    """

    # Activation checkpointing recomputes the backbone's layers. Some of transformers' heads do not support it.
    supports_gradient_checkpointing = True

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives `forward` the signature of the model's own, from which transformers' `Trainer` knows the inputs and
        labels of a model."""
        super().__init_subclass__(**options)
        if "forward" not in vars(cls):
            own: Any = super()

            @functools.wraps(own.forward)
            def forward(self: Any, *arguments: Any, **options: Any) -> Any:
                return PrunedHead.forward(self, *arguments, **options)

            cls.forward = forward  # type: ignore[method-assign]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _listen(backbone_of(self))  # type: ignore[arg-type]

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        """The model's own `forward`, with the additional options `token_pruning` and `output_block_gates`."""
        own = ("token_pruning", "output_block_gates")
        given = {name: options.pop(name) for name in own if name in options}
        if options.get("output_hidden_states"):
            given["output_hidden_states"] = True
        call, outer = _Call(backbone_of(self), given, []), getattr(_thread, "call", None)
        _listen(call.backbone)
        _thread.call = call
        try:
            outputs = super().forward(*arguments, **options)  # type: ignore[misc]
        finally:
            _thread.call = outer
        if not isinstance(outputs, ModelOutput):
            return outputs
        of_backbone = call.outputs[-1]
        outputs = _with_stages(type(outputs))(**outputs, **stage_fields(of_backbone))
        if of_backbone.hidden_states is not None:
            outputs["backbone_hidden_states"] = of_backbone.hidden_states
        return outputs

    def get_input_embeddings(self: Any) -> nn.Module:
        """The backbone's input embeddings, which sharding needs."""
        return backbone_of(self).get_input_embeddings()

    def set_token_pruning(self: Any, token_pruning: dict[str, Any] | None) -> None:
        """See `TokenPruningMixin.set_token_pruning`."""
        backbone_of(self).set_token_pruning(token_pruning)

    def add_pruning_parameters(self: Any, token_pruning: dict[str, Any] | None) -> None:
        """See `TokenPruningMixin.add_pruning_parameters`."""
        backbone_of(self).add_pruning_parameters(token_pruning)

    def freeze_pruning_parameters(self: Any, schedules: Sequence[Any]) -> None:
        """See `TokenPruningMixin.freeze_pruning_parameters`."""
        backbone_of(self).freeze_pruning_parameters(schedules)

    @property
    def has_pruning_parameters(self: Any) -> bool:
        """See `TokenPruningMixin.has_pruning_parameters`."""
        return backbone_of(self).has_pruning_parameters


@torch.compiler.assume_constant_result
def _with_stages(kind: type) -> type[Any]:
    return _make_output_class(kind)


@functools.cache
def _make_output_class(kind: type) -> type[Any]:
    """Outputs with the results of the pruning stages and the backbone's hidden states."""
    added = {
        "backbone_hidden_states": None,
        "added_entries": ("backbone_hidden_states",),
        "__reduce__": lambda output: (_output_of, (kind, dict(output))),  # pickle does not find a class made here
    }
    return dataclass(init=False)(type(f"Pruned{kind.__name__}", (StageFields, kind), added))


def _output_of(kind: type, entries: dict[str, Any]) -> Any:
    return _with_stages(kind)(**entries)


@functools.cache
def pruned_class(kind: type) -> type[Any]:
    """A model's class combined with `PrunedHead`; the name is unchanged, because configurations contain it."""
    return kind if issubclass(kind, PrunedHead) else type(kind.__name__, (PrunedHead, kind), {})


def prunable(model: Any) -> Any:
    """Lets a transformers model with a backbone of this package be used like the models of this package: it gets
    `set_token_pruning`, and its outputs contain the kept tokens, see `PrunedHead`. Models of this package are returned
    unchanged.

    Returns:
        The model itself.

    Raises:
        ValueError: its backbone is not of this package.
    """
    backbone = backbone_of(model)
    if backbone is not model:
        _listen(backbone)
        kind: Any = type(model)
        model.__class__ = pruned_class(kind)
        if "_old_forward" in vars(model):  # Accelerate's hooks (`device_map`) call this, which is the former class's
            model._old_forward = types.MethodType(type(model).forward, model)
    return model

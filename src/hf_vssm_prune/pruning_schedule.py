"""Checks pruning options, and makes them complete."""

import itertools
from collections.abc import Sequence
from typing import Any

from .documentation import see
from .pruning_methods import DEFAULT_METHOD, METHODS, PruningMethod
from .token_pruning import ALIGNMENTS, IMPORTANCES


# How a model prunes, whatever its budget.
METHOD_OPTIONS = ("alignment", "importance", "method")


def check_token_pruning(token_pruning: dict[str, Any], num_hidden_layers: int) -> dict[str, Any]:
    """Checks pruning options and returns them complete, as `config.json` holds them.

    Args:
        token_pruning: `layers`, before which tokens are dropped, ascending, each in 1 ... num_hidden_layers - 1;
            `keep_ratios`, for each of them the share of the tokens still there that stays, in (0, 1]; `alignment`
            (default: the method's), one of `ALIGNMENTS`; `importance` (default: the method's), one of `IMPORTANCES`,
            for a method that takes one; `method`, one of `METHODS`. Options without a `method` mean `top`.
        num_hidden_layers: depth of the model.

    Raises:
        ValueError: an option is unknown or missing, or its value is not allowed; the message says what was given and
            what is allowed.
    """
    allowed = ("layers", "keep_ratios", *METHOD_OPTIONS)
    if unknown := sorted(set(token_pruning) - set(allowed)):
        raise ValueError(f"`token_pruning` has unknown options {unknown}; allowed are {list(allowed)}.")
    if missing := [name for name in allowed[:2] if token_pruning.get(name) is None]:
        raise ValueError(f"`token_pruning` needs {missing}, or `flops_reduction` in place of `keep_ratios`.")
    method = pruning_method(token_pruning)
    options = {
        "layers": check_layers(token_pruning["layers"], num_hidden_layers),
        "keep_ratios": _as_list("keep_ratios", token_pruning["keep_ratios"]),
        "alignment": token_pruning.get("alignment", method.alignment),
    }
    _check_keep_ratios(options["keep_ratios"], len(options["layers"]))
    _check_choice("alignment", options["alignment"], ALIGNMENTS)
    if method.importance is not None:
        options["importance"] = token_pruning.get("importance", method.importance)
        _check_choice("importance", options["importance"], IMPORTANCES)
    elif "importance" in token_pruning:
        takers = [name for name, other in METHODS.items() if other.importance is not None]
        raise ValueError(
            f"`token_pruning['importance']` is {token_pruning['importance']!r}, but the method "
            f"{token_pruning['method']!r} ranks tokens in its own way; methods that take an importance are {takers}."
        )
    return {**options, "method": token_pruning.get("method", DEFAULT_METHOD)}


def pruning_method(token_pruning: dict[str, Any]) -> PruningMethod:
    """The method that pruning options name.

    Raises:
        ValueError: there is none of that name.
    """
    name = token_pruning.get("method", DEFAULT_METHOD)
    _check_choice("method", name, tuple(METHODS))
    return METHODS[name]


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`token_pruning[{name!r}]` is {value!r}; allowed are {list(choices)}.")


def _as_list(name: str, values: object) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"`token_pruning[{name!r}]` is {values!r}; a list is needed, with one entry for each stage.")
    return list(values)


def check_layers(layers: object, num_hidden_layers: int) -> list[int]:
    """Layers before which a model of so many can drop tokens, as a list.

    Raises:
        ValueError: these are none; the message says what was given and what is allowed.
    """
    layers = _as_list("layers", layers)
    given = f"`token_pruning['layers']` is {layers}"
    if not layers:
        raise ValueError(f"{given}; give at least one layer, or `token_pruning=None` for a dense model.")
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"{given}; layers are whole numbers.")
    if not all(1 <= layer < num_hidden_layers for layer in layers):
        raise ValueError(
            f"{given}; tokens are scored by the layer before, so that 1 to {num_hidden_layers - 1} are allowed "
            f"in a model of {num_hidden_layers} layers. {see('schedule-not-allowed')}"
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
        raise ValueError(f"{given}; layers must ascend, each given once.")
    return layers


def _check_keep_ratios(keep_ratios: list[Any], num_stages: int) -> None:
    given = f"`token_pruning['keep_ratios']` is {keep_ratios}"
    if len(keep_ratios) != num_stages:
        raise ValueError(f"{given}, {len(keep_ratios)} ratios for {num_stages} layers; one for each layer is needed.")
    for ratio in keep_ratios:
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise ValueError(f"{given}; {ratio!r} is not in (0, 1].")

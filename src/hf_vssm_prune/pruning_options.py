"""Pruning options: checked once, completed and then immutable, in configurations as well as in layers."""

import copy
import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .documentation import see
from .pruning_importances import IMPORTANCES
from .pruning_methods import METHODS, PAPERS_METHOD, RECOMMENDED_METHOD, PruningMethod
from .token_pruning import ALIGNMENTS


METHOD_OPTIONS = ("alignment", "importance", "method", "block_keep_ratio")
OPTIONS = ("layers", "keep_ratios", *METHOD_OPTIONS)


class TokenPruning(dict[str, Any]):
    """Complete pruning options, as in `config.token_pruning` and `config.json`. They cannot be changed in place: if one
    of the lists in them was, the next forward pass raises an error.

    Created by `check_token_pruning`, or by a configuration's `complete_token_pruning`, which also accepts a budget.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._checked_lists = (tuple(self["layers"]), tuple(self["keep_ratios"]))

    @property
    def stages(self) -> dict[int, float]:
        """The keep ratio of each layer before which tokens are dropped.

        Raises:
            TypeError: the lists have changed since they were checked.
        """
        if (tuple(self["layers"]), tuple(self["keep_ratios"])) != self._checked_lists:
            self._refuse()
        return dict(zip(*self._checked_lists, strict=True))

    @property
    def method(self) -> PruningMethod:
        return METHODS[self["method"]]

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TypeError(
            "pruning options can't be changed in place: set `config.token_pruning` to a new dict, or call "
            "`model.set_token_pruning`."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """A plain dict, which can be changed."""
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


def method_options(token_pruning: Mapping[str, Any] | None) -> dict[str, Any]:
    """The pruning options that say how a model prunes, regardless of its budget. Where pruning has trained parameters,
    the layers are among them: before other layers, these parameters would be new and untrained."""
    given = token_pruning or {}
    layers = given.get("layers")
    has_parameters = layers and any(layers_with_parameters(given, layers[-1] + 1).values())
    names = ("layers", *METHOD_OPTIONS) if has_parameters else METHOD_OPTIONS
    return {name: value for name, value in given.items() if name in names}


def inherit_method(token_pruning: Any, own: Mapping[str, Any] | None) -> Any:
    """Completes options without a method with those of the previous schedule; other options are returned unchanged."""
    if not isinstance(token_pruning, dict) or "method" in token_pruning:
        return token_pruning
    return method_options(own) | token_pruning


def check_token_pruning(token_pruning: Mapping[str, Any], num_hidden_layers: int) -> TokenPruning:
    """Checks pruning options and returns them complete.

    Args:
        token_pruning: `layers`, before which tokens are dropped, ascending, each in 1 ... num_hidden_layers - 1;
            `keep_ratios`, for each of them the fraction of the tokens still there that is kept, in (0, 1]; `alignment`
            (default: the method's), one of `ALIGNMENTS`; `importance` (default: the method's), one of `IMPORTANCES`,
            for a method that uses one; `method`, one of `METHODS` (default: `RECOMMENDED_METHOD`, or the paper's `top`
            if an importance is given); `block_keep_ratio`, in (0, 1], the fraction of the scan directions that run, see
            `pruning_block_selection` (default: all run, and nothing is selected). NumPy and torch numbers and arrays
            are accepted, too.
        num_hidden_layers: depth of the model.

    Raises:
        ValueError: an option is unknown or missing, or its value is not allowed; the message says what was given and
            what is allowed.
    """
    if unknown := sorted(set(token_pruning) - set(OPTIONS)):
        raise ValueError(f"`token_pruning` has unknown options {unknown}; allowed options are {list(OPTIONS)}.")
    if missing := [name for name in OPTIONS[:2] if token_pruning.get(name) is None]:
        raise ValueError(f"`token_pruning` needs {missing}, or `flops_reduction` instead of `keep_ratios`.")
    method = pruning_method(token_pruning)
    layers = check_layers(token_pruning["layers"], num_hidden_layers)
    options = {
        "layers": layers,
        "keep_ratios": _check_keep_ratios(token_pruning["keep_ratios"], len(layers)),
        "alignment": token_pruning.get("alignment", method.alignment),
    }
    _check_choice("alignment", options["alignment"], ALIGNMENTS)
    if method.importance is not None:
        options["importance"] = token_pruning.get("importance", method.importance)
        _check_choice("importance", options["importance"], tuple(IMPORTANCES))
    elif "importance" in token_pruning:
        takers = [name for name, other in METHODS.items() if other.importance is not None]
        raise ValueError(
            f"`token_pruning['importance']` is {token_pruning['importance']!r}, but the method "
            f"{_method_name(token_pruning)!r} does not use an importance; methods that do are "
            f"{takers}."
        )
    options["method"] = _method_name(token_pruning)
    if (block_keep_ratio := check_block_keep_ratio(token_pruning)) is not None:
        options["block_keep_ratio"] = block_keep_ratio
    return TokenPruning(options)


def check_block_keep_ratio(token_pruning: Mapping[str, Any]) -> float | None:
    """The fraction of the scan directions that run. None: nothing is selected.

    Raises:
        ValueError: it is not in (0, 1].
    """
    ratio = plain_value(token_pruning.get("block_keep_ratio"))
    if ratio is not None and not (is_number(ratio) and 0 < ratio <= 1):
        raise ValueError(f"`token_pruning['block_keep_ratio']` is {ratio!r}; it must be greater than 0 and at most 1.")
    return ratio


def layers_with_parameters(token_pruning: Mapping[str, Any], num_hidden_layers: int) -> dict[str, Sequence[int]]:
    """The layers that need parameters for pruning, by the kind of parameters: `token_predictors`, the method's modules,
    one for each stage, if it has any; `hole_time_step`, the offsets of the `learned` alignment; `block_selector`, the
    selectors for `block_keep_ratio`."""
    layers, method = token_pruning["layers"], pruning_method(token_pruning)
    learns, selects = token_pruning.get("alignment") == "learned", token_pruning.get("block_keep_ratio") is not None
    return {
        "token_predictors": layers if method.module is not None else (),
        "hole_time_step": range(layers[0], num_hidden_layers) if learns else (),
        "block_selector": unread_layers(method, layers, num_hidden_layers) if selects else (),
    }


def unread_layers(method: PruningMethod, layers: Sequence[int], num_hidden_layers: int) -> list[int]:
    """Layers whose mixer's results the method does not read if it drops tokens before the given layers. Only these can
    select blocks, the others always run completely."""
    read = {layer - 1 for layer in layers} if method.reads_mixer else set()
    return [layer for layer in range(num_hidden_layers) if layer not in read]


def pruning_method(token_pruning: Mapping[str, Any]) -> PruningMethod:
    """The method that pruning options name or imply.

    Raises:
        ValueError: there is no method of that name.
    """
    name = _method_name(token_pruning)
    _check_choice("method", name, tuple(METHODS))
    return METHODS[name]


def _method_name(token_pruning: Mapping[str, Any]) -> str:
    # The recommended method ranks tokens in its own way: an importance without a method means the paper's method.
    return token_pruning.get("method", PAPERS_METHOD if "importance" in token_pruning else RECOMMENDED_METHOD)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`token_pruning[{name!r}]` is {value!r}; allowed values are {list(choices)}.")


def plain_value(value: Any) -> Any:
    """Converts a NumPy or torch number or array to plain Python; anything else is returned unchanged."""
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _as_list(name: str, values: object) -> list[Any]:
    values = plain_value(values)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"`token_pruning[{name!r}]` is {values!r}; it must be a list with one entry for each stage.")
    return list(values)


def is_number(value: object, kind: type = numbers.Real) -> bool:
    """Whether a value is a number; True and False do not count as numbers here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_layers(layers: object, num_hidden_layers: int) -> list[int]:
    """Checks layers before which a model of this depth can drop tokens, and returns them as a list.

    Raises:
        ValueError: they are not allowed; the message says what was given and what is allowed.
    """
    layers = _as_list("layers", layers)
    given = f"`token_pruning['layers']` is {layers}"
    if not layers:
        raise ValueError(f"{given}; give at least one layer, or `token_pruning=None` for a dense model.")
    if not all(is_number(layer, numbers.Integral) for layer in layers):
        raise ValueError(f"{given}; layers must be whole numbers.")
    if not all(1 <= layer < num_hidden_layers for layer in layers):
        raise ValueError(
            f"{given}; tokens are scored by the previous layer, so the allowed layers are 1 to "
            f"{num_hidden_layers - 1} in a model with {num_hidden_layers} layers. {see('schedule-not-allowed')}"
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
        raise ValueError(f"{given}; layers must be in ascending order, without duplicates.")
    return layers


def _check_keep_ratios(keep_ratios: object, num_stages: int) -> list[float]:
    keep_ratios = _as_list("keep_ratios", keep_ratios)
    given = f"`token_pruning['keep_ratios']` is {keep_ratios}"
    if len(keep_ratios) != num_stages:
        raise ValueError(f"{given}, {len(keep_ratios)} ratios for {num_stages} layers; give one ratio for each layer.")
    for ratio in keep_ratios:
        if not is_number(ratio) or not 0 < ratio <= 1:
            raise ValueError(f"{given}; {ratio!r} is not in (0, 1].")
    return keep_ratios

"""Reads `id2label` and `label2id` of a configuration in all the forms in which people write them."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any


def complete_label_maps(options: Mapping[str, Any]) -> dict[str, Any]:
    """Completes `id2label` and `label2id`. If the options have both, `id2label` is used.

    Either can be a list of names, or a dict between ids (numbers or strings of digits, in any order) and names.

    Returns:
        Both, as {id: name} and {name: id} in the order of the ids; empty if the options have neither.

    Raises:
        ValueError: the ids of a dict are not 0, 1, 2, ...
    """
    for option in ("id2label", "label2id"):
        if (maps := options.get(option)) is not None:
            names = names_by_id(maps, option)
            return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {}


def names_by_id(maps: Mapping[Any, Any] | Sequence[Any], option: str = "id2label") -> list[str]:
    """The names in the order of their ids; see `complete_label_maps`."""
    if isinstance(maps, Sequence) and not isinstance(maps, str):
        return [_as_name(name, option) for name in maps]
    if not isinstance(maps, Mapping):
        raise ValueError(f"`{option}` is {maps!r}; it must be a list of names or a dict from ids to names.")
    forwards, backwards = list(maps.items()), [(value, key) for key, value in maps.items()]
    for pairs in (backwards, forwards) if option == "label2id" else (forwards, backwards):
        ids = [_as_id(key) for key, _ in pairs]
        names = {i: _as_name(name, option) for i, (_, name) in zip(ids, pairs, strict=True) if i is not None}
        if None not in ids:
            if sorted(names) != list(range(len(pairs))):
                raise ValueError(
                    f"`{option}` has the ids {sorted(names)[:10]} for {len(pairs)} labels; each id from 0 to "
                    f"{len(pairs) - 1} must occur exactly once."
                )
            return [names[i] for i in range(len(names))]
    raise ValueError(f"`{option}` has ids neither as keys nor as values: {dict(forwards[:3])}.")


def _as_id(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _as_name(value: Any, option: str) -> str:
    if (isinstance(value, (Mapping, Sequence)) and not isinstance(value, str)) or value is None:
        raise ValueError(f"`{option}` has {value!r} as a name.")
    return str(value)

"""Matches the labels of a data set and a model by name."""

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.documentation import see
from hf_vssm_prune.families import ImageClassifier
from hf_vssm_prune.label_maps import complete_label_maps, names_by_id
from hf_vssm_prune.modeling_common import image_classifier


logger = logging.getLogger(__name__)

# "3", "LABEL_3", "class 03": a name that is just an id.
ID_AS_NAME = re.compile(r"(?:(?:label|class)[ _-]?)?(-?\d+)", re.IGNORECASE)
SHOWN_NAMES = 4


class Match(Enum):
    """How the names of two sets of labels match."""

    SAME = "the same names in the same order"
    REORDERED = "the same names in another order, or some of them"
    ADOPTED = "one side's names are only ids, and are taken to be the other's ids"
    DIFFERENT = "other names"


@dataclass(frozen=True)
class LabelMatch:
    """How a data set's (or a student's) labels match those of a model.

    Attributes:
        kind: how the names match.
        ids: for each of the data set's labels, its id in the model; empty if the names are different.
        names: for each of the data set's labels, the name to keep.
    """

    kind: Match
    ids: list[int]
    names: list[str]


def match_labels(model_names: Sequence[str], data_names: Sequence[str], some: bool = False) -> LabelMatch:
    """Finds a data set's labels among those of a model.

    Names match if they differ only in case, white space, underscores for spaces and Unicode normalisation. Names that
    are just ids (`LABEL_0`, `0`) are treated as ids of the other side's labels.

    Args:
        model_names: in the order of the model's ids.
        data_names: in the order of the data set's ids.
        some: whether the data set may lack some of the model's labels, like an evaluation split.
    """
    model_names, data_names = list(model_names), list(data_names)
    if model_names == data_names:
        return LabelMatch(Match.SAME, list(range(len(data_names))), data_names)
    if not some and len(model_names) != len(data_names):
        return LabelMatch(Match.DIFFERENT, [], data_names)
    ids = _ids_by_name(model_names, data_names)
    if ids is not None:
        same = ids == list(range(len(model_names)))
        return LabelMatch(Match.SAME if same else Match.REORDERED, ids, data_names)
    own_ids, data_ids = ids_as_names(model_names), ids_as_names(data_names)
    # Ids without a 0 might be counted from 1.
    if own_ids is None and data_ids is not None and min(data_ids) == 0 and max(data_ids) < len(model_names):
        return LabelMatch(Match.ADOPTED, data_ids, [model_names[i] for i in data_ids])
    if data_ids is None and own_ids == list(range(len(data_names))):
        return LabelMatch(Match.ADOPTED, own_ids, data_names)
    return LabelMatch(Match.DIFFERENT, [], data_names)


def _ids_by_name(model_names: list[str], data_names: list[str]) -> list[int] | None:
    """The ids of the data set's names in the model, compared exactly or otherwise leniently; None if a name is missing
    or matches two labels."""
    for key in (str, _lenient, _id_or_name):
        ids = {key(name): i for i, name in enumerate(model_names)}
        wanted = [key(name) for name in data_names]
        unique = len(ids) == len(model_names) and len(set(wanted)) == len(wanted)
        if unique and set(wanted) <= ids.keys():
            return [ids[name] for name in wanted]
    return None


def _lenient(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def _id_or_name(name: str) -> str:
    match = ID_AS_NAME.fullmatch(name)
    return name if match is None else str(int(match[1]))


def ids_as_names(names: Sequence[str]) -> list[int] | None:
    """The ids in the names, if all of them are ids and no two are the same; otherwise None."""
    found = [ID_AS_NAME.fullmatch(name) for name in names]
    ids = [int(match[1]) for match in found if match is not None]
    return ids if ids and len(set(ids)) == len(names) else None


def read_label_file(file: Path) -> list[str]:
    """Label names in the order of their ids, from JSON in any form that `label_maps` supports, or text with one name
    per line. Blank lines at the end are ignored.

    Raises:
        ValueError: it is a JSON file with other content, or has a blank line between names.
        OSError: it cannot be read.
    """
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix != ".json":
        names = [line.strip() for line in text.rstrip().splitlines()]
        if "" in names:
            raise ValueError(f"Line {names.index('') + 1} of {file} is blank: each line must name a label.")
        return names
    try:
        return names_by_id(json.loads(text))
    except ValueError as error:
        raise ValueError(
            f"{file} must be a JSON list of names, or a dict that maps ids (0, 1, ...) to names or names to ids: "
            f"{error}"
        ) from error


def say_labels(names: Sequence[str]) -> str:
    """Names for a message: their number, and the first few."""
    shown = ", ".join(repr(name) for name in names[:SHOWN_NAMES])
    return f"{len(names)} labels ({shown}{', …' if len(names) > SHOWN_NAMES else ''})"


def say_difference(model_names: Sequence[str], data_names: Sequence[str]) -> str:
    """For a message, the labels that one side has and the other lacks; empty if they differ in other ways."""
    parts = []
    for whose, own, others in (("the model", model_names, data_names), ("the data set", data_names, model_names)):
        if twice := [name for name, count in Counter(own).items() if count > 1]:
            parts.append(f"{whose} has {twice[0]!r} twice")
        elif missing := [name for name in own if name not in set(others)]:
            parts.append(f"only {whose} has {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    return "; ".join(parts)


def match_or_renew(
    name_or_path: str,
    own_names: Sequence[str],
    data_names: Sequence[str],
    ignore_mismatched_sizes: bool,
    some_labels: bool,
) -> LabelMatch | None:
    """How a data set's labels match those of a checkpoint; None: the checkpoint gets a new classifier.

    Args:
        name_or_path: the checkpoint.
        own_names, data_names: its labels and the data set's, in the order of their ids.
        ignore_mismatched_sizes: a checkpoint with other labels gets a new classifier. Names that are just ids do not
            prevent it.
        some_labels: the data set may have only some of the checkpoint's labels.

    Raises:
        ValueError: the labels are different, and `ignore_mismatched_sizes` is not set.
    """
    match = match_labels(own_names, data_names, some_labels)
    if ignore_mismatched_sizes:
        return None if match.kind in (Match.DIFFERENT, Match.ADOPTED) else match
    if match.kind is Match.DIFFERENT:
        raise ValueError(
            f"{name_or_path} has {say_labels(own_names)}, but the data set has {say_labels(data_names)}: "
            f"{say_difference(own_names, data_names)}. For a new classifier, add --ignore_mismatched_sizes, and first "
            f"train the dense model with `hf-vssm-prune train`. {see('other-labels-than-the-data-set')}"
        )
    return match


@torch.no_grad()
def take_labels(
    model: Any, match: LabelMatch, name_or_path: str, data_names: Sequence[str], parameters: Iterable[nn.Parameter]
) -> None:
    """Gives a model the data set's labels in their order; labels that the data set lacks come last. Logs what was
    done.

    Args:
        model: changed in place, with its configuration.
        match: result of `match_labels`, of any kind except `DIFFERENT`.
        name_or_path: its checkpoint.
        data_names: names of the data set's labels, in the order of their ids.
        parameters: those with one row per label. Rows after these mean "none of them" and stay.
    """
    own_names = names_by_id(model.config.id2label)
    count = len(own_names)
    order = [*match.ids, *(label for label in range(count) if label not in set(match.ids))]
    if order != list(range(count)):
        for parameter in parameters:
            parameter.copy_(parameter[[*order, *range(count, len(parameter))]].clone())
    if match.kind is Match.REORDERED:
        logger.info("The labels of %s have been reordered by name to match those of the data set.", name_or_path)
    elif match.kind is Match.ADOPTED:
        logger.warning(
            "The labels of %s or of the data set are numbers without names: %r of the data set is treated as %r, and "
            "all other labels are also matched by id.",
            *(name_or_path, data_names[0], own_names[match.ids[0]]),
        )
    name_labels(model.config, [*match.names, *(own_names[label] for label in order[len(match.ids) :])])


def renew_classifier(model: ImageClassifier, label_names: Sequence[str]) -> None:
    """Gives a model a newly initialised classifier for other labels, of any number."""
    name_labels(model.config, label_names)
    old = next(model.parameters())
    classifier = image_classifier(model.config).to(old.device, old.dtype)
    classifier.apply(model._init_weights)
    model.classifier = classifier.train(model.training)
    model.num_labels = len(label_names)  # type: ignore[assignment]


def name_labels(config: VisionMambaConfig, label_names: Sequence[str]) -> None:
    """Sets `id2label` and `label2id` of a configuration."""
    for name, labels in complete_label_maps({"id2label": list(label_names)}).items():
        setattr(config, name, labels)

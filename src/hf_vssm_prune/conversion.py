"""Converts published checkpoints to ours, and back.

Both directions use one table per family, with the published name of each of our tensors. Tensors are renamed and not
changed, except by a family's own `complete_official`.
"""

import argparse
import copy
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from . import conversion_upernet as upernet
from .configuration_common import VisionMambaConfig, pruned_config
from .documentation import see
from .families import FAMILIES, Family, ImageClassifier
from .label_maps import complete_label_maps
from .modeling_common import is_pruning_parameter
from .pruned_heads import backbone_of


logger = logging.getLogger(__name__)


class OfficialFormat(Protocol):
    """How a family's authors published their weights, as defined by the classes of its models.

    Attributes:
        official_names: maps patterns for our tensor names in an image classifier to published names, each a string or a
            function of the match; the first pattern that matches the whole name is used.
        official_marks: names of tensors that every file of the family has, by which it is recognised.
        official_signs: the same for tensors that only some of the files have.
        official_weight_keys: keys under which files store weights.
        official_prefixes: prefixes of all names in some files, which the model does not have.
        official_ignored: beginnings of names (after such prefixes) that are not part of the model.
        official_last_weights: beginnings of the names of a second set of weights, the last ones; those under the
            model's own names are then the averaged ones.
    """

    official_names: ClassVar[Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]]
    official_marks: ClassVar[tuple[str, ...]]
    official_signs: ClassVar[tuple[str, ...]]
    official_weight_keys: ClassVar[tuple[str, ...]]
    official_prefixes: ClassVar[tuple[str, ...]]
    official_ignored: ClassVar[tuple[str, ...]]
    official_last_weights: ClassVar[tuple[str, ...]]

    @classmethod
    def official_weight_key(cls, config: VisionMambaConfig) -> str | None:
        """The key under which the family's own training code saves the weights of such a model. None: the file contains
        only the weights."""

    @classmethod
    def options_of_official(cls, official: "OfficialTensors", overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the configuration that published tensors imply, unless overridden."""

    @classmethod
    def backbone_options_of_official(cls, official: "OfficialTensors", overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a file whose head is not a classifier; missing in families that have no such files."""

    @classmethod
    def complete_official(
        cls, config: VisionMambaConfig, official: "OfficialTensors", expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds published tensors that a file may lack, and converts those that have another layout than the model
        expects.

        Args:
            config: configuration of the model.
            official: the tensors of a file, by their published names.
            expected: all tensors of the model, on the meta device, by the same names.
        """


# For a classifier, or for UPerNet with a backbone of this package.
ModelConfig: TypeAlias = Any
# Keys under which published files store weights averaged over training.
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict")
CHECKPOINT_SUFFIXES = (".pth", ".safetensors")
# What distributed, compiled and averaged models of PyTorch add to names, and the counter of averaged ones.
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
AVERAGED = "n_averaged"


def load_official_model(
    path: str | Path, ema: bool = False, family: str | None = None, **overrides: Any
) -> ImageClassifier:
    """Loads a published `.pth` or `.safetensors` file as an image classifier in evaluation mode, without changing its
    tensors.

    An mmsegmentation file with a decode head becomes transformers' `UperNetForSemanticSegmentation`. The names of the
    classes are those that the file contains, see `class_names`.

    Args:
        path: path of the file.
        ema: load the weights averaged over training instead of the last ones. If a file has both under other names,
            see `OfficialFormat.official_last_weights`, the averaged ones are loaded in any case, as in the authors'
            evaluation.
        family: family of the checkpoint. None: the family whose model type is part of the file's name, if the tensors
            can be of that family; otherwise see `infer_config`.
        **overrides: options of the configuration that the tensors do not imply, see `infer_config`; for instance
            `token_pruning`. Parameters of pruning, which the file does not have, are new.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete checkpoint of a known family; the message says what is wrong.
    """
    checkpoint = load_checkpoint(path)
    state_dict = extract_state_dict(checkpoint, ema)
    config = infer_config(state_dict, family or _family_named(path, state_dict), **overrides)
    names = class_names(checkpoint)
    if len(names) == config.num_labels and not {"id2label", "label2id"} & overrides.keys():
        for option, labels in complete_label_maps({"id2label": names}).items():
            setattr(config, option, labels)
    with torch.device("meta"):
        model = _make_dense_model(config)
    model.load_state_dict(convert_official_state_dict(config, state_dict), assign=True)
    backbone_of(model).set_token_pruning(pruned_config(config).token_pruning)
    return model.eval()


def save_official_model(model: ImageClassifier, path: str | Path) -> None:
    """Saves a classifier in the format in which its family's weights were published, as `.pth` or, with the tensors
    alone, as `.safetensors`.

    The file appears in one step, complete. It includes neither the pruning schedule nor parameters of pruning.

    Raises:
        ValueError: the file has another suffix.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(f"{path}: published checkpoints are {' or '.join(CHECKPOINT_SUFFIXES)} files.")
    official = convert_to_official_state_dict(model.config, model.state_dict())
    temporary = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix == ".safetensors":
                # `save_file` would create a file that nobody else can read.
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in official.items()}))
            else:
                backbone = pruned_config(model.config)
                key = FAMILIES[backbone.model_type].base.official_weight_key(backbone)
                torch.save(official if key is None else {key: official}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch has no exception of its own for a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def official_name(model_type: str, name: str) -> str:
    """The published name of one of our tensors."""
    for pattern, published in FAMILIES[model_type].base.official_names:
        if match := re.fullmatch(pattern, name):
            return published(match) if callable(published) else match.expand(published)
    raise KeyError(f"{name!r} is not a tensor of a {model_type} classifier.")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a published `.pth` or `.safetensors` file. Only tensors and plain values are unpickled.

    This includes `argparse.Namespace`, in which Vim's training script saves its options.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a pickle that contains more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own exceptions
        refused = re.search(r"Unsupported (?:global|operand|class).*", str(error))
        said = refused[0] if refused else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values. It is damaged, or it contains Python "
            "objects, which are not loaded because they could run code; if you trust its source, load it yourself "
            f'and save only {{"model": state_dict}}. The error was: {said}. {see("checkpoint-cannot-be-read")}'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__}; it must contain a dict of tensors.")
    return dict(checkpoint)


def extract_state_dict(checkpoint: Mapping[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """The weights in a published file: under a key that some family uses, or the file itself.

    Args:
        checkpoint: the file's content.
        ema: return the weights averaged over training instead of the last ones.

    Raises:
        ValueError: there are none.
    """
    weight_keys = [*dict.fromkeys(key for family in FAMILIES.values() for key in family.base.official_weight_keys)]
    keys = list(EMA_KEYS) if ema else weight_keys
    found = next((checkpoint[key] for key in keys if key in checkpoint), None)
    if found is None and (not ema or _has_swapped_ema(checkpoint)):
        found = next((checkpoint[key] for key in weight_keys if key in checkpoint), checkpoint)
    if not isinstance(found, Mapping) or not found:
        kind = "EMA weights" if ema else "weights"
        raise ValueError(
            f"the checkpoint contains no {kind} under any of {keys}; it has {sorted(map(str, checkpoint))[:20]}. "
            f"{see('checkpoint-of-another-layout')}"
        )
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"the checkpoint contains no tensors; it has {sorted(map(str, found))[:20]}.")
    return {WRAPPERS.sub("", key): tensor for key, tensor in tensors.items() if key != AVERAGED}


def class_names(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the classes that OpenMMLab's training code saves next to the weights; empty if there are none.

    Args:
        checkpoint: the file's content.
    """
    meta = checkpoint.get("meta")
    if not isinstance(meta, Mapping):
        return []
    newer = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, Mapping) else None)
    return list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else []


def _has_swapped_ema(checkpoint: Mapping[str, Any]) -> bool:
    last_weights = tuple(prefix for family in FAMILIES.values() for prefix in family.base.official_last_weights)
    weights = checkpoint.get("state_dict")
    return isinstance(weights, Mapping) and any(str(key).startswith(last_weights) for key in weights)


def _as_of(family: Family, tensors: Mapping[str, Tensor]) -> "OfficialTensors":
    """Tensors by a family's published names, without those that are not part of its models."""
    prefix = "|".join(map(re.escape, family.base.official_prefixes))
    names = {re.sub(f"^({prefix})", "", name): name for name in tensors}
    ignored = (*family.base.official_ignored, *family.base.official_last_weights)
    return OfficialTensors({name: tensors[key] for name, key in names.items() if not name.startswith(ignored)})


def convert_official_state_dict(
    config: ModelConfig, state_dict: Mapping[str, Any], ema: bool = False
) -> dict[str, Tensor]:
    """Converts a published checkpoint to our names, complete, for `load_state_dict(strict=True)` of the image
    classifier. Only parameters of pruning, which published checkpoints do not have, are missing. If the classifier is
    new because the checkpoint has none for this kind of input, this is logged.

    Args:
        config: configuration of the model to load it into, see `infer_config`; with a `UperNetConfig` whose backbone is
            of this package, mmsegmentation's tensors become those of transformers' `UperNetForSemanticSegmentation`.
        state_dict: what `torch.load` returned: `{"state_dict": ...}`, `{"model": ...}`, or the tensors themselves.
        ema: use the weights averaged over training.

    Raises:
        ValueError: tensors are missing, unexpected, or do not have the shape that the configuration implies; each is
            named.
    """
    tensors = _tensors_of(config)
    names = {_official_name(config, name): name for name in tensors}
    expected = {key: tensors[name] for key, name in names.items()}
    backbone = pruned_config(config)
    family = FAMILIES[backbone.model_type]
    given = _as_of(family, extract_state_dict(state_dict, ema))
    official = family.base.complete_official(backbone, given, expected)
    problems = [f"missing: {key} {list(tensor.shape)}" for key, tensor in expected.items() if key not in official]
    problems += [f"unexpected: {key} {list(tensor.shape)}" for key, tensor in official.items() if key not in expected]
    problems += [
        f"shape: {key} is {list(official[key].shape)} in the checkpoint and {list(tensor.shape)} in the model"
        for key, tensor in expected.items()
        if key in official and official[key].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit this {config.model_type} configuration. "
            f"{see('checkpoint-of-another-layout')}\n  " + "\n  ".join(problems)
        )
    if any(name.startswith("classifier.") and official[key] is not given.get(key) for key, name in names.items()):
        logger.warning(
            "The checkpoint has no classifier for %ss: the model's, for %d labels, is new and has to be trained.",
            *(backbone.modality, config.num_labels),
        )
    return {name: official[key] for key, name in names.items()}


def convert_to_official_state_dict(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our image classifier, or of UPerNet on our backbone, under the published names, without
    parameters of pruning.

    Raises:
        ValueError: tensors are missing or unexpected; each is named.
    """
    expected = _tensors_of(config)
    problems = [f"missing: {name}" for name in expected if name not in state_dict]
    problems += [
        f"unexpected: {name}" for name in state_dict if name not in expected and not is_pruning_parameter(name)
    ]
    if problems:
        raise ValueError(f"these are not the weights of this {config.model_type} model:\n  " + "\n  ".join(problems))
    return {_official_name(config, name): state_dict[name] for name in expected}


def _official_name(config: ModelConfig, name: str) -> str:
    of_backbone = partial(official_name, pruned_config(config).model_type)
    return upernet.official_name(config, name, of_backbone) if upernet.is_upernet(config) else of_backbone(name)


def _make_dense_model(config: ModelConfig) -> Any:
    """A model without parameters of pruning."""
    config = copy.deepcopy(config)
    pruned_config(config).token_pruning = None
    if upernet.is_upernet(config):
        return upernet.set_auxiliary_level(UperNetForSemanticSegmentation(config))
    return FAMILIES[config.model_type].classifier(config)


def _tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict without parameters of pruning, with tensors on the meta device."""
    with torch.device("meta"):
        return _make_dense_model(config).state_dict()


def infer_config(state_dict: Mapping[str, Any], family: str | None = None, **overrides: Any) -> ModelConfig:
    """The configuration that a published checkpoint's tensors imply: for a classifier or, if there is a decode head, a
    `UperNetConfig` with the backbone's options (and mmsegmentation's) in `backbone_config`.

    The grid is assumed to be square, and patches to lie next to each other: give `image_size` or `patch_stride`
    otherwise. Vim's patches are assumed to overlap, which is logged, if they then fit images of `image_size` or, as in
    its published models, of 224 pixels. (By default, the official image models of VideoMamba have a stride of 16 with
    patches of any size.)

    Args:
        state_dict: as for `convert_official_state_dict`.
        family: its model type. None: the family whose marks the tensors have, and which has the options in `overrides`.
            If several fit, the one with the most marks and signs present, then the one with the fewest missing.
            VideoMamba's image models have the same tensors as Vim's and are taken for these, which is logged: name the
            family.
        **overrides: options of the configuration that override the inferred ones.

    Raises:
        ValueError: the checkpoint fits no known family, or several; a tensor that determines a size is missing; an
            option belongs to another family; or the grid is not square and `image_size` is not given.
    """
    tensors = extract_state_dict(state_dict)
    found = _family_of(tensors, overrides) if family is None else FAMILIES.get(family)
    if found is None:
        raise ValueError(f"`family` is {family!r}; allowed values are {list(FAMILIES)}.")
    for option in overrides:
        owners = [each.config for each in FAMILIES.values() if hasattr(each.config, option)]
        if owners and found.config not in owners:
            names = " and ".join(owner.paper.name for owner in owners)
            raise ValueError(f"`{option}` is an option of {names}, not of {found.config.paper.name}.")
    official = _as_of(found, tensors)
    if upernet.has_upernet(official):
        return _infer_upernet_config(found, official, overrides)
    return found.config(**{**found.base.options_of_official(official, overrides), **overrides})


def _infer_upernet_config(family: Family, official: "OfficialTensors", overrides: dict[str, Any]) -> UperNetConfig:
    if not hasattr(family.base, "backbone_options_of_official"):
        raise ValueError(f"{family.config.paper.name}'s checkpoints with a decode head are not supported.")
    if "num_labels" in overrides:
        raise ValueError("`num_labels` is an option of classifiers, but the checkpoint has a decode head.")
    options = family.base.backbone_options_of_official(official, overrides)
    options |= upernet.options_of_levels(official, options["num_hidden_layers"])
    backbone = family.config(**{**options, **overrides})
    return UperNetConfig(backbone_config=backbone, **upernet.options_of_heads(official))


def _family_of(tensors: Mapping[str, Tensor], options: Iterable[str]) -> Family:
    """The family of a file, see `infer_config`. If others have as many of their marks and signs, this is logged."""
    fitting = [each for each in FAMILIES.values() if _fits(each, tensors)]
    known_options = [each for each in options if any(hasattr(family.config, each) for family in FAMILIES.values())]
    having = [family for family in fitting if all(hasattr(family.config, option) for option in known_options)]
    ranks = [(_rank(each, tensors), each) for each in having or fitting]
    highest = max((rank for rank, _ in ranks), default=(0, 0))
    best = [each for rank, each in ranks if rank == highest]
    if len(best) == 1:
        if others := [each.config.paper.name for rank, each in ranks if each is not best[0] and rank[0] == highest[0]]:
            logger.warning(
                "The checkpoint is taken for a model of %s; its tensors could also be those of %s. If they are, name "
                "the family.",
                *(best[0].config.paper.name, " or ".join(others)),
            )
        return best[0]
    if best:
        raise ValueError(
            f"the checkpoint could be of any of the families {[each.config.model_type for each in best]}; choose one "
            "with `family`."
        )
    known = (f"{each.config.paper.name} ({', '.join(each.base.official_marks)})" for each in FAMILIES.values())
    raise ValueError(
        f"this is neither a {' nor a '.join(known)} checkpoint; its tensors start with {sorted(tensors)[:5]}. "
        f"{see('checkpoint-of-another-layout')}"
    )


def _fits(family: Family, tensors: Mapping[str, Tensor]) -> bool:
    return _as_of(family, tensors).keys() >= set(family.base.official_marks)


def _rank(family: Family, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The number of a family's marks and signs that are present, and (negative) the number that are missing."""
    official = _as_of(family, tensors)
    there = [mark in official for mark in (*family.base.official_marks, *family.base.official_signs)]
    return sum(there), sum(there) - len(there)


def _family_named(path: str | Path, tensors: Mapping[str, Tensor]) -> str | None:
    """The model type in a file's name, if the tensors can be of that family; the longest one if there are several."""
    name = Path(path).name.lower()
    named = [known for known, family in FAMILIES.items() if known in name and _fits(family, tensors)]
    return max(named, key=len, default=None)


class OfficialTensors(dict[str, Tensor]):
    """Published tensors by name, and the sizes that they imply."""

    def shape(self, name: str, num_axes: int) -> torch.Size:
        """The shape of a tensor that determines a size of the model.

        Raises:
            ValueError: it is missing, or has another number of axes.
        """
        if name not in self:
            raise ValueError(f"the checkpoint is not a complete image classifier; missing: {name}.")
        if self[name].ndim != num_axes:
            raise ValueError(
                f"shape: {name} is {list(self[name].shape)} in the checkpoint; it must have {num_axes} axes."
            )
        return self[name].shape

    def mixer_options(self, prefix: str) -> dict[str, Any]:
        """Depth and mixer sizes, from tensors with Mamba's names; these start with `prefix`, in which {} is the layer.

        Raises:
            ValueError: layers or tensors are missing.
        """
        pattern = re.escape(prefix).replace(r"\{\}", r"(\d+)") + r"\.A_log"
        layers = {int(match[1]) for key in self if (match := re.fullmatch(pattern, key))}
        if layers != set(range(len(layers))):
            raise ValueError(
                f"the checkpoint's layers are {sorted(layers)[:20]}; they must be numbered from 0 without gaps."
            )
        first = prefix.format(0)
        width, state_size = self.shape(f"{first}.A_log", 2)
        hidden_size = self.shape(f"{first}.in_proj.weight", 2)[1]
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": len(layers),
            "state_size": state_size,
            "expand": width // max(1, hidden_size),
            "time_step_rank": self.shape(f"{first}.dt_proj.weight", 2)[1],
        }

    @staticmethod
    def square_side(num_patches: int) -> int:
        """The side of a square grid.

        Raises:
            ValueError: this number of patches does not form a square.
        """
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(
                f"{num_patches} patches do not form a square grid: give `image_size`, a number or (height, width)."
            )
        return side

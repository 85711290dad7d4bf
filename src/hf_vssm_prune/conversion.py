"""Published checkpoints to ours, and back.

Both ways go through one table, of the family: the published name of each of our tensors. Tensors are renamed, not
changed, but for what a family's own `complete_official` does.
"""

import argparse
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
from .configuration_common import VisionMambaConfig
from .documentation import see
from .families import FAMILIES, Family, ImageClassifier


class OfficialFormat(Protocol):
    """What the classes of a family's models tell of the files in which its authors published weights.

    Attributes:
        official_names: our names of an image classifier's tensors -> published names, a text or a function of the
            match; the first pattern that matches the whole name counts.
        official_marks: names of tensors that every file of the family's has, and by which it is known.
        official_signs: likewise, of tensors that some of the files have.
        official_weight_keys: under which files have weights.
        official_prefixes: beginnings of all names that some files have and the model has not.
        official_ignored: beginnings of names, behind such prefixes, that are no part of the model.
        official_last_weights: likewise of a second set of weights, the last ones, beside those of the model's names,
            which then hold averaged ones.
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
        """Under which the family's own training code saves the weights of such a model. None: a file is the weights."""

    @classmethod
    def options_of_official(cls, official: "OfficialTensors", overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the configuration that published tensors imply, where overrides leave them open."""

    @classmethod
    def backbone_options_of_official(cls, official: "OfficialTensors", overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The same of a file whose head is another than a classifier's; a family of whose there are none lacks it."""

    @classmethod
    def complete_official(
        cls, config: VisionMambaConfig, official: "OfficialTensors", expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Published tensors, with what a file may lack, or have in another layout than the model expects, made right.

        Args:
            config: of the model.
            official: of a file, by their published names.
            expected: all that the model has, without memory, by the same names.
        """


# Of a classifier, or of UPerNet on a backbone of this package.
ModelConfig: TypeAlias = Any
# Where published files keep weights averaged over training.
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict")


def load_official_model(
    path: str | Path, ema: bool = False, family: str | None = None, **overrides: Any
) -> ImageClassifier:
    """A published `.pth` or `.safetensors` file as an image classifier, in evaluation mode, its tensors as they are.

    A file of mmsegmentation's with a decode head becomes transformers' `UperNetForSemanticSegmentation`.

    Args:
        path: of the file.
        ema: the weights averaged over training, in place of the last ones.
        family: whose checkpoint it is. None: the one whose model type the file's name has in it, if its tensors may be
            that family's; else see `infer_config`.
        **overrides: options of the configuration that the tensors do not imply, see `infer_config`; for instance
            `token_pruning`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a known family, or not a whole one; the message names what is wrong.
    """
    state_dict = extract_state_dict(load_checkpoint(path), ema)
    config = infer_config(state_dict, family or _family_named(path, state_dict), **overrides)
    with torch.device("meta"):
        model = _make_model(config)
    model.load_state_dict(convert_official_state_dict(config, state_dict), assign=True)
    return model.eval()


def save_official_model(model: ImageClassifier, path: str | Path) -> None:
    """Saves a classifier the way its family's weights were published, as `.pth` or, bare, as `.safetensors`.

    The file appears at once and complete. A pruning schedule is no part of it.

    Raises:
        ValueError: the file has another suffix.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path}: published checkpoints are .pth or .safetensors files.")
    official = convert_to_official_state_dict(model.config, model.state_dict())
    temporary = path.with_name(f".unfinished-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix == ".safetensors":
                # `save_file` would make a file that nobody else may read.
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in official.items()}))
            else:
                backbone = _backbone_config(model.config)
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
    """Reads a published `.pth` or `.safetensors` file. Nothing but tensors and plain values is unpickled.

    `argparse.Namespace` counts as one: Vim's training script saves its options in one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a pickle that wants more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own
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
    """The weights in a published file's layout: under a key that some family has them under, or the file itself.

    Args:
        checkpoint: the file's content.
        ema: the weights averaged over training, in place of the last ones.

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
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def _has_swapped_ema(checkpoint: Mapping[str, Any]) -> bool:
    last_weights = tuple(prefix for family in FAMILIES.values() for prefix in family.base.official_last_weights)
    weights = checkpoint.get("state_dict")
    return isinstance(weights, Mapping) and any(str(key).startswith(last_weights) for key in weights)


def _as_of(family: Family, tensors: Mapping[str, Tensor]) -> "OfficialTensors":
    """Tensors by a family's published names, without what is no part of its models."""
    prefix = "|".join(map(re.escape, family.base.official_prefixes))
    names = {re.sub(f"^({prefix})", "", name): name for name in tensors}
    ignored = (*family.base.official_ignored, *family.base.official_last_weights)
    return OfficialTensors({name: tensors[key] for name, key in names.items() if not name.startswith(ignored)})


def convert_official_state_dict(
    config: ModelConfig, state_dict: Mapping[str, Any], ema: bool = False
) -> dict[str, Tensor]:
    """A published checkpoint under our names, complete, for `load_state_dict(strict=True)` of the image classifier.

    Args:
        config: of the model to load it into, see `infer_config`; with a `UperNetConfig` whose backbone is of this
            package, mmsegmentation's tensors become those of transformers' `UperNetForSemanticSegmentation`.
        state_dict: what `torch.load` gave: `{"state_dict": ...}`, `{"model": ...}`, or the tensors themselves.
        ema: take the weights averaged over training.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape than the configuration says; each is named.
    """
    tensors = _tensors_of(config)
    names = {_official_name(config, name): name for name in tensors}
    expected = {key: tensors[name] for key, name in names.items()}
    backbone = _backbone_config(config)
    family = FAMILIES[backbone.model_type]
    official = family.base.complete_official(backbone, _as_of(family, extract_state_dict(state_dict, ema)), expected)
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
    return {name: official[key] for key, name in names.items()}


def convert_to_official_state_dict(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our image classifier, or of UPerNet on our backbone, under the published names.

    Raises:
        ValueError: tensors are missing or unexpected; each is named.
    """
    expected = _tensors_of(config)
    problems = [f"missing: {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected: {name}" for name in state_dict if name not in expected]
    if problems:
        raise ValueError(f"these are not the weights of this {config.model_type} model:\n  " + "\n  ".join(problems))
    return {_official_name(config, name): state_dict[name] for name in expected}


def _official_name(config: ModelConfig, name: str) -> str:
    of_backbone = partial(official_name, _backbone_config(config).model_type)
    return upernet.official_name(config, name, of_backbone) if upernet.is_upernet(config) else of_backbone(name)


def _backbone_config(config: ModelConfig) -> VisionMambaConfig:
    return config.backbone_config if upernet.is_upernet(config) else config


def _make_model(config: ModelConfig) -> Any:
    if upernet.is_upernet(config):
        return upernet.set_auxiliary_level(UperNetForSemanticSegmentation(config))
    return FAMILIES[config.model_type].classifier(config)


def _tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict, as tensors without memory."""
    with torch.device("meta"):
        return _make_model(config).state_dict()


def infer_config(state_dict: Mapping[str, Any], family: str | None = None, **overrides: Any) -> ModelConfig:
    """The configuration that a published checkpoint's tensors imply: of a classifier or, where there is a decode head,
    a `UperNetConfig` with the backbone's options, and mmsegmentation's, in `backbone_config`.

    A grid is taken to be square, and patches not to overlap: give `image_size` or `patch_stride` where it is otherwise.

    Args:
        state_dict: as for `convert_official_state_dict`.
        family: its model type. None: the one whose marks it bears, and that has the options in `overrides`; of two
            that both fit, the one of whose marks and signs most are there, then the one of which fewer are missing.
            VideoMamba's files of image models are taken for Vim's, which have the same tensors: name the family.
        **overrides: options of the configuration, put over the inferred ones.

    Raises:
        ValueError: it is of no known family, or of several, a tensor that tells a size is missing, an option is another
            family's, or the grid is not square and `image_size` is not given.
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
    options = family.base.backbone_options_of_official(official, overrides)
    options |= upernet.options_of_levels(official, options["num_hidden_layers"])
    backbone = family.config(**{**options, **overrides})
    return UperNetConfig(backbone_config=backbone, **upernet.options_of_heads(official))


def _family_of(tensors: Mapping[str, Tensor], options: Iterable[str]) -> Family:
    """The family that a file is of, see `infer_config`."""
    fitting = [each for each in FAMILIES.values() if _fits(each, tensors)]
    known_options = [each for each in options if any(hasattr(family.config, each) for family in FAMILIES.values())]
    having = [family for family in fitting if all(hasattr(family.config, option) for option in known_options)]
    ranks = [(_rank(each, tensors), each) for each in having or fitting]
    highest = max((rank for rank, _ in ranks), default=None)
    best = [each for rank, each in ranks if rank == highest]
    if len(best) == 1:
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
    """How many marks and signs of a family are there, and, as a negative number, how many are not."""
    official = _as_of(family, tensors)
    there = [mark in official for mark in (*family.base.official_marks, *family.base.official_signs)]
    return sum(there), sum(there) - len(there)


def _family_named(path: str | Path, tensors: Mapping[str, Tensor]) -> str | None:
    """The model type in a file's name, where the tensors may be that family's; the longest of several."""
    name = Path(path).name.lower()
    named = [known for known, family in FAMILIES.items() if known in name and _fits(family, tensors)]
    return max(named, key=len, default=None)


class OfficialTensors(dict[str, Tensor]):
    """Published tensors by name, and what they say about sizes."""

    def shape(self, name: str, num_axes: int) -> torch.Size:
        """The shape of a tensor that tells a size of the model.

        Raises:
            ValueError: it is missing, or has not so many axes.
        """
        if name not in self:
            raise ValueError(f"the checkpoint is not a complete image classifier; missing: {name}.")
        if self[name].ndim != num_axes:
            raise ValueError(
                f"shape: {name} is {list(self[name].shape)} in the checkpoint; it must have {num_axes} axes."
            )
        return self[name].shape

    def mixer_options(self, prefix: str) -> dict[str, Any]:
        """Depth and sizes of mixers by the names of Mamba's tensors, which start with `prefix`, its {} the layer.

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
            ValueError: so many patches are none.
        """
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(
                f"{num_patches} patches do not form a square grid: give `image_size`, a number or (height, width)."
            )
        return side

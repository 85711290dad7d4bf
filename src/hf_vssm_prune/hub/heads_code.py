"""The code that is saved next to a model with a head, so that it can be loaded with `trust_remote_code=True`: a file
that registers the backbone with transformers and puts the head on it."""

from typing import Any

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.heads import auto_class_of


TEMPLATE = '''"""transformers' {model} on a backbone of hf_vssm_prune, where that package is not installed."""

import transformers
from transformers import AutoBackbone, AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .{configuration_module} import {configuration}
from .{backbone_module} import {backbone}
from .pruned_heads import PrunedHead


name = {configuration}.model_type
if name not in CONFIG_MAPPING:
    AutoConfig.register(name, {configuration})
    AutoBackbone.register({configuration}, {backbone})


class {config}(transformers.{config}):
    pass


class {model}(PrunedHead, transformers.{model}):
    config_class = {config}
'''


def module_name(config: Any) -> str:
    """The name of the file, without its suffix."""
    return f"modeling_{pruned_config(config).model_type}_{config.model_type}"


def auto_map(config: Any) -> dict[str, str]:
    """Where transformers finds the classes, by Auto class name."""
    auto_class = auto_class_of(config)
    classes = {"AutoConfig": type(config), auto_class.__name__: auto_class._model_mapping[type(config)]}
    return {name: f"{module_name(config)}.{found.__name__}" for name, found in classes.items()}


def head_code(config: Any) -> str:
    """The file's text."""
    family = FAMILIES[pruned_config(config).model_type]
    backbone = family.classes["Backbone"]
    return TEMPLATE.format(
        config=type(config).__name__,
        model=auto_class_of(config)._model_mapping[type(config)].__name__,
        configuration=family.config.__name__,
        configuration_module=family.config.__module__.rpartition(".")[2],
        backbone=backbone.__name__,
        backbone_module=backbone.__module__.rpartition(".")[2],
    )

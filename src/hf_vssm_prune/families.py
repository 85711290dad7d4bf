"""The model families: one line each. Everything specific to a family is in its own two files.

This table is not copied into Hub repositories: the code there knows only its own family.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)

from . import (
    configuration_plainmamba,
    configuration_videomamba,
    configuration_vim,
    modeling_plainmamba,
    modeling_videomamba,
    modeling_vim,
)
from .configuration_common import VisionMambaConfig
from .modeling_common import TokenPruningMixin


# A model of this package, and a classifier: the package's own classes, not those from a Hub repository's code.
VisionMamba: TypeAlias = TokenPruningMixin
ImageClassifier: TypeAlias = TokenPruningMixin

# From the suffix of a class's name to the Auto class that creates it from a configuration.
AUTO_CLASSES: dict[str, Any] = {
    "Model": AutoModel,
    "ForImageClassification": AutoModelForImageClassification,
    "ForVideoClassification": AutoModelForVideoClassification,
    "Backbone": AutoBackbone,
}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        config: the class of its configuration, which also defines what the package needs to know about the family.
        classes: the classes of its models, by the suffixes in `AUTO_CLASSES`.
        base: their base class, which is also an `OfficialFormat`: see `conversion`.
        public_names: all public objects of its two files, by name.
    """

    config: type[VisionMambaConfig]
    classes: dict[str, Any]
    base: Any
    public_names: dict[str, Any]

    def classifier(self, config: VisionMambaConfig) -> Any:
        """A new classifier, for images or for videos as the configuration says."""
        return self.classes[f"For{config.modality.capitalize()}Classification"](config)

    @staticmethod
    def auto_classifier(config: VisionMambaConfig) -> Any:
        """The Auto class for such classifiers."""
        return AUTO_CLASSES[f"For{config.modality.capitalize()}Classification"]

    def auto_map(self) -> dict[str, str]:
        """Where transformers finds the classes in a folder's code files, by Auto class name."""
        classes = {AutoConfig: self.config} | {AUTO_CLASSES[end]: found for end, found in self.classes.items()}
        return {
            auto_class.__name__: f"{found.__module__.rpartition('.')[2]}.{found.__name__}"
            for auto_class, found in classes.items()
        }


def register(configuration: ModuleType, modeling: ModuleType) -> Family:
    """Registers a family with this package and with transformers' Auto classes.

    Args:
        configuration: the module of its configuration's class, `NameConfig`.
        modeling: the module of its models' classes, `NamePreTrainedModel` and some of `AUTO_CLASSES`.
    """
    public_names = {name: getattr(module, name) for module in (configuration, modeling) for name in module.__all__}
    config = next(found for name, found in public_names.items() if name.endswith("Config"))
    name = config.__name__.removesuffix("Config")
    classes = {end: public_names[name + end] for end in AUTO_CLASSES if name + end in public_names}
    family = Family(config, classes, public_names[f"{name}PreTrainedModel"], public_names)
    FAMILIES[config.model_type] = family
    AutoConfig.register(config.model_type, config)
    for end, found in classes.items():
        AUTO_CLASSES[end].register(config, found)
    return family


def family_names() -> str:
    """For messages: "PlainMamba, Vim or VideoMamba"."""
    *others, last = (family.config.paper.name for family in FAMILIES.values())
    return f"{', '.join(others)} or {last}"


def preset_names() -> str:
    """For messages: "L1, L2, L3 of PlainMamba; T, S, B of Vim"."""
    configs = [family.config for family in FAMILIES.values()]
    return "; ".join(f"{', '.join(config.presets)} of {config.paper.name}" for config in configs)


FAMILIES: dict[str, Family] = {}
register(configuration_plainmamba, modeling_plainmamba)
register(configuration_vim, modeling_vim)
register(configuration_videomamba, modeling_videomamba)

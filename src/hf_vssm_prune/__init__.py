"""Token pruning for vision Mambas (PlainMamba, Vim, VideoMamba) in Hugging Face transformers.

Importing the package registers its models, so that they can be loaded with
`AutoModelForImageClassification.from_pretrained` and the other Auto classes.
"""

from pathlib import Path

from .environment import is_command, let_threads_wait


if is_command():  # before the imports below load torch
    let_threads_wait()

# isort: split
from .configuration_plainmamba import PlainMambaConfig
from .configuration_videomamba import VideoMambaConfig
from .configuration_vim import VimConfig
from .families import FAMILIES
from .flops_of_heads import count_flops
from .heads import put_pretrained_backbone
from .modeling_common import TokenPruningMixin
from .modeling_plainmamba import (
    PlainMambaBackbone,
    PlainMambaForImageClassification,
    PlainMambaModel,
    PlainMambaPreTrainedModel,
)
from .modeling_videomamba import (
    VideoMambaBackbone,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    VideoMambaPreTrainedModel,
)
from .modeling_vim import VimBackbone, VimForImageClassification, VimModel, VimPreTrainedModel
from .pruned_heads import prunable
from .visualization import visualize


__version__ = "0.1.0"

# A small dense PlainMamba that classifies photographs of waste. It comes with the package, for examples.
EXAMPLE_MODEL = Path(__file__).parent / "data" / "plainmamba_trashnet"

TokenPruningMixin.hub_module = "hf_vssm_prune.hub.pretrained"

__all__ = [
    "EXAMPLE_MODEL",
    "PlainMambaBackbone",
    "PlainMambaConfig",
    "PlainMambaForImageClassification",
    "PlainMambaModel",
    "PlainMambaPreTrainedModel",
    "VideoMambaBackbone",
    "VideoMambaConfig",
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaModel",
    "VideoMambaPreTrainedModel",
    "VimBackbone",
    "VimConfig",
    "VimForImageClassification",
    "VimModel",
    "VimPreTrainedModel",
    "count_flops",
    "prunable",
    "put_pretrained_backbone",
    "visualize",
]

# The names above are for type checkers and editors; here, the names of all families are added from their files.
for _family in FAMILIES.values():
    globals().update(_family.public_names)
    __all__ += [_name for _name in _family.public_names if _name not in __all__]

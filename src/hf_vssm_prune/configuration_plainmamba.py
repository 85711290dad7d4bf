"""PlainMamba's configuration."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_common import VisionMambaConfig


@strict
class PlainMambaConfig(VisionMambaConfig):
    """Configuration of PlainMamba (arXiv 2403.17695), with token pruning (ToP, arXiv 2409.18962).

    The options of every vision Mamba stand in `VisionMambaConfig`.

    Args:
        num_stem_convs: 3x3 convolutions after the first one of the patch embedding.
        stem_channels: width of the patch embedding's convolutions.
        depthwise_layers: layers that are followed by a depthwise 3x3 convolution (L1: the first).
        layer_norm_eps: of the layers' norms.
        final_layer_norm_eps: of the last norm.

    Example:

    ```python
    >>> from hf_vssm_prune import PlainMambaConfig, PlainMambaForImageClassification

    >>> config = PlainMambaConfig.from_preset("L3", token_pruning={"flops_reduction": 0.416})
    >>> model = PlainMambaForImageClassification(config)
    ```
    """

    model_type = "plainmamba"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "L1": {"hidden_size": 192, "num_hidden_layers": 24, "num_stem_convs": 1, "depthwise_layers": [0]},
        "L2": {"hidden_size": 384, "num_hidden_layers": 24, "num_stem_convs": 2},
        "L3": {"hidden_size": 448, "num_hidden_layers": 36, "num_stem_convs": 2},
    }

    conv_kernel: int = 7
    num_stem_convs: int = 1
    stem_channels: int = 64
    depthwise_layers: list[int] | tuple[int, ...] = ()
    layer_norm_eps: float = 1e-5
    final_layer_norm_eps: float = 1e-6

    def _check_sizes(self) -> None:
        super()._check_sizes()
        self._check_whole_number("num_stem_convs", least=0)
        self._check_whole_number("stem_channels", least=1)
        if self.patch_size % 2:
            raise ValueError(
                f"`patch_size` is {self.patch_size}; PlainMamba's stem halves the image first: it must be even."
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"`conv_kernel` is {self.conv_kernel}; it must be odd, so that a patch has a centre.")
        if outside := [layer for layer in self.depthwise_layers if not 0 <= layer < self.num_hidden_layers]:
            raise ValueError(f"`depthwise_layers` has {outside}; allowed are 0 to {self.num_hidden_layers - 1}.")

    def grid_size_for(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in patches: the last row and column are padded with zeros where they are not full."""
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)


__all__ = ["PlainMambaConfig"]

"""Vim's configuration."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_common import VisionMambaConfig


@strict
class VimConfig(VisionMambaConfig):
    """Configuration of Vim (Vision Mamba, arXiv 2401.09417), with token pruning (ToP, arXiv 2409.18962).

    The options of every vision Mamba stand in `VisionMambaConfig`.

    Args:
        patch_stride: pixels from one patch to the next; None for `patch_size`, less where patches overlap.
        rms_norm_eps: of all norms.

    Example:

    ```python
    >>> from hf_vssm_prune import VimConfig, VimForImageClassification

    >>> schedule = {"layers": [5, 10, 15], "keep_ratios": [0.8, 0.8, 0.8]}
    >>> model = VimForImageClassification(VimConfig.from_preset("S", token_pruning=schedule))
    ```
    """

    model_type = "vim"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "T": {"hidden_size": 192},
        "S": {"hidden_size": 384},
        "B": {"hidden_size": 768},
    }

    patch_stride: int | None = None
    rms_norm_eps: float = 1e-5

    def _check_sizes(self) -> None:
        if self.patch_stride is None:
            self.patch_stride = self.patch_size
        if self.patch_stride < 1:
            raise ValueError(f"`patch_stride` is {self.patch_stride}; a whole number of at least 1 is needed.")
        super()._check_sizes()

    def grid_size_for(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in patches: pixels that fill no whole patch are left out."""
        stride = self.patch_stride or self.patch_size
        rows, columns = (max(0, (size - self.patch_size) // stride + 1) for size in (height, width))
        return rows, columns


__all__ = ["VimConfig"]

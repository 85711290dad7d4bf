"""Toy's configuration: everything specific to the family except its modules."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_vssm_prune.configuration_vim import VimConfig
from hf_vssm_prune.flops import FlopCount
from hf_vssm_prune.publication import Paper, PublishedModel, PublishedResult


@strict
class ToyConfig(VimConfig):
    """Vim for short videos, whose tokens form a grid (time, height, width) and come after the class token.

    Args:
        num_frames: number of frames of a video; each frame is cut into patches separately.
    """

    model_type = "toy"
    paper: ClassVar[Paper] = Paper(
        name="Toy",
        title="A Toy",
        arxiv="0000.00000",
        repository="https://example.org/toy",
        flops_convention="linear layers alone",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "XS": {"image_size": 32, "patch_size": 8, "num_frames": 3, "hidden_size": 16, "num_hidden_layers": 6}
    }
    published: ClassVar[dict[str, PublishedModel]] = {
        "XS": PublishedModel("toy/xs", {"flops_reduction": 0.3}, (PublishedResult("dense", "A Toy", 12.3),), "Toys")
    }
    cls_token: ClassVar[str] = "first"
    num_scans: ClassVar[int] = 2

    num_frames: int = 3

    def input_size_for(self, image_size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
        return (self.num_frames, *self.image_height_width(image_size))

    def grid_size_for(self, *input_size: int) -> tuple[int, ...]:
        frames, height, width = input_size
        return (frames, *super().grid_size_for(height, width))

    def count_flops(
        self, input_size: tuple[int, ...], tokens: Sequence[int], scan_shares: Sequence[float] | None = None
    ) -> FlopCount:
        """The published figures count neither of the two directions."""
        parts, one_direction = self._count_parts(tokens, self.patch_size**2, scan_shares)
        return FlopCount.of_parts(parts, unpublished=2 * one_direction)


__all__ = ["ToyConfig"]

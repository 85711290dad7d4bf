"""Toy's configuration: everything specific to the family except its modules."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_vssm_prune.configuration_vim import VimConfig
from hf_vssm_prune.flops import FlopCount, count_projections, count_scans
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

    def count_flops(self, input_size: tuple[int, ...], tokens: Sequence[int]) -> FlopCount:
        parts = Counter(
            patch_projection=tokens[0] * self.patch_size**2 * self.num_channels * self.hidden_size,
            head=self.hidden_size * (self.num_labels or 0),
        )
        unpublished = 0
        for patches in tokens:
            scans = count_scans(self, patches + 1, self.conv_kernel)
            parts.update(count_projections(self, patches + 1))
            parts.update(scans)
            parts.update(scans)
            unpublished += 2 * scans.total()
        return FlopCount.of_parts(parts, unpublished)


__all__ = ["ToyConfig"]

"""The common part of the configurations of bidirectional vision Mambas (Vim, VideoMamba): two scans and a class
token."""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_common import VisionMambaConfig
from .flops import FlopCount, count_projections, count_scans


@strict
class BidirectionalConfig(VisionMambaConfig):
    """Options of a vision Mamba with a forward and a backward scan and a class token.

    Attributes:
        averages_directions: whether a mixer averages its two directions instead of adding them.
        rotates_tokens: whether rotary position embeddings are applied to the tokens before each layer.

    Args:
        patch_stride: distance between patches in pixels, less than `patch_size` if patches overlap; None for
            `patch_size`.
        rms_norm_eps: epsilon of all norms.
    """

    num_scans: ClassVar[int] = 2
    has_backward_scan: ClassVar[bool] = True
    averages_directions: ClassVar[bool]
    rotates_tokens: ClassVar[bool] = False

    patch_stride: int | None = None
    rms_norm_eps: float = 1e-5

    def _check_sizes(self) -> None:
        if self.patch_stride is None:
            self.patch_stride = self.patch_size
        self._check_whole_number("patch_stride", least=1)
        super()._check_sizes()

    @property
    def patch_spacing(self) -> int:
        """Distance between patches in pixels."""
        return self.patch_stride or self.patch_size

    def grid_size_for(self, *input_size: int) -> tuple[int, ...]:
        """(height, width) in patches; pixels that do not fill a whole patch are ignored."""
        return tuple(max(0, (size - self.patch_size) // self.patch_spacing + 1) for size in input_size)

    @property
    def selects_blocks(self) -> bool:
        return self.cls_token_id(0) is not None

    def count_flops(
        self, input_size: tuple[int, ...], tokens: Sequence[int], scan_shares: Sequence[float] | None = None
    ) -> FlopCount:
        """See `VisionMambaConfig.count_flops`.

        Args:
            scan_shares: the fraction of the scan directions that run in each layer. None: all run.
        """
        raise NotImplementedError

    def _count_parts(
        self, tokens: Sequence[int], pixels_of_patch: int, scan_shares: Sequence[float] | None
    ) -> tuple[Counter[str], int]:
        """Multiply-adds of a forward pass by part, and those of one direction of all mixers, of which a fraction runs.

        Args:
            tokens: number of patch tokens in each layer.
            pixels_of_patch: number of pixels in a patch, per channel.
            scan_shares: see `count_flops`.
        """
        parts = Counter(
            patch_projection=tokens[0] * pixels_of_patch * self.num_channels * self.hidden_size,
            head=self.hidden_size * (self.num_labels or 0),
        )
        one_direction = 0
        for patches, share in zip(tokens, scan_shares or [1.0] * len(tokens), strict=True):
            length = patches + (self.cls_token_id(patches) is not None)
            direction = count_scans(self, length, self.conv_kernel)
            direction = Counter({part: round(share * flops) for part, flops in direction.items()})
            parts.update(count_projections(self, length))
            for _ in range(self.num_scans):
                parts.update(direction)
            one_direction += direction.total()
        return parts, one_direction

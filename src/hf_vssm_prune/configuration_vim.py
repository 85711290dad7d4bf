"""Vim's configuration."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bidirectional import BidirectionalConfig
from .flops import FlopCount
from .publication import DYVM, R_MEETO, TOP, TOP_LOGS, VIM_REPOSITORY, Paper, PublishedModel, PublishedResult


# The results are for patches next to each other, unless they say otherwise.
SIZES: tuple[dict[str, Any], ...] = ({}, {"patch_stride": 8})


@strict
class VimConfig(BidirectionalConfig):
    """Configuration of Vim (Vision Mamba, arXiv 2401.09417), with token pruning (ToP, arXiv 2409.18962).

    See `VisionMambaConfig` and `BidirectionalConfig` for the options that it shares with other vision Mambas.

    Args:
        use_cls_token: False: no class token, as in the published backbones for segmentation; a classifier then uses
            the mean of the tokens.
        rotary_embeddings: apply rotary embeddings of the tokens' rows and columns before each layer, as in the
            published Small backbone for segmentation. Needs `use_cls_token=False` and a hidden size divisible by 4.

    Raises:
        ValueError: a value is not allowed.

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
    published: ClassVar[dict[str, PublishedModel]] = {
        "T": PublishedModel(
            "hustvl/Vim-tiny-midclstok",
            {"flops_reduction": 0.107, "method": "top"},
            (
                PublishedResult("dense", TOP, 76.1),
                PublishedResult("dense, overlapping patches (stride 8)", VIM_REPOSITORY, 78.3),
                PublishedResult("token pruning with alignment", TOP, 75.1, "1.29 G"),
                PublishedResult("EViT", TOP, 71.3, "1.28 G"),
                PublishedResult("naive pruning, 0.8 at layers 10 and 20, not fine-tuned", TOP_LOGS, 71.1),
                PublishedResult("the same, fine-tuned", TOP_LOGS, 74.81),
                PublishedResult("token merging, retrained", R_MEETO, 75.3, "1.28 G"),
            ),
            sizes=SIZES,
        ),
        "S": PublishedModel(
            "hustvl/Vim-small-midclstok",
            {"layers": [5, 10, 15], "keep_ratios": [0.8, 0.8, 0.8], "method": "top"},
            (
                PublishedResult("dense", TOP, 80.5),
                PublishedResult("dense, overlapping patches (stride 8)", VIM_REPOSITORY, 81.6),
                PublishedResult("token pruning with alignment", TOP, 78.8, "3.60 G"),
                PublishedResult("token pruning without alignment", TOP, 75.4),
                PublishedResult("EViT", TOP, 74.8, "3.57 G"),
                PublishedResult("naive pruning, 0.8 at layers 5, 10 and 15, not fine-tuned", TOP_LOGS, 73.4),
                PublishedResult("the same, fine-tuned", TOP_LOGS, 78.37),
                PublishedResult("naive pruning, 0.8 at layers 5 and 15, not fine-tuned", TOP_LOGS, 77.4),
                PublishedResult("the same, fine-tuned", TOP_LOGS, 79.1),
                PublishedResult("token merging, retrained", R_MEETO, 79.9, "3.58 G"),
                PublishedResult("dynamic pruning", DYVM, 78.8, "−35.2%"),
            ),
            sizes=SIZES,
        ),
        "B": PublishedModel(
            "hustvl/Vim-base-midclstok",
            {"flops_reduction": 0.3, "method": "top"},
            (
                PublishedResult("dense", R_MEETO, 81.9),
                PublishedResult("token merging, retrained", R_MEETO, 81.3, "13.21 G"),
                PublishedResult("dynamic pruning", DYVM, 79.9),
            ),
        ),
    }
    paper: ClassVar[Paper] = Paper(
        name="Vim",
        title="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        arxiv="2401.09417",
        citation="""@inproceedings{zhu2024vim,
  title     = {Vision {Mamba}: Efficient Visual Representation Learning with Bidirectional State Space Model},
  author    = {Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}""",
        repository="https://github.com/hustvl/Vim",
        flops_convention="linear layers, convolutions and one of the two scan directions",
    )
    cls_token: ClassVar[str] = "middle"
    averages_directions: ClassVar[bool] = True

    use_cls_token: bool = True
    rotary_embeddings: bool = False

    def _check_sizes(self) -> None:
        super()._check_sizes()
        if self.rotary_embeddings and (self.use_cls_token or self.hidden_size % 4):
            raise ValueError(
                f"`rotary_embeddings` with `use_cls_token={self.use_cls_token}` and "
                f"`hidden_size={self.hidden_size}`: rotary embeddings need `use_cls_token=False` and a `hidden_size` "
                "that is a multiple of 4, because a class token has no position on the grid, and the channels of "
                "each axis are rotated in pairs."
            )

    @property
    def rotates_tokens(self) -> bool:  # type: ignore[override]
        return self.rotary_embeddings

    def cls_token_id(self, num_patches: int) -> int | None:
        return super().cls_token_id(num_patches) if self.use_cls_token else None

    def count_flops(
        self, input_size: tuple[int, ...], tokens: Sequence[int], scan_shares: Sequence[float] | None = None
    ) -> FlopCount:
        """See `BidirectionalConfig.count_flops`. The published figures count one of the two directions."""
        parts, one_direction = self._count_parts(tokens, self.patch_size**2, scan_shares)
        return FlopCount.of_parts(parts, unpublished=one_direction)


__all__ = ["VimConfig"]

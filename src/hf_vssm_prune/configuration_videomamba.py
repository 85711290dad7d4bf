"""VideoMamba's configuration."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bidirectional import BidirectionalConfig
from .configuration_common import VisionMambaConfig
from .flops import FlopCount
from .publication import Paper


# Of the official code, whatever the patch size. Patches of a video never overlap.
IMAGE_PATCH_STRIDE = 16
FLOPS_PER_NORMALIZED_VALUE = 5  # in the published figures


@strict
class VideoMambaConfig(BidirectionalConfig):
    """Configuration of VideoMamba (arXiv 2403.06977), with token pruning (ToP, arXiv 2409.18962).

    The options of every vision Mamba stand in `VisionMambaConfig`, one more in `BidirectionalConfig`.

    Args:
        num_frames: of a video, for which the temporal embeddings are laid out. Other numbers work too. None: the model
            is one of images.
        tubelet_size: frames that a patch spans; those after the last whole tubelet are left out.
        patch_stride: pixels from one patch to the next. None: of images 16, whatever `patch_size` is, as in the
            official code; of videos `patch_size`, and nothing else is allowed.

    Example:

    ```python
    >>> from hf_vssm_prune import VideoMambaConfig, VideoMambaForVideoClassification

    >>> config = VideoMambaConfig.from_preset("Ti", num_frames=16, token_pruning={"flops_reduction": 0.416})
    >>> model = VideoMambaForVideoClassification(config)
    ```
    """

    model_type = "videomamba"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Ti": {"hidden_size": 192},
        "S": {"hidden_size": 384},
        "M": {"hidden_size": 576, "num_hidden_layers": 32},
        "B": {"hidden_size": 768, "num_frames": None},  # published for images only
    }
    paper: ClassVar[Paper] = Paper(
        name="VideoMamba",
        title="VideoMamba: State Space Model for Efficient Video Understanding",
        arxiv="2403.06977",
        citation="""@inproceedings{li2024videomamba,
  title     = {{VideoMamba}: State Space Model for Efficient Video Understanding},
  author    = {Li, Kunchang and Li, Xinhao and Wang, Yi and He, Yinan and Wang, Yali and Wang, Limin and Qiao, Yu},
  booktitle = {European Conference on Computer Vision},
  year      = {2024}
}""",
        repository="https://github.com/OpenGVLab/VideoMamba",
        flops_convention="linear projections between hidden size and mixer, the head and norms, neither the mixers' "
        "convolutions and time steps nor their scans",
    )
    cls_token: ClassVar[str] = "first"
    averages_directions: ClassVar[bool] = False

    num_frames: int | None = 8
    tubelet_size: int = 1

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> VisionMambaConfig:
        """The configuration of a published model by name, with `overrides` put over it.

        That of a video model has the 400 labels of Kinetics-400, that of an image model the 1,000 of ImageNet-1k.
        """
        options = {**cls.presets.get(name, {}), **overrides}
        if options.get("num_frames", cls.num_frames) is not None and not {"id2label", "label2id"} & overrides.keys():
            overrides = {"num_labels": 400, **overrides}
        return super().from_preset(name, **overrides)

    def _check_sizes(self) -> None:
        is_video = self.num_frames is not None
        self._check_whole_number("tubelet_size", least=1)
        if self.patch_stride is None:
            self.patch_stride = self.patch_size if is_video else IMAGE_PATCH_STRIDE
        if is_video:
            self._check_whole_number("num_frames", least=self.tubelet_size)
            if self.patch_stride != self.patch_size:
                raise ValueError(
                    f"`patch_stride` is {self.patch_stride} and `patch_size` {self.patch_size}; those of a video are "
                    "the same. `num_frames=None` makes a model of images."
                )
        super()._check_sizes()

    def input_size_for(self, image_size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
        """The size of an input whose images have another size, as `image_size` gives it."""
        height_width = self.image_height_width(image_size)
        return height_width if self.num_frames is None else (self.num_frames, *height_width)

    def grid_size_for(self, *input_size: int) -> tuple[int, ...]:
        """(height, width) in patches, of a video (time, height, width): what fills no whole patch is left out."""
        *frames, height, width = input_size
        return (*(count // self.tubelet_size for count in frames), *super().grid_size_for(height, width))

    def count_flops(self, input_size: tuple[int, ...], tokens: Sequence[int]) -> FlopCount:
        """See `VisionMambaConfig.count_flops`. The published figures count norms, and neither convolutions nor scans:
        the tool that counted them, fvcore, does not look into the mixers' kernel."""
        tubelet = 1 if self.num_frames is None else self.tubelet_size
        parts, one_direction = self._count_parts(tokens, tubelet * self.patch_size**2)
        lengths = [patches + 1 for patches in (*tokens, tokens[-1])]  # with the class token, and the last norm
        norms = FLOPS_PER_NORMALIZED_VALUE * sum(lengths) * self.hidden_size
        return FlopCount.of_parts(parts, unpublished=self.num_scans * one_direction - norms)


__all__ = ["VideoMambaConfig"]

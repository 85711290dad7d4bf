"""VideoMamba's configuration."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_bidirectional import BidirectionalConfig
from .configuration_common import VisionMambaConfig
from .flops import FlopCount
from .publication import R_MEETO, VIDEOMAMBA, Paper, PublishedModel, PublishedResult


# As in the official code, regardless of the patch size. Patches of videos never overlap.
IMAGE_PATCH_STRIDE = 16
FLOPS_PER_NORMALIZED_VALUE = 5  # in the published figures
# Inputs of the published models, as options of the configuration.
VIDEO_SIZES = {
    **{f"{frames} frames": {"num_frames": frames} for frames in (8, 16, 32, 64)},
    "64 frames, 384 × 384": {"num_frames": 64, "image_size": 384},
}
IMAGE_SIZES = (224, 448, 576)


def _merged(inputs: str, top1: float, flops: str) -> PublishedResult:
    """R-MeeTo's result. Its FLOPs include more than those of VideoMamba's authors: a merged Ti has more than a
    dense one."""
    return PublishedResult(f"token merging, retrained{inputs}", R_MEETO, top1, f"{flops} (counted differently)")


def _of_videos(
    top1: Sequence[float], flops: Sequence[str], merged: tuple[float, str], masked: Sequence[float] = ()
) -> PublishedModel:
    """Results reported in papers on Kinetics-400: top-1 with 8, 16, 32 and 64 frames and with 64 frames of 384 pixels,
    and FLOPs per view for the inputs for which they are reported."""
    stated = dict(zip(("16 frames", "32 frames", "64 frames, 384 × 384"), flops, strict=True))
    rows = [("dense", top1), ("dense, pretrained by masking", masked)]
    return PublishedModel(
        "OpenGVLab/VideoMamba",
        {"flops_reduction": 0.3, "method": "top"},
        (
            *(
                PublishedResult(f"{method}, {size}", VIDEOMAMBA, value, stated.get(size))
                for method, values in rows
                for size, value in zip(VIDEO_SIZES, values, strict=False)
            ),
            _merged(", 8 frames", *merged),
        ),
        "Kinetics-400, 3 crops of 4 clips; multiply-adds of one view",
        "Kinetics-400",
        sizes=tuple(VIDEO_SIZES.values()),
    )


def _of_images(results: Sequence[tuple[float, str]], merged: tuple[float, str] | None) -> PublishedModel:
    """Results reported in papers on ImageNet-1k: top-1 and FLOPs at 224, 448 and 576 pixels."""
    at_sizes = zip(IMAGE_SIZES, results, strict=True)
    rows = [PublishedResult(f"dense, {size} × {size}", VIDEOMAMBA, *result) for size, result in at_sizes]
    rows += [] if merged is None else [_merged("", *merged)]
    schedule = {"flops_reduction": 0.3, "method": "top"}
    sizes = tuple({"image_size": size} for size in IMAGE_SIZES)
    return PublishedModel("OpenGVLab/VideoMamba", schedule, tuple(rows), options={"num_frames": None}, sizes=sizes)


@strict
class VideoMambaConfig(BidirectionalConfig):
    """Configuration of VideoMamba (arXiv 2403.06977), with token pruning (ToP, arXiv 2409.18962).

    See `VisionMambaConfig` and `BidirectionalConfig` for the options that it shares with other vision Mambas.

    Args:
        num_frames: number of frames in a video, and size of the temporal embeddings. Other numbers work too. None: an
            image model.
        tubelet_size: frames per patch; frames after the last whole tubelet are dropped.
        patch_stride: distance between patches in pixels. None: for images 16, regardless of `patch_size`, as in the
            official code; for videos `patch_size`, which is the only allowed value.

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
    published: ClassVar[dict[str, PublishedModel]] = {
        "Ti": _of_videos((76.9, 78.1, 78.8, 79.6, 80.3), ("17 G", "34 G", "202 G"), (76.5, "9.44 G")),
        "S": _of_videos((79.3, 80.8, 81.5, 81.8, 82.7), ("68 G", "135 G", "395 G"), (78.5, "30.99 G")),
        "M": _of_videos(
            (80.6, 81.9, 82.4, 82.8, 83.3),
            ("202 G", "403 G", "2368 G"),
            (78.9, "67.11 G"),
            masked=(82.0, 83.4, 83.9, 84.3, 85.0),
        ),
    }
    published_images: ClassVar[dict[str, PublishedModel]] = {
        "Ti": _of_images([(76.9, "1.1 G"), (79.3, "4.3 G"), (79.6, "7.1 G")], (75.9, "1.28 G")),
        "S": _of_images([(81.2, "4.3 G"), (83.2, "16.9 G"), (83.5, "28.0 G")], (80.1, "3.58 G")),
        "M": _of_images([(82.8, "12.7 G"), (83.8, "50.4 G"), (84.0, "83.1 G")], None),
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
        """The configuration of a published model by name; `overrides` replace options.

        Video models have the 400 labels of Kinetics-400, image models the 1,000 of ImageNet-1k.
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
                    f"`patch_stride` is {self.patch_stride} and `patch_size` {self.patch_size}; for a video model, "
                    "they must be equal. `num_frames=None` makes an image model."
                )
        super()._check_sizes()

    @property
    def frame_spacing(self) -> int:
        """Distance between the patches of a video in time, in frames."""
        return self.tubelet_size

    def input_size_for(self, image_size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
        """The input size for another image size, given in the form of `image_size`; for videos also as (frames, height,
        width)."""
        if self.num_frames is None:
            return self.image_height_width(image_size)
        if isinstance(image_size, int) or len(image_size) != 3:
            return (self.num_frames, *self.image_height_width(image_size))
        return (image_size[0], *self.image_height_width(image_size[1:]))

    def grid_size_for(self, *input_size: int) -> tuple[int, ...]:
        """(height, width) in patches; for videos, (time, height, width). Incomplete patches are ignored."""
        *frames, height, width = input_size
        return (*(count // self.tubelet_size for count in frames), *super().grid_size_for(height, width))

    def count_flops(
        self, input_size: tuple[int, ...], tokens: Sequence[int], scan_shares: Sequence[float] | None = None
    ) -> FlopCount:
        """See `BidirectionalConfig.count_flops`. The published figures include norms but nothing of the two directions,
        because fvcore, with which they were counted, does not look inside the mixers' kernel."""
        tubelet = 1 if self.num_frames is None else self.tubelet_size
        parts, one_direction = self._count_parts(tokens, tubelet * self.patch_size**2, scan_shares)
        lengths = [patches + 1 for patches in (*tokens, tokens[-1])]  # with the class token, and the last norm
        norms = FLOPS_PER_NORMALIZED_VALUE * sum(lengths) * self.hidden_size
        return FlopCount.of_parts(parts, unpublished=self.num_scans * one_direction - norms)


__all__ = ["VideoMambaConfig"]

"""Converts a published checkpoint to a Hugging Face folder, and such a folder back to a checkpoint.

    hf-vssm-prune convert vim_s.pth models/vim-s --id2label imagenet_labels.json
    hf-vssm-prune convert models/vim-s vim_s.safetensors

A source file is converted to a folder, and a source folder to a file; tensors are renamed, never changed. Sizes are
inferred from the tensors. mmsegmentation's PlainMamba with UPerNet becomes transformers' UPerNet. Existing files are
not overwritten.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_vssm_prune import count_flops
from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.configuration_common import has_head, pruned_config
from hf_vssm_prune.conversion import CHECKPOINT_SUFFIXES, load_official_model, save_official_model
from hf_vssm_prune.families import FAMILIES, ImageClassifier
from hf_vssm_prune.hub import ModelCardInfo, save_for_hub
from hf_vssm_prune.hub.loading import load_any_model, new_image_processor
from hf_vssm_prune.hub.model_card import format_flops
from hf_vssm_prune.training.labels import name_labels, read_label_file
from hf_vssm_prune.training.segmentation_models import segmentation_processor


SHORT_SIDE = 512  # in pixels, as in the evaluation of segmentation models on ADE20K


@one_line_errors()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    if options.target.exists() and not is_empty_folder(options.target):
        raise FileExistsError(
            f"{options.target} already exists and will not be overwritten: remove it, or choose another target."
        )
    if options.source.is_dir():
        # All options are for checkpoint files.
        values = {name: value for name, value in vars(options).items() if name not in ("source", "target")}
        if given := [f"--{name}" for name, value in values.items() if value != parser.get_default(name)]:
            raise ValueError(
                f"{options.source} is a folder, and {', '.join(given)} can only be used with checkpoint files."
            )
        model = to_checkpoint(options)
    else:
        if options.target.suffix in CHECKPOINT_SUFFIXES:
            raise ValueError(f"{options.target} would be a folder: a checkpoint file is converted to a folder.")
        model = to_folder(options)
    print(summary(model))
    print(f"saved to {options.target}")
    return 0


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="a .pth or .safetensors checkpoint, or a Hugging Face folder")
    parser.add_argument("target", type=Path, help="the folder, or the .pth or .safetensors file, to write")
    group = parser.add_argument_group("from a checkpoint to a folder")
    group.add_argument(
        "--family", choices=FAMILIES, help="model family, if the tensor names fit several; default: inferred"
    )
    group.add_argument("--ema", action="store_true", help="convert the averaged (EMA) weights")
    group.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="image size: one number, or height and width; default: square",
    )
    group.add_argument(
        "--patch_stride",
        type=int,
        help="distance between patches; default: inferred for images of 224 pixels or --image_size",
    )
    group.add_argument(
        "--num_frames", type=int, help="number of frames for VideoMamba; converts an image model to a video model"
    )
    group.add_argument(
        "--id2label",
        type=Path,
        help="label names: JSON (list or dict), or text with one name per line; default: those in the checkpoint",
    )
    # All families were evaluated with ImageNet's statistics, after bicubic resizing of the shorter edge to 256.
    group.add_argument("--image_mean", type=float, nargs="+", help="mean of each channel; default: ImageNet's")
    group.add_argument(
        "--image_std", type=float, nargs="+", help="standard deviation of each channel; default: ImageNet's"
    )
    group.add_argument(
        "--crop_pct", type=float, help="center crop as a fraction of the resized image; default: 0.875, or 1 for videos"
    )
    return parser


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def to_folder(options: argparse.Namespace) -> ImageClassifier:
    overrides: dict[str, Any] = {}
    if options.image_size is not None:
        overrides["image_size"] = options.image_size[0] if len(options.image_size) == 1 else options.image_size
    if options.patch_stride is not None:
        overrides["patch_stride"] = options.patch_stride
    if options.num_frames is not None:
        overrides["num_frames"] = options.num_frames
    model = load_with_labels(options, overrides)
    backbone = pruned_config(model.config)
    if has_head(model.config) and options.crop_pct is not None:
        raise ValueError("--crop_pct is for classifiers; segmentation models see whole images.")
    processor = new_image_processor(backbone, options.image_mean, options.image_std, options.crop_pct)
    if has_head(model.config):
        processor = segmentation_processor(processor, SHORT_SIDE)
    card = ModelCardInfo(name=options.target.resolve().name, original_weights=options.source.name)
    save_for_hub(model, options.target, processor, card)
    return model


def to_checkpoint(options: argparse.Namespace) -> ImageClassifier:
    model = load_any_model(options.source)
    save_official_model(model, options.target)
    return model


def load_with_labels(options: argparse.Namespace, overrides: dict[str, Any]) -> ImageClassifier:
    """The file's model. If the file has no classifier, the new one has as many labels as `--id2label` names."""
    load = partial(load_official_model, options.source, options.ema, options.family, **overrides)
    if options.id2label is None:
        return load()
    names = read_label_file(options.id2label)
    try:
        model = load(num_labels=len(names))
    except ValueError:  # it has another number of labels, or a head of another kind
        model = load()
    if len(names) != model.config.num_labels:
        raise ValueError(f"{options.id2label} names {len(names)} labels; the checkpoint has {model.config.num_labels}.")
    name_labels(model.config, names)
    return model


def summary(model: ImageClassifier) -> str:
    config, flops = pruned_config(model.config), count_flops(model.config).dense
    head = f"{model.config.model_type} on " if has_head(model.config) else ""
    *frames, height, width = config.input_size
    inputs = f"videos of {frames[0]} frames of" if frames else "images of"
    patches = " x ".join(map(str, config.grid_size))
    return (
        f"{head}{config.model_type}: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {inputs} "
        f"{height} x {width} pixels as {patches} patches, {model.config.num_labels} labels\n"
        f"{model.num_parameters():,} parameters, {format_flops(flops.published)} FLOPs "
        f"({format_flops(flops.total)} with all scans counted)"
    )

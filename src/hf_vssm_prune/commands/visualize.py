"""Draws the tokens that a pruned model keeps at each stage, for images or videos.

hf-vssm-prune visualize image.jpg ...          # with the package's example model
hf-vssm-prune visualize image.jpg ... --model_name_or_path <folder or Hub model> --importance
hf-vssm-prune visualize video.mp4 --model_name_or_path <video model> --output kept_tokens.webp
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vssm_prune import EXAMPLE_MODEL, visualize
from hf_vssm_prune.animation import FORMATS, animate
from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head, pruned_config
from hf_vssm_prune.hub.loading import load_any_model, load_image_processor
from hf_vssm_prune.publication import TOP_REDUCTION
from hf_vssm_prune.training.arguments.parsing import check_output_file
from hf_vssm_prune.training.frame_sampling import SAMPLINGS
from hf_vssm_prune.training.image_steps import decode_image
from hf_vssm_prune.training.video_decoding import read_clip
from hf_vssm_prune.visualization_of_heads import visualize_dense


DEFAULT_SAMPLING = "uniform"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("files", nargs="+", help="image files, or videos for a video model")
    parser.add_argument(
        "--model_name_or_path",
        default=str(EXAMPLE_MODEL),
        help="a classifier, a segmentation model or a detector, in a folder or on the Hub (default: the example model)",
    )
    parser.add_argument(
        "--flops_reduction",
        type=float,
        help=f"FLOPs reduction (default: the model's own schedule, or {TOP_REDUCTION} for a dense model)",
    )
    parser.add_argument("--importance", action="store_true", help="also draw the importance of the tokens")
    parser.add_argument(
        "--frame_sampling",
        choices=SAMPLINGS,
        help=f"how frames of a video are sampled (default: {DEFAULT_SAMPLING})",
    )
    parser.add_argument(
        "--output",
        default="kept_tokens.png",
        help="output file; .gif and .webp of one video are animated (default: %(default)s)",
    )
    return parser


@one_line_errors()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    check_output_file("output", options.output)
    model = load_any_model(options.model_name_or_path)
    config = pruned_config(model.config)
    if config.modality != "video" and options.frame_sampling is not None:
        raise ValueError(f"--frame_sampling is for videos; {options.model_name_or_path} is a model for images.")
    if options.flops_reduction is not None:
        model.set_token_pruning({"flops_reduction": options.flops_reduction})
    elif config.token_pruning is None:
        model.set_token_pruning({"flops_reduction": TOP_REDUCTION})
    image_processor = load_image_processor(options.model_name_or_path)
    inputs: list[Any] = [read_input(file, config, options.frame_sampling or DEFAULT_SAMPLING) for file in options.files]
    if config.modality == "video" and Path(options.output).suffix.lower() in FORMATS:
        if len(inputs) > 1 or options.importance:
            raise ValueError(f"--output {options.output}: an animation shows one video, without importance.")
        animate(model, image_processor, inputs[0], options.output)
    else:
        draw = visualize_dense if has_head(model.config) else visualize
        draw(model, image_processor, inputs, options.importance).save(options.output)
    print(options.output)
    return 0


def read_input(file: str, config: VisionMambaConfig, sampling: str) -> Any:
    """Reads an image, or the frames of a clip as a list, with the number of channels that the model expects."""
    mode = "L" if config.num_channels == 1 else "RGB"
    if config.modality == "image":
        return decode_image({"bytes": None, "path": file}, mode, file)
    return read_clip(file, config.input_size[0], sampling, mode)

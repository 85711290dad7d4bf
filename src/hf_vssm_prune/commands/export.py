"""Exports a dense or pruned classifier to files that run without this package.

    hf-vssm-prune export runs/pruned/best exported
    hf-vssm-prune export user/plainmamba-l1 exported --flops_reduction 0.416 --formats onnx torch aotinductor

Each file is run and compared with the model before it is kept. docs/export.md shows how to use each format.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.export import FORMATS, export_classifier
from hf_vssm_prune.hub.loading import load_classifier, load_image_processor


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("model", help="a classifier, in a folder or on the Hub")
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx"], help="file formats (default: onnx)")
    parser.add_argument(
        "--flops_reduction", type=float, help="fraction of FLOPs to remove, with the model's pruning method"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    return parser


@one_line_errors(ImportError, RuntimeError)
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    model = load_classifier(options.model, revision=options.revision, dtype=torch.float32)
    if options.flops_reduction is not None:
        model.set_token_pruning({"flops_reduction": options.flops_reduction})
    image_processor = load_image_processor(options.model, revision=options.revision)
    folder = export_classifier(model, options.folder, options.formats, image_processor)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>12,}  {file}")
    return 0

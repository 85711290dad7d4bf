"""Writes the model card of a saved model, with the results of an evaluation.

    hf-vssm-prune evaluate --model_name_or_path runs/pruned/best --dataset_name ... --json results.json
    hf-vssm-prune visualize image.png --model_name_or_path runs/pruned/best --output kept_tokens.png
    hf-vssm-prune write_card runs/pruned/best card.yaml

The format of the YAML file is described in `hf_vssm_prune.hub.model_card_file`; `model_cards/` in the repository has
examples.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_any_model, load_image_processor
from hf_vssm_prune.hub.model_card_file import read_model_card_info
from hf_vssm_prune.hub.saving import CARD


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("folder", type=Path, help="folder written by a training run or `save_for_hub`")
    parser.add_argument("card", type=Path, help="YAML file of the card")
    return parser


@one_line_errors()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(arguments)
    if not options.folder.is_dir():
        raise NotADirectoryError(f"{options.folder} is not a folder.")
    info = read_model_card_info(options.card)
    processor = load_image_processor(options.folder)
    save_for_hub(load_any_model(options.folder), options.folder, processor, info)
    print(options.folder / CARD)
    return 0

"""Measures how fast the scan, the convolution and whole models are on this machine, compared with named baselines.

    python scripts/benchmark.py                                   # all sections with PlainMamba-L3, a few minutes
    python scripts/benchmark.py --sections model --preset L1 --batch_sizes 1 --json benchmark.json
    python scripts/benchmark.py --device cuda --batch_sizes 1 8 64

The cases of a group run alternately, so that a slow phase of the machine affects all of them. Ratios compare the
minimum times of two cases in the same group, never of two groups; next to each is the median of the ratios of
individual turns.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_vssm_prune import PlainMambaConfig  # first: it chooses how idle threads wait, which torch reads when loaded


# isort: split
import torch
from benchmarking.bf16 import bf16_section
from benchmarking.blocks import blocks_section
from benchmarking.budgets import budgets_section
from benchmarking.busy import busy_section
from benchmarking.calls import calls_section
from benchmarking.earlier import earlier_kernels_section, earlier_section
from benchmarking.exported import export_section
from benchmarking.heads import heads_section
from benchmarking.int8 import int8_section
from benchmarking.measuring import Group, describe_machine, make_tensors_on
from benchmarking.models import model_section, parts_section, resolution_section, transformer_section
from benchmarking.peers import peers_section
from benchmarking.roofline import roofline_section
from benchmarking.scan import convolution_section, scan_section
from benchmarking.training import training_section
from benchmarking.videos import video_section

from hf_vssm_prune.export import FORMATS
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.training.arguments.parsing import check_output_file, count
from hf_vssm_prune.training.atomic_files import write_json


SECTIONS = {
    "scan": scan_section,
    "convolution": convolution_section,
    "roofline": roofline_section,
    "model": model_section,
    "blocks": blocks_section,
    "budgets": budgets_section,
    "parts": parts_section,
    "training": training_section,
    "transformer": transformer_section,
    "resolution": resolution_section,
    "bf16": bf16_section,
    "calls": calls_section,
    "int8": int8_section,
    "export": export_section,
    "video": video_section,
    "heads": heads_section,
    "busy": busy_section,
    "peers": peers_section,
    "earlier": earlier_section,
    "earlier_kernels": earlier_kernels_section,
}
# These run only if they are named.
LONG_SECTIONS = ("bf16", "calls", "int8", "export", "video", "heads", "busy", "peers", "earlier", "earlier_kernels")

CPU_SECTIONS = ("roofline", "parts", "bf16", "calls", "int8", "export", "busy", "peers", "earlier", "earlier_kernels")
PLAINMAMBA_SECTIONS = ("blocks", "heads", "earlier")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    make_tensors_on(options.device)
    machine = describe_machine(options.device)
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    results: list[dict[str, Any]] = []
    for section in options.sections:
        results += [as_json(group) for group in SECTIONS[section](options)]
        if options.json is not None:  # now, in case that a later section fails
            write_json({"machine": machine, "groups": results}, Path(options.json))
    return 0


def as_json(group: Group) -> dict[str, Any]:
    ratios = {name: dict(zip(("fastest", "median"), group.ratio(name), strict=True)) for name in group.ratios}
    return {**asdict(group), "ratios": ratios}


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        help=f"sections to run (default: all for this device and family except {', '.join(LONG_SECTIONS)})",
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=["onnx", "torch"], help="formats of exported models"
    )
    parser.add_argument("--family", choices=FAMILIES, default="plainmamba", help="default: %(default)s")
    parser.add_argument("--preset", default="L3", help="size of the whole models (default: %(default)s)")
    parser.add_argument("--flops_reduction", type=float, default=0.415, help="default: %(default)s")
    parser.add_argument("--batch_sizes", type=count, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="time for each group of cases (default: %(default)s)")
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path("build/peers"),
        help="folder in which other projects are installed for the section `peers` (default: %(default)s)",
    )
    parser.add_argument(
        "--earlier", type=Path, help="folder of another checkout, which the sections `earlier…` compare with this one"
    )
    parser.add_argument("--plot", help="file for a plot of time against the budget (needs matplotlib)")
    parser.add_argument("--json", help="file to write all runs and ratios to")
    options = parser.parse_args(arguments)
    try:
        torch.device(options.device)
        check_output_file("plot", options.plot)
        check_output_file("json", options.json)
    except (RuntimeError, ValueError) as error:
        parser.error(f"--device {options.device}: {error}" if isinstance(error, RuntimeError) else str(error))
    presets = list(FAMILIES[options.family].config.presets)
    if options.preset not in presets:
        parser.error(f"--preset {options.preset}: {options.family} has {presets}.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here.")
    on_cpu, of_plainmamba = torch.device(options.device).type == "cpu", options.family == PlainMambaConfig.model_type
    possible = [
        name
        for name in SECTIONS
        if (name not in CPU_SECTIONS or on_cpu) and (name not in PLAINMAMBA_SECTIONS or of_plainmamba)
    ]
    options.sections = options.sections or [name for name in possible if name not in LONG_SECTIONS]
    if others := [name for name in options.sections if name not in possible]:
        parser.error(f"--sections {' '.join(others)}: not for {options.family} on {options.device}.")
    is_checkout = options.earlier is not None and (options.earlier / "src" / "hf_vssm_prune").is_dir()
    if not is_checkout and (section := next((name for name in options.sections if name.startswith("earlier")), None)):
        parser.error(
            f"--earlier {options.earlier}: the section `{section}` needs the folder of a checkout, made by "
            "`git worktree add FOLDER COMMIT`."
        )
    return options


if __name__ == "__main__":
    sys.exit(main())

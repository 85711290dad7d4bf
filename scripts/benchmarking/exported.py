"""Exported models compared with eager mode."""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarking.blocks import by_backend
from benchmarking.measuring import Case, Group, take_turns
from benchmarking.models import make_models, random_inputs
from hf_vssm_prune.export import FORMATS, export_classifier


@torch.no_grad()
def export_section(options: argparse.Namespace) -> list[Group]:
    """The formats of `scripts/export.py` compared with eager mode, with and without kernels."""
    models = make_models(options)
    eager = {name: models[name] for name in ("dense", "pruned, aligned")}
    exported: dict[str, Callable[[Tensor], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in eager.items():
            start = time.perf_counter()
            folder = export_classifier(model, Path(scratch) / name, options.formats)
            print(f"{name}: exported in {time.perf_counter() - start:.0f} s")
            for kind in options.formats:
                file = folder / FORMATS[kind].file
                print(f"{file.relative_to(scratch)}: {file.stat().st_size:,} bytes", flush=True)
                exported[f"{name}, {kind}"] = FORMATS[kind].load(file, options.threads)
        groups = []
        for batch in options.batch_sizes:
            images = random_inputs(models["dense"], batch)
            cases: dict[str, Case] = {}
            ratios = {}
            for name, model in eager.items():
                cases[f"{name}, eager"] = partial(model, images)
                cases[f"{name}, eager without kernels"] = partial(by_backend, "torch", model, partial(model, images))
                for kind in options.formats:
                    cases[f"{name}, {kind}"] = partial(exported[f"{name}, {kind}"], images)
                    for other in ("eager", "eager without kernels"):
                        ratios[f"{name}: {other} / {kind}"] = (1.0, f"{name}, {other}", f"{name}, {kind}")
            for kind in options.formats:
                ratios[f"{kind}: dense / pruned"] = (1.0, f"dense, {kind}", f"pruned, aligned, {kind}")
            title = f"{options.family} {options.preset}, exported, batch {batch}"
            groups.append(take_turns(title, cases, ratios, options))
    return groups

"""One model with increasing budgets."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarking.measuring import Case, Group, take_turns
from benchmarking.models import random_inputs
from hf_vssm_prune import count_flops
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.pruning_methods import PAPERS_METHOD


@torch.no_grad()
def budgets_section(options: argparse.Namespace) -> list[Group]:
    """One model with increasing budgets and the paper's method: does the time follow the FLOPs? `--plot` draws it."""
    family = FAMILIES[options.family]
    dense = family.classifier(family.config.from_preset(options.preset)).eval()
    models, shares = {"dense": dense}, {"dense": 1.0}
    for reduction in (0.2, 0.3, 0.416, 0.5, 0.6):
        name = f"{reduction:.1%} fewer FLOPs"
        schedule = {"flops_reduction": reduction, "method": PAPERS_METHOD}
        config = family.config.from_preset(options.preset, token_pruning=schedule)
        models[name] = family.classifier(config).eval()
        models[name].load_state_dict(dense.state_dict())
        shares[name] = 1 - count_flops(config).reduction
    groups = []
    for batch in options.batch_sizes:
        images = random_inputs(dense, batch)
        cases: dict[str, Case] = {name: partial(model, images) for name, model in models.items()}
        ratios = {
            f"dense / {name} (FLOPs: {1 / shares[name]:.2f})": (1.0, "dense", name)
            for name in models
            if name != "dense"
        }
        title = f"{options.family} {options.preset} at growing budgets, batch {batch}"
        groups.append(take_turns(title, cases, ratios, options, images=batch))
    if options.plot is not None:
        plot_budgets(groups, shares, Path(options.plot))
    return groups


def plot_budgets(groups: Sequence[Group], shares: dict[str, float], path: Path) -> None:
    """Time against FLOPs, both as fractions of the dense model's. If time is proportional to FLOPs, points are on the
    diagonal."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 4), layout="constrained").subplots()
    axes.plot([0.35, 1], [0.35, 1], color="0.7", linestyle="--", label="time falls as FLOPs do")
    for group in groups:
        dense = min(group.seconds["dense"])
        times = [min(group.seconds[name]) / dense for name in shares]
        axes.plot(list(shares.values()), times, marker="o", label=f"batch {group.images}")
    axes.set(xlabel="FLOPs, share of the dense model's", ylabel="time, share of the dense model's")
    axes.set_title(groups[0].title.partition(" at ")[0])
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    axes.figure.savefig(temporary, dpi=150)
    temporary.replace(path)

"""The layers of a model, without stem and head."""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarking.baselines import reference_kernel, registered
from benchmarking.measuring import Case, Group, take_turns, with_threads
from benchmarking.scan import GRID, LENGTH
from hf_vssm_prune import PlainMambaConfig, PlainMambaForImageClassification
from hf_vssm_prune.modeling_common import TimeStepProjection
from hf_vssm_prune.modeling_plainmamba import PlainMambaTokenLayout
from hf_vssm_prune.pruned_layers import encode


@torch.no_grad()
def blocks_section(options: argparse.Namespace) -> list[Group]:
    """The layers of a PlainMamba without stem and head: as published, ours, and only their matrix products."""
    config = PlainMambaConfig.from_preset(options.preset)
    model = PlainMambaForImageClassification(config).eval().plainmamba
    groups = []
    for batch in options.batch_sizes:
        tokens = torch.randn(batch, LENGTH, config.hidden_size)
        layers = partial(run_layers, model, tokens)
        cases: dict[str, Case] = {
            "ours": layers,
            "ours, one thread": with_threads(1, layers),
            "scans by mamba-ssm's reference": partial(by_reference, model, layers),
            "scans by mamba-ssm's reference, one thread": with_threads(1, partial(by_reference, model, layers)),
            "matrix products": matrix_products(model.layers, layers),
        }
        ratios = {
            "mamba-ssm's reference / ours": (1.0, "scans by mamba-ssm's reference", "ours"),
            "the same, one thread": (1.0, "scans by mamba-ssm's reference, one thread", "ours, one thread"),
            "ours / its matrix products": (1.0, "ours", "matrix products"),
        }
        title = f"plainmamba {options.preset}, layers without stem and head, forward, batch {batch}"
        groups.append(take_turns(title, cases, ratios, options))
    return groups


def run_layers(model: nn.Module, tokens: Tensor) -> Tensor:
    layout = PlainMambaTokenLayout.of_grid(GRID, tokens.device)
    return encode(model.layers, model.token_predictors, tokens, layout, None).hidden_states


def by_reference(model: nn.Module, case: Case) -> None:
    with registered("reference", reference_kernel()):
        by_backend("reference", model, case)


def by_backend(name: str, model: nn.Module, case: Case) -> None:
    model.config.scan_backend = name
    try:
        case()
    finally:
        model.config.scan_backend = "auto"


def matrix_products(layers: nn.Module, run: Case) -> Case:
    """Only the linear projections called by `run`, each once with an input of the same shape."""
    shapes: list[tuple[Tensor, torch.Size]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, _: shapes.append((module.weight, inputs[0].shape)))
        for module in layers.modules()
        if isinstance(module, nn.Linear | TimeStepProjection)
    ]
    run()
    for handle in handles:
        handle.remove()
    inputs = {shape: torch.randn(shape) for _, shape in shapes}
    return lambda: [F.linear(inputs[shape], weight) for weight, shape in shapes]

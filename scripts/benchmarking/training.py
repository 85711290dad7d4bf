"""Training steps: their time, and the memory that they keep for the backward pass."""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarking.measuring import Case, Group, growth, take_turns
from benchmarking.models import make_models, random_inputs, random_labels
from hf_vssm_prune.pruning_methods import RECOMMENDED_METHOD


def training_section(options: argparse.Namespace) -> list[Group]:
    models = make_models(options)
    batch = options.batch_sizes[-1]
    images, labels = random_inputs(models["dense"], batch), random_labels(models["dense"], batch)

    def step(model: nn.Module) -> Case:
        def run() -> None:
            model.zero_grad()
            model(images, labels=labels).loss.backward()

        return run

    cases = {name: step(model.train()) for name, model in models.items()}
    ratios = {
        "dense / pruned": (1.0, "dense", "pruned, aligned"),
        "aligned / naive": (1.0, "pruned, aligned", "pruned, naive"),
        f"dense / pruned by {RECOMMENDED_METHOD}": (1.0, "dense", f"pruned, {RECOMMENDED_METHOD}"),
    }
    for name, case in cases.items():
        report_memory(models[name], name, case)
    title = f"{options.family} {options.preset}, forward and backward, batch {batch}"
    return [take_turns(title, cases, ratios, options, images=batch)]


def report_memory(model: nn.Module, name: str, step: Case) -> None:
    """Prints the memory that a training step keeps for its backward pass, compared with the inputs and outputs of its
    matrix products."""
    products: dict[int, Tensor] = {}  # keeps the tensors, so that no address is reused

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        for tensor in (inputs[0], output[0] if isinstance(output, tuple) else output):
            products[tensor.data_ptr()] = tensor.detach()

    handles = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    step()
    for handle in handles:
        handle.remove()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in products.values())
    products.clear()

    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    total = sum(kept.values())
    line = (
        f"{name}: {total / 2**20:.0f} MiB are kept for the backward, {total / needed:.2f} times the inputs and outputs "
    )
    print(f"{line}of the matrix products ({needed / 2**20:.0f} MiB); {growth(step)}", flush=True)

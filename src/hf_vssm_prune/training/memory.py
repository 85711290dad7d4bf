"""Measures the peak memory of a computation, and reduces it by activation checkpointing."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The peak number of bytes in tensors during `work`, in addition to those allocated before.

    On a GPU, the allocator counts them. On a CPU, torch's profiler records every allocation, except for memory that C++
    code allocates without torch's allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    taken = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        taken += change
        peak = max(peak, taken)
    return peak


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Makes a model recompute each layer in the backward pass instead of storing its activations."""
    new_name = hasattr(model, "activation_checkpointing_enable")  # older versions of transformers have the old one
    enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

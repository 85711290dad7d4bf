"""How much memory a piece of training takes at its peak, and how it takes less."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the peak of `work`, beyond those that were there before it.

    On a GPU its allocator has counted them. On a CPU torch's profiler notes every allocation; what C++ code takes for
    itself, past torch's allocator, is not among them.
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
    """Lets a model compute each layer again in the backward pass."""
    new_name = hasattr(model, "activation_checkpointing_enable")  # older versions of transformers have the old one
    enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

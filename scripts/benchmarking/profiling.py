"""What PyTorch's profiler says of the operators of a case."""

from collections.abc import Iterator

import torch
from torch.autograd.profiler_util import FunctionEvent

from benchmarking.measuring import Case


RUN = "a run of the case"


def profiled(case: Case, times: int) -> list[FunctionEvent]:
    """Runs a case once unprofiled, and then several times; each event is one run, with its operators as children."""

    def marked() -> None:
        with torch.profiler.record_function(RUN):
            case()

    case()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(times):
            marked()
    return [event for event in profile.events() if event.name == RUN]


def operators(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """All operators that ran in an event, including those called by other operators."""
    for child in event.cpu_children:
        yield child
        yield from operators(child)


def converts(event: FunctionEvent) -> bool:
    """Whether an operator converts a tensor to another dtype. Python numbers, which are tensors without axes, do not
    count."""
    return event.name == "aten::_to_copy" and bool(event.input_shapes and event.input_shapes[0])

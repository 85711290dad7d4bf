"""Compiles the Triton kernels for GPUs that need not be present. Prints the kind of machine code of each kernel and,
for NVIDIA, its registers and stack (`STACK`). `--all` compiles more variants for an H100."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hf_vssm_prune import triton_convolution_kernels as convolutions
from hf_vssm_prune import triton_scan_kernels as kernels


TARGETS = (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
MORE_TARGETS = (GPUTarget("cuda", 80, 32),)
OPTIONAL = ("order", "gaps", "hole_time_step", "direction_B", "moves")
GRADIENTS = (
    "grad_hidden_states", "grad_time_step", "grad_A", "grad_B", "grad_C", "grad_D", "grad_hole_time_step",
)  # fmt: skip
HALVES = ("hidden_states", "time_step", "B", "C", "gate", "output")
# These are only known to be integers.
ANY_NUMBERS = ("paths", "length", "chunks", "chunk_length", "height", "width", "tokens", "cells", "strips")
ENDS_OF_STRIDES = ("_batch", "_row", "_channel", "_tap")
INDICES = {"i64": ("order", "gaps", "moves", "kept", "starts"), "i32": ("shown", "places")}


def source(kernel, absent: tuple[str, ...], constants: dict[str, int], dtype: str = "fp32", paths: int = 4):
    """A call as Triton sees it: tensors come from PyTorch's allocator, and all sizes except `paths` are multiples of
    16."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names} | dict.fromkeys(absent)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name == "paths" and paths == 1:
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        of_indices = [kind for kind, names in INDICES.items() if name in names]
        if of_indices:
            signature[name] = f"*{of_indices[0]}"
        elif name == "channels" or name in ANY_NUMBERS or name.endswith(ENDS_OF_STRIDES):
            signature[name] = "i32"
        else:
            signature[name] = f"*{dtype if name in HALVES else 'fp32'}"
        # B and C are parts of a projection: neither their start nor their rows have to be aligned.
        if name not in (*ANY_NUMBERS, "B", "C", "B_row", "C_row"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=indices, attrs=attributes)


def resources(machine_code: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return " ".join(re.findall(r"(?:REG|STACK|SHARED|LOCAL):\d+", printed))


def main_cases():
    """Each kernel with all options."""
    yield "forward", source(kernels.scan_forward, (), MANY_CHANNELS)
    yield "backward", source(kernels.scan_backward, (), FEW_CHANNELS)
    yield "sum's gradient", source(kernels.gate_sum, (), SUM)
    yield "convolution", source(convolutions.convolve, (), {**GRID, "SILU": False})


def more_cases():
    """The variants that models launch: each kernel with the most and the fewest options."""
    whole = ("chunk_states", "chunk_times")
    without_gap = ("chunk_grads", "grad_hole_time_step")
    yield "forward, of paths", source(kernels.scan_forward, ("gate", "block_states", *whole), MANY_CHANNELS)
    yield (
        "forward, half precision",
        source(kernels.scan_forward, ("gate", "block_states", *whole), MANY_CHANNELS, "bf16"),
    )
    yield "forward, one path", source(kernels.scan_forward, (*OPTIONAL, "block_states", *whole), FEW_CHANNELS, paths=1)
    yield "forward, first walk", source(kernels.scan_forward, ("output", "block_states"), FEW_CHANNELS)
    yield "carry", source(kernels.carry, (), {**FEW_CHANNELS, "FROM_LAST": 1})
    yield "backward, half precision", source(kernels.scan_backward, ("chunk_grads",), FEW_CHANNELS, "bf16")
    yield "backward, one path", source(kernels.scan_backward, (*OPTIONAL, *without_gap), FEW_CHANNELS, paths=1)
    yield "backward, first walk", source(kernels.scan_backward, ("block_states", *GRADIENTS), FEW_CHANNELS)
    whole = ("shown", "places", "grad_output")
    yield "convolution, half precision", source(convolutions.convolve, (), {**GRID, "SILU": False}, "bf16")
    yield "convolution, of a whole grid", source(convolutions.convolve, whole, {**GRID, "SILU": True})
    yield "convolution, causal", source(convolutions.convolve, whole, {**ROW, "SILU": True}, "bf16")
    weight_gradient = source(convolutions.sum_weight_gradients, (), {**GRID, "BLOCK_CHANNELS": 32})
    yield "convolution, gradient of its weight", weight_gradient
    yield "places", source(convolutions.list_places, (), {"BLOCK": 128})
    yield "gradient by stand-ins", source(convolutions.sum_cells, (), {"BLOCK_CHANNELS": 128})


MANY_CHANNELS = {"STATES": 16, "BLOCK_STATES": 16, "BLOCK_CHANNELS": 16, "UNROLL": 4}
FEW_CHANNELS = {**MANY_CHANNELS, "BLOCK_CHANNELS": 8}
TILE = {"STRIP": 7, "BLOCK_CHANNELS": 128, "MIRRORED": False}
GRID = {**TILE, "ROWS": 7, "COLUMNS": 7, "ROWS_BEFORE": 3, "COLUMNS_BEFORE": 3, "weight_channel": 1}
ROW = {**TILE, "ROWS": 1, "COLUMNS": 4, "ROWS_BEFORE": 0, "COLUMNS_BEFORE": 3, "weight_tap": 1}
SUM = {"PATHS": 4, "BLOCK_TOKENS": 4, "BLOCK_CHANNELS": 256}

for target in (*TARGETS, *(MORE_TARGETS if "--all" in sys.argv else ())):
    cases = (*main_cases(), *more_cases()) if target.arch == 90 and "--all" in sys.argv else main_cases()
    for name, code in cases:
        compiled = compile(code, target=target, options={"num_warps": 4 if "sum" in name else 1})
        kind = list(compiled.asm)[-1]
        print(kind, target.arch, name, resources(compiled.asm[kind]) if kind == "cubin" else "", sep="; ", flush=True)

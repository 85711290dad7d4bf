"""Compiles the Triton kernels for GPUs that need not be there, and prints the kind of machine code of each."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hf_vssm_prune import triton_scan_kernels as kernels


TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64))
OPTIONAL = ("order", "gaps", "hole_time_step", "direction_B", "moves")


def source(kernel, absent: tuple[str, ...], constants: dict[str, int]) -> ASTSource:
    constants = constants | dict.fromkeys(absent)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("order", "gaps", "moves"):
            signature[name] = "*i64"
        elif name in ("length", "channels", "chunk_length") or name.endswith(("_batch", "_row")):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=indices)


sizes = {"STATES": 16, "BLOCK_STATES": 16, "BLOCK_CHANNELS": 32}
for target in TARGETS:
    for code in (
        source(kernels.scan_forward, (), {**sizes, "PATHS": 4}),
        source(kernels.scan_forward, (*OPTIONAL, "checkpoints"), {**sizes, "PATHS": 1}),
        source(kernels.scan_backward, (), sizes),
        source(kernels.scan_backward, (*OPTIONAL, "grad_hole_time_step"), sizes),
    ):
        print(list(compile(code, target=target, options={"num_warps": 1}).asm)[-1])

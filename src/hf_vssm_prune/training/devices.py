"""The device that a person names, or the one that there is."""

import torch


def find_device(name: str | None) -> torch.device:
    """The device of a `--device` option; without one a GPU where there is one, else the CPU.

    Raises:
        ValueError: torch does not know it, or it is not on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # not known; not compiled in, not there; meta
        raise ValueError(f"--device {name} is not available; this machine has {', '.join(_devices())}.") from error
    return device


def check_training_precision(mixed_precision: str | None, device: torch.device) -> None:
    """Refuses a precision that a device cannot train in.

    Raises:
        ValueError: it cannot.
    """
    if mixed_precision == "fp16" and device.type == "cpu":  # no scale for its gradients there
        raise ValueError("--mixed_precision fp16 trains on a GPU only, and the device is the CPU: choose bf16 or no.")
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} does not support bfloat16; choose fp16."
        )


def launch_on_cores(device: torch.device, num_processes: int, batch_size: int) -> str | None:
    """How to start a run with one process of one thread on each core, which is the faster way to train on a CPU: two
    threads meet after each operator, two processes once a step. None: it is not for this run.

    Args:
        batch_size: of a process, now.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or num_processes > 1 or cores == 1 or batch_size % cores:
        return None
    return (
        f"OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes {cores} -m hf_vssm_prune ... "
        f"--batch_size {batch_size // cores} --use_cpu"
    )


def _devices() -> list[str]:
    kinds = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *kinds, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]

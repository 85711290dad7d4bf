"""The device that the user names, or the one that is available."""

import torch


# Autocast's data type for each value of `--mixed_precision`; None: there is no autocast.
MIXED_PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def find_device(name: str | None) -> torch.device:
    """The device of a `--device` option; without one, a GPU if there is one, otherwise the CPU.

    Raises:
        ValueError: torch does not know the device, or this machine does not have it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown; not compiled in or absent; meta
        raise ValueError(f"--device {name} is not available; this machine has {', '.join(_devices())}.") from error
    return device


def check_training_precision(mixed_precision: str | None, device: torch.device) -> None:
    """Raises an error for a precision in which a device cannot train.

    Raises:
        ValueError: it cannot.
    """
    if mixed_precision == "fp16" and device.type == "cpu":  # gradient scaling is not supported there
        raise ValueError("--mixed_precision fp16 trains on a GPU only, and the device is the CPU: choose bf16 or no.")
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} does not support bfloat16; choose fp16."
        )


def launch_on_cores(device: torch.device, num_processes: int, batch_size: int) -> str | None:
    """The command to start a run with one single-threaded process per core, which is faster on a CPU: threads
    synchronise after each operator, processes once per step. None: it does not apply to this run.

    Args:
        batch_size: current batch size per process.
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

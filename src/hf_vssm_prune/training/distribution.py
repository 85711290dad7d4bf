"""Distributes a run over processes with Accelerate: DDP, or FSDP2 to shard the weights.

States are always gathered completely and under the plain model's names, regardless of how the run is distributed: a
checkpoint of one process can be loaded in two, one of DDP in FSDP, and vice versa.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    extract_model_from_parallel,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_vssm_prune.environment import is_switched_on
from hf_vssm_prune.pruned_heads import backbone_of


logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# The messages of gloo, NCCL and torch's store when a peer is gone or does not respond. Most of these errors are plain
# RuntimeErrors.
LOST_PEER = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|timed? ?out|broken pipe|socket|recvvalue|remote process"
    r"|gloo|nccl|process ?group",
    re.IGNORECASE,
)


class ProcessLostError(RuntimeError):
    """Another process of the run died, or did not respond in time."""


def make_accelerator(
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    project_dir: str,
    log_with: str | None,
    cpu: bool,
    fsdp: bool,
    timeout: float,
    find_unused_parameters: bool,
) -> Accelerator:
    """An accelerator for the processes that `accelerate launch` or `torch.distributed.run` started.

    Args:
        fsdp: shard with FSDP2 (no effect with a single process). `accelerate launch --use_fsdp` has the same effect.
        timeout: seconds to wait for a process that does not respond.
        find_unused_parameters: tells DDP that some steps do not use all parameters.
        The rest: as for `Accelerator`.

    Raises:
        ValueError: the experiment tracker in `log_with` is unknown or not installed.
    """
    fsdp = fsdp or is_switched_on("ACCELERATE_USE_FSDP")
    plugin = _fsdp2_plugin() if fsdp else None
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=log_with,
        project_dir=project_dir,
        cpu=cpu,
        fsdp_plugin=plugin,
        # Each process reads its own part of a stream and prepares its own images.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
        ],
    )
    if log_with is not None and not accelerator.log_with:  # which is only a debug message of Accelerate
        raise ValueError(f"--report_to {log_with}: no such experiment tracker is installed.")
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        _let_cpus_shard(accelerator, plugin)
    return accelerator


def _fsdp2_plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # See `shard_by_layers`.
        auto_wrap_policy="transformer_based_wrap",
        # Weights stay float32 and autocast chooses where to compute in half precision, as with DDP. Accelerate's own
        # choice would round `A_log` and the norms' weights, too.
        mixed_precision_policy=MixedPrecisionPolicy(),
        # Every process has read the weights, so they are not broadcast again.
        cpu_ram_efficient_loading=False,
    )


def _let_cpus_shard(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Enables FSDP2 with gloo, which Accelerate does not support.

    `AcceleratorState.__init__` (accelerate 1.15) looks at an FSDP plugin only if the distributed type is one in a list
    of GPUs and other accelerators. MULTI_CPU is not in that list, so the plugin is silently ignored and DDP is used.
    torch's `fully_shard` works on CPUs. These are the assignments of that branch.
    """
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def choose_deterministic_algorithms() -> None:
    """Makes torch use deterministic algorithms only, on CPUs and GPUs."""
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def shard_by_layers(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Sets how FSDP2 shards the models that are prepared next: each layer separately, and the rest together.

    A model's `_no_split_modules` also names its embeddings. Accelerate (1.15) would additionally shard the projection
    inside them, and torch refuses to shard a parameter twice.
    """
    if accelerator.is_fsdp2:
        layers = backbone_of(model).base_model.get_submodule("layers")
        names = {type(layer).__name__ for layer in layers.children()}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)


def spread_frozen(accelerator: Accelerator, model: Model) -> Model:
    """Shards a model that is not trained (a teacher, EMA weights) like the trained model; without FSDP, it is not
    changed.

    `Accelerator.prepare` accepts only one model, with its optimizer; this calls the same function as it does.
    """
    shard_by_layers(accelerator, model)
    return fsdp2_prepare_model(accelerator, model) if accelerator.is_fsdp2 else model


def reduce_unused_parameters(model: nn.Module) -> None:
    """Lets the processes of a sharded model leave different parameters without a gradient in a step, as
    `find_unused_parameters` does with DDP."""
    if not isinstance(model, FSDPModule):
        return
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
    else:
        logger.warning(
            "torch %s cannot shard a model of which some batches do not use all parameters: if a process has such a "
            "batch, the run fails. Install a newer version, or train without --fsdp.",
            torch.__version__,
        )


def whole_model_state(model: nn.Module) -> dict[str, Any]:
    """A model's weights and buffers on the CPU, under the plain model's names. All processes call it; sharded weights
    are gathered on the main process, and the others get nothing."""
    return get_model_state_dict(model, options=WHOLE)


def load_whole_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Loads what `whole_model_state` returned, the same on all processes."""
    set_model_state_dict(model, state, options=WHOLE)


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list]:
    """An optimizer's tensors, named `<parameter of the plain model>/<moment>`, and its parameter groups, which list
    parameters by these names. As with `whole_model_state`, sharded tensors are gathered on the main process."""
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    states = whole.get("state", {})
    tensors = {f"{name}/{moment}": value for name, state in states.items() for moment, value in state.items()}
    return tensors, whole.get("param_groups", [])


def load_whole_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list
) -> None:
    """Loads what `whole_optimizer_state` returned, the same on all processes. Parameters without a state start anew:
    they have had no gradient yet, such as the parameters of schedules that elastic training has not drawn so far."""
    states: dict[str, Any] = {}
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        states.setdefault(name, {})[moment] = value
    options = replace(WHOLE, strict=False)
    set_optimizer_state_dict(model, optimizer, {"state": states, "param_groups": groups}, options=options)
    # torch first takes a step without gradients, which creates a state for each parameter, and which Adam counts.
    for name, parameter in extract_model_from_parallel(model).named_parameters():
        if name not in states:
            optimizer.state.pop(parameter, None)


def of_all_processes(accelerator: Accelerator, value: int) -> list[int]:
    """A whole number of each process, that of the main process first. All processes call it."""
    return accelerator.gather(torch.tensor([int(value)], device=accelerator.device)).tolist()


def share_buffers(model: nn.Module) -> None:
    """Copies the main process's buffers to all processes: each process has batch norm statistics of its own images."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """In this context, each process keeps the weights of a sharded model after they were gathered for its first forward
    pass. Processes may then run it different numbers of times, such as once for each of several images of different
    sizes; otherwise they would wait for one another in every layer. All processes must run it at least once."""
    sharded = [
        module
        for module in model.modules()
        if isinstance(module, FSDPModule) and hasattr(module, "set_reshard_after_forward")  # not in old versions
    ]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """In this context, communication errors between processes get a clear message.

    Raises:
        ProcessLostError: another process died or did not respond.
    """
    try:
        yield
    except RuntimeError as error:
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if torch.distributed.is_initialized():  # launchers such as MPI's set other variables
            num_processes = torch.distributed.get_world_size()
        of_peer = isinstance(error, torch.distributed.DistError) or (
            type(error) is RuntimeError and LOST_PEER.search(str(error))
        )
        if num_processes == 1 or not of_peer:
            raise
        raise ProcessLostError(
            f"Another of the {num_processes} processes died or did not respond (its own message, if any, is above): "
            f"{str(error).splitlines()[0]} Resume with --resume latest; --ddp_timeout sets how long to wait."
        ) from error

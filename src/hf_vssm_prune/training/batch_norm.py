"""Where the statistics of batch norm come from in training. PlainMamba has it in its stem and behind a layer with a
depthwise convolution (L1), Vim has none."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Lets the batch norm layers of a model, not yet wrapped, take the statistics of all devices' batches together.

    Raises:
        ValueError: on a CPU, for which torch has no code.
    """
    if device.type == "cpu":
        raise ValueError(
            "--batch_norm sync needs GPUs: torch's SyncBatchNorm does not support CPUs. Choose local or frozen."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def freeze_batch_norm(model: nn.Module) -> None:
    """Lets the batch norm layers of a model in training use the statistics that they have, and leave them as they are.

    `model.train()` undoes it.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()

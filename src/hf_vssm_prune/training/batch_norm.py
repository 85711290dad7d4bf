"""The statistics that batch norm uses in training. PlainMamba has batch norm in its stem and, in L1, after the
depthwise convolution that follows the first layer; Vim has none. Most heads for segmentation
and detection have it."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Makes the batch norm layers of a model that is not yet wrapped compute their statistics over the batches of all
    devices.

    Raises:
        ValueError: on a CPU, which torch does not support.
    """
    if device.type == "cpu":
        raise ValueError(
            "--batch_norm sync needs GPUs: torch's SyncBatchNorm does not support CPUs. Choose local or frozen."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def freeze_batch_norm(model: nn.Module) -> None:
    """Makes the batch norm layers of a model in training mode use their existing statistics without changing them.

    `model.train()` undoes it.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()

"""What identifies the rows of a data set and the weights of a model, so that a resumed run can tell whether it has the
same ones."""

import hashlib
import os
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, Image, Video
from torch import nn


def fingerprint_of_rows(rows: Any) -> str | None:
    """SHA-256, in hexadecimal digits, of the rows' order, their labels (or other annotations in columns), and the names
    and stored sizes of their files. Folders are not part of it, so that a data set can be moved.

    Args:
        rows: the rows of an `ImageDatasets`.

    Returns:
        None for a stream, whose rows are not known beforehand.
    """
    dataset = getattr(rows, "rows", rows)
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    stored = [name for name, kind in dataset.features.items() if isinstance(kind, Image | Video)]
    for name in stored:  # of all rows of the split: which of them were selected is in the column "row"
        column = dataset.data.column(name)
        paths = pc.struct_field(column, "path").to_pylist()
        sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        digest.update(
            repr([(path and os.path.basename(path), size) for path, size in zip(paths, sizes, strict=True)]).encode()
        )
    values = dataset.remove_columns(stored).with_format("arrow")[:]
    digest.update(repr(values.to_pydict()).encode())
    return digest.hexdigest()


def fingerprint_of_weights(model: nn.Module) -> str:
    """SHA-256, in hexadecimal digits, of the names, types and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

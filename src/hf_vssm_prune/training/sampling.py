"""The order of the training images."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from hf_vssm_prune.training.data.columns import ImageStream, read_rows


class EpochSampler(Sampler[int]):
    """A random order of all images that depends on the seed and the epoch alone, and can start in its middle.

    torch's `RandomSampler` draws from a generator whose state would have to be part of every checkpoint.

    Args:
        num_images: in the data set.
        seed: of the order.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def start_at(self, epoch: int, image: int = 0) -> None:
        """The next iteration leaves out the first `image` images of an epoch."""
        self.epoch = epoch
        self.start = image

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        yield from order[self.start :].tolist()

    def __len__(self) -> int:
        return self.num_images - self.start


class StreamSampler(Sampler[tuple[int, dict[str, Any]]]):
    """The rows of a stream, shuffled, each with its place in the epoch's order, which depends on the seed and the epoch
    alone and can start in its middle.

    To start there, everything before is read (not decoded) and left out. The state that datasets' own
    `IterableDataset.state_dict` saves lacks what a shuffling buffer holds, so that images would be lost or come twice.

    Args:
        stream: of the training images. Every process reads all of it, and keeps its own batches.
        seed: of the order.

    Raises:
        ValueError: while it is read, if there are fewer images than `stream.num_images`.
    """

    def __init__(self, stream: ImageStream, seed: int) -> None:
        self.stream = stream
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def start_at(self, epoch: int, image: int = 0) -> None:
        """The next iteration leaves out the first `image` images of an epoch."""
        self.epoch = epoch
        self.start = image

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = enumerate(read_rows(self.stream.shuffled(self.seed, self.epoch), self.stream.split))
        place = self.start - 1
        for place, row in islice(rows, self.start, len(self.stream)):
            yield place, row
        if place + 1 < len(self.stream):
            raise ValueError(
                f"Split '{self.stream.split}' has {place + 1} images, fewer than the expected {len(self.stream)}: "
                "give --max_train_samples."
            )

    def __len__(self) -> int:
        return len(self.stream) - self.start

"""The order of the training images."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from hf_vssm_prune.training.data.columns import ImageStream, read_rows


class _Sampler(Sampler[Any]):
    """A random order of images that depends only on the seed and the epoch. It can start in the middle of an epoch."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self.epoch = self.start = 0

    def start_at(self, epoch: int, image: int = 0) -> None:
        """Makes the next iteration skip the first `image` images of an epoch."""
        self.epoch, self.start = epoch, image

    def __len__(self) -> int:
        return self.num_images - self.start


class EpochSampler(_Sampler):
    """A random order of all images.

    torch's `RandomSampler` uses a generator whose state would have to be part of every checkpoint.

    Args:
        num_images: number of images in the data set.
        seed: random seed.
    """

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        yield from order[self.start :].tolist()


class StreamSampler(_Sampler):
    """The shuffled rows of a stream, each with its position in the epoch's order.

    To start in the middle of an epoch, all earlier rows are read (but not decoded) and skipped. The state saved by
    datasets' own `IterableDataset.state_dict` does not include the shuffling buffer, so images would be lost or
    repeated.

    Args:
        stream: the training images. Every process reads the whole stream and keeps only its own batches.
        seed: random seed.

    Raises:
        ValueError: during iteration, if there are fewer images than `stream.num_images`.
    """

    def __init__(self, stream: ImageStream, seed: int) -> None:
        super().__init__(len(stream), seed)
        self.stream = stream

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

"""The order of the training images."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


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

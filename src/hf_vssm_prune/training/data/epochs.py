"""The randomness of data sets for training, which depends only on the seed, the epoch and the index of an item, and not
on the number of workers or processes or on earlier reads."""

import numpy as np
import torch


class Epochs:
    """The current epoch of a data set, and the generators for its items.

    Args:
        seed: not negative.

    Raises:
        ValueError: the seed is negative.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative.")
        self._seed = seed
        # In shared memory, so that the persistent workers of a data loader see the new epoch as well.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __int__(self) -> int:
        return int(self._epoch)

    def generator(self, index: int, *purpose: int) -> np.random.Generator:
        """The generator for the randomness in an item or, with a number for each purpose, for a part of it."""
        return np.random.default_rng((self._seed, int(self), index, *purpose))

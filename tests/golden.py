"""Golden cases: recipes that recreate a published model's weights, and the expected results."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class GoldenCase:
    recipe: dict[str, Any]
    expected: dict[str, np.ndarray]

    @classmethod
    def load(cls, folder: Path, name: str) -> "GoldenCase":
        with np.load(folder / f"{name}.npz") as arrays:
            return cls(json.loads((folder / f"{name}.json").read_text()), dict(arrays))

    def pixel_values(self) -> Tensor:
        """Pixel values in our layout, where the frames of a video come before its channels."""
        frames = self.recipe.get("frames")
        shape = (self.recipe["batch"], 3, *([frames] if frames else []), *self.recipe["image"])
        values = np.random.RandomState(self.recipe["seed"] + 1).standard_normal(shape).astype(np.float32)
        pixel_values = torch.from_numpy(values)
        return pixel_values.transpose(1, 2) if frames else pixel_values

    def overrides(self) -> dict[str, Any]:
        """Configuration options that cannot be inferred from the weights."""
        arch = self.recipe["arch"]
        return {"image_size": arch["img_size"]} | ({"patch_stride": arch["stride"]} if "stride" in arch else {})

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under the published names."""
        return {key: self._tensor(key, **entry) for key, entry in self.recipe["parameters"].items()}

    def _tensor(
        self, key: str, shape: list[int], init: str, mean: float = 0.0, std: float = 0.0, value: float = 0.0
    ) -> Tensor:
        seed = zlib.crc32(f"{self.recipe['seed']}:{key}".encode())
        normal = np.random.RandomState(seed).standard_normal(shape)
        values = {
            "normal": lambda: mean + std * normal,
            "abs_normal": lambda: mean + std * np.abs(normal),
            "s4d": lambda: np.log(np.arange(1, shape[-1] + 1)) + std * normal,
            "constant": lambda: np.full(shape, value),
        }[init]()
        return torch.from_numpy(values.astype(np.int64 if key.endswith("num_batches_tracked") else np.float32))

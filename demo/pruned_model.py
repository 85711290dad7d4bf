"""A classifier that prunes by a budget chosen for each image: what it says and keeps, and how long it takes."""

import math
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_vssm_prune.flops import ModelFlops, count_flops
from hf_vssm_prune.hub.loading import load_classifier, load_image_processor
from hf_vssm_prune.pruning_methods import PAPERS_METHOD, RECOMMENDED_METHOD
from hf_vssm_prune.pruning_options import method_options
from hf_vssm_prune.visualization import (
    draw_stages,
    frames_from_pixel_values,
    image_statistics,
    kept_patches,
)


# Measured in turns until the time is up, few enough for a slider to feel live.
MEASURING_SECONDS, MIN_TURNS, MAX_TURNS = 0.15, 5, 15
METHODS = {
    f"Merge alike neighbours ({RECOMMENDED_METHOD}, our default)": {"method": RECOMMENDED_METHOD},
    f"Drop the least important ({PAPERS_METHOD}, the paper's)": {"method": PAPERS_METHOD},
    "Drop at random": {"method": PAPERS_METHOD, "importance": "random"},
}
# One image of a small model is mostly the fixed cost of calling its layers, which pruning leaves as it is.
SMALL_MODEL_FLOPS, SMALL_MODEL_BATCH = 1e9, 8


@dataclass(frozen=True)
class Classification:
    """What a model makes of one image, dense and pruned.

    Attributes:
        dense: the most likely labels with their probabilities, best first.
        pruned: likewise; of the dense model where nothing is pruned.
        panels: the image as the model saw it, then one picture of each stage with dropped patches covered.
        layers: before which the stages drop tokens.
        num_kept: patches left after each stage.
        num_patches: of the whole image.
        flops: dense and pruned.
    """

    dense: list[tuple[str, float]]
    pruned: list[tuple[str, float]]
    panels: list[Image.Image]
    layers: list[int]
    num_kept: list[int]
    num_patches: int
    flops: ModelFlops


@dataclass(frozen=True)
class Measurement:
    """Milliseconds for one image, in batches, of the fastest turn: what else a server does only ever adds to a time."""

    dense: float
    pruned: float
    turns: int
    batch_size: int


class PrunedModel:
    """An image classifier of this package under changing budgets.

    Requests may come from several threads: the model computes for one after the other, since its schedule changes
    between them, and since two measurements at once would slow each other.

    Args:
        name_or_path: a folder, or a model on the Hub.

    Attributes:
        methods: ways to prune by what the page calls them, the model's own first where it is saved with one.

    Raises:
        ValueError, OSError: see `hf_vssm_prune.hub.loading.load_classifier`.
    """

    def __init__(self, name_or_path: str) -> None:
        self.model = load_classifier(name_or_path)
        self.image_processor = load_image_processor(name_or_path)
        # While the model is dense, its configuration does not say how it prunes.
        own = method_options(self.model.config.token_pruning)
        self.methods = ({f"As this model was saved ({own['method']})": own} if own else {}) | METHODS
        self._lock = threading.Lock()
        self._schedule = lru_cache(maxsize=101 * len(self.methods))(self._find_schedule)
        self.labels = self.model.config.label_names
        dense = count_flops(self.model.config).dense.published
        self.measured_batch = SMALL_MODEL_BATCH if dense < SMALL_MODEL_FLOPS else 1

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixel values of one image, shape (1, channels, height, width)."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def classify(self, pixel_values: Tensor, percent: int, method: str) -> Classification:
        """Classifies one image with all of its tokens, and with a budget.

        Args:
            pixel_values: as `prepare` gives them.
            percent: of the dense model's FLOPs that are to go, from 0.
            method: one of `methods`.

        Raises:
            ValueError: there is no such method, or this model cannot be pruned by so much.
        """
        config = self.model.config
        size = config.input_size_of(pixel_values.shape)
        schedule = self._schedule(percent, method)
        with self._lock:
            self.model.set_token_pruning(None)
            dense = self.model(pixel_values)
            self.model.set_token_pruning(schedule)
            pruned = self.model(pixel_values)
            flops = count_flops(config, size[-2:])
        grid = config.grid_size_for(*size)
        kept = [ids[0] for ids in kept_patches(pruned.kept_tokens or (), config, size)]
        seen = frames_from_pixel_values(pixel_values[0], *image_statistics(self.image_processor), config)
        return Classification(
            dense=self._likely_labels(dense.logits[0]),
            pruned=self._likely_labels(pruned.logits[0]),
            panels=draw_stages(seen, kept, grid),
            layers=[] if schedule is None else schedule["layers"],
            num_kept=[len(ids) for ids in kept],
            num_patches=math.prod(grid),
            flops=flops,
        )

    @torch.no_grad()
    def measure(self, pixel_values: Tensor, percent: int, method: str) -> Measurement:
        """Times the dense and the pruned model in turns, so that a machine that slows down slows both.

        Args:
            pixel_values: of one image; copies of it fill the batch.
            percent, method: as for `classify`.
        """
        batch = pixel_values.repeat_interleave(self.measured_batch, 0)
        schedules = (None, self._schedule(percent, method))
        turns: list[list[float]] = []
        with self._lock:
            end = time.perf_counter() + MEASURING_SECONDS
            while len(turns) < MIN_TURNS or (time.perf_counter() < end and len(turns) < MAX_TURNS):
                turns.append([self._seconds(batch, schedule) for schedule in schedules])
        dense, pruned = (1000 * min(times) / len(batch) for times in zip(*turns, strict=True))
        return Measurement(dense, pruned, len(turns), len(batch))

    def _find_schedule(self, percent: int, method: str) -> dict[str, Any] | None:
        if method not in self.methods:
            raise ValueError(f"There is no method {method!r}; the methods are {', '.join(self.methods)}.")
        if percent == 0:
            return None
        return self.model.config.complete_token_pruning({"flops_reduction": percent / 100, **self.methods[method]})

    def _seconds(self, batch: Tensor, schedule: dict[str, Any] | None) -> float:
        self.model.set_token_pruning(schedule)
        start = time.perf_counter()
        self.model(batch)
        return time.perf_counter() - start

    def _likely_labels(self, logits: Tensor) -> list[tuple[str, float]]:
        best = logits.float().softmax(-1).topk(min(3, len(self.labels)))
        return [
            (self.labels[index], share)
            for share, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

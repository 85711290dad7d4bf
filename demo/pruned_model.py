"""A classifier with a pruning budget chosen for each image: its predictions, the kept patches, and the time it
takes."""

import math
import threading
import time
from collections.abc import Iterator
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


# Seconds for measuring both models alternately, short enough for a responsive slider.
MEASURING_SECONDS, MIN_TURNS, MAX_TURNS = 0.15, 5, 15
PAUSE = 0.002  # seconds between them: a lock that is taken again at once does not pass to another thread
METHODS = {
    f"Merge similar neighbours ({RECOMMENDED_METHOD}, our default)": {"method": RECOMMENDED_METHOD},
    f"Drop the least important ({PAPERS_METHOD}, the paper's)": {"method": PAPERS_METHOD},
    "Drop at random": {"method": PAPERS_METHOD, "importance": "random"},
}
# For a single image, the time of a small model is mostly the fixed cost of calling its layers, which pruning does not
# change.
SMALL_MODEL_FLOPS, SMALL_MODEL_BATCH = 1e9, 8


@dataclass(frozen=True)
class Classification:
    """The results of a model for one image, dense and pruned.

    Attributes:
        dense: the most likely labels with their probabilities, best first.
        pruned: the same for the pruned model; those of the dense model if nothing is pruned.
        panels: the image as the model sees it, then one picture for each stage with dropped patches covered.
        layers: the layers before which the stages drop tokens.
        num_kept: number of patches left after each stage.
        num_patches: number of patches in the whole image.
        flops: FLOPs, dense and pruned.
        medium: "image" or "clip".
    """

    dense: list[tuple[str, float]]
    pruned: list[tuple[str, float]]
    panels: list[Image.Image]
    layers: list[int]
    num_kept: list[int]
    num_patches: int
    flops: ModelFlops
    medium: str


@dataclass(frozen=True)
class Measurement:
    """Milliseconds per image, in batches, in the fastest run: other work on a server can only add to a time."""

    dense: float
    pruned: float
    turns: int
    batch_size: int


class PrunedModel:
    """An image classifier of this package with changing budgets.

    Requests may come from several threads. They are processed one after another, because the model's schedule changes
    between them, and because simultaneous measurements would slow each other down.

    Args:
        name_or_path: a folder, or a model on the Hub.

    Attributes:
        medium: what it classifies, "image" or "clip".
        methods: pruning options by their names on the page; if the model was saved with a method, that one comes first.

    Raises:
        ValueError, OSError: see `hf_vssm_prune.hub.loading.load_classifier`.
    """

    def __init__(self, name_or_path: str) -> None:
        self.model = load_classifier(name_or_path)
        self.image_processor = load_image_processor(name_or_path)
        self.medium = "clip" if self.model.config.modality == "video" else "image"
        # While the model is dense, its configuration has no pruning options.
        own = method_options(self.model.config.token_pruning)
        self.methods = ({f"As this model was saved ({own['method']})": own} if own else {}) | METHODS
        self._lock = threading.Lock()
        self._schedule = lru_cache(maxsize=101 * len(self.methods))(self._find_schedule)
        self.labels = self.model.config.label_names
        dense = count_flops(self.model.config).dense.published
        self.measured_batch = SMALL_MODEL_BATCH if dense < SMALL_MODEL_FLOPS else 1

    def prepare(self, image: Image.Image | list[Image.Image]) -> Tensor:
        """Pixel values of one image, shape (1, channels, height, width), or of a clip's frames, (1, frames, channels,
        height, width)."""
        if self.model.config.num_channels == 1:
            image = [each.convert("L") for each in image] if isinstance(image, list) else image.convert("L")
        return self.image_processor(image, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def classify(self, pixel_values: Tensor, percent: int, method: str) -> Classification:
        """Classifies one image with all of its tokens, and with a budget.

        Args:
            pixel_values: pixel values from `prepare`.
            percent: percentage of the dense model's FLOPs to remove, from 0.
            method: one of `methods`.

        Raises:
            ValueError: there is no such method, or this model cannot be pruned by that much.
        """
        config = self.model.config
        size = config.input_size_of(pixel_values.shape)
        schedule = self._schedule(percent, method)
        selects = schedule is not None and "block_keep_ratio" in schedule
        with self._lock:
            self.model.set_token_pruning(None)
            dense = self.model(pixel_values)
            self.model.set_token_pruning(schedule)
            pruned = self.model(pixel_values, output_block_gates=selects)
            # With a block ratio, the FLOPs are those of the scan directions that ran for this image.
            ran = torch.stack(list(pruned.block_gates)).mean().item() if selects else None
            flops = count_flops(config, size, ran)
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
            medium=self.medium,
        )

    def measure(self, pixel_values: Tensor, percent: int, method: str) -> Iterator[Measurement]:
        """Times the dense and the pruned model alternately, so that a slow phase of the machine affects both. Yields
        the result so far after each turn; other requests are processed between the runs.

        Args:
            pixel_values: pixel values of one image; copies of it fill the batch.
            percent, method: as for `classify`.
        """
        batch = pixel_values.repeat_interleave(self.measured_batch, 0)
        schedules = (None, self._schedule(percent, method))
        turns: list[list[float]] = []
        end = time.perf_counter() + MEASURING_SECONDS
        while len(turns) < MIN_TURNS or (time.perf_counter() < end and len(turns) < MAX_TURNS):
            turns.append([self._seconds(batch, schedule) for schedule in schedules])
            dense, pruned = (1000 * min(times) / len(batch) for times in zip(*turns, strict=True))
            yield Measurement(dense, pruned, len(turns), len(batch))
            time.sleep(PAUSE)

    def _find_schedule(self, percent: int, method: str) -> dict[str, Any] | None:
        if method not in self.methods:
            raise ValueError(f"There is no method {method!r}; the methods are {', '.join(self.methods)}.")
        if percent == 0:
            return None
        return self.model.config.complete_token_pruning({"flops_reduction": percent / 100, **self.methods[method]})

    @torch.no_grad()
    def _seconds(self, batch: Tensor, schedule: dict[str, Any] | None) -> float:
        with self._lock:
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

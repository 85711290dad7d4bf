"""Reports the progress of a run: log lines, and Accelerate's trackers."""

import logging
import time
from statistics import fmean
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor


logger = logging.getLogger(__name__)


class RunLog:
    """The log lines and trackers of a run. Only the main process writes.

    Args:
        accelerator: the accelerator with the run's trackers.
        with_tracking: whether to send metrics and pictures to the trackers.
    """

    def __init__(self, accelerator: Accelerator, with_tracking: bool) -> None:
        self.accelerator = accelerator
        self.with_tracking = with_tracking

    def start_tracking(self, settings: dict[str, Any]) -> None:
        """Sends the run's settings to the trackers, if there are any, as numbers and text."""
        if self.with_tracking:
            plain = {
                name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()
            }
            self.accelerator.init_trackers("hf_vssm_prune", config=plain)

    def write(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)

    def write_metrics(self, title: str, metrics: dict[str, float]) -> None:
        self.write(" ".join([title, *(f"{name} {value:.6g}" for name, value in metrics.items())]))

    def track(self, metrics: dict[str, float], step: int) -> None:
        if self.with_tracking:
            self.accelerator.log(metrics, step=step)

    def track_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Sends a picture to the trackers that support pictures; each has its own interface."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif tracker.name in ("wandb", "swanlab"):
                tracker.log_images({name: [picture]}, step=step)


class LossWindow:
    """Loss terms and gradient norms since the last log line, or since the start of the epoch.

    Attributes:
        terms: loss terms of the current step, averaged over its batches, on the device.
        num_batches: number of batches so far.
    """

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self.num_batches = 0
        self._steps: list[dict[str, float]] = []
        self._start = time.perf_counter()

    def add_batch(self, terms: dict[str, Tensor], group: int) -> None:
        """Adds one of the `group` batches of a step."""
        self.num_batches += 1
        self.terms = {name: self.terms.get(name, 0) + value / group for name, value in terms.items()}

    def add_step(self, values: dict[str, float]) -> None:
        self.terms = {}
        self._steps.append(values)

    def means(self) -> dict[str, float]:
        """The mean of each term, over the steps that have it: with elastic budgets, a dense step has fewer."""
        names = dict.fromkeys(name for step in self._steps for name in step)
        return {name: fmean(step[name] for step in self._steps if name in step) for name in names}

    def seconds(self) -> float:
        return time.perf_counter() - self._start

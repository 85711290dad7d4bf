"""Checkpoints of a training run: written whole or not at all, found again, and thinned out."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_vssm_prune.training.ema import ExponentialMovingAverage


STATE, EMA = "training_state.json", "ema.safetensors"


@dataclass
class TrainingState:
    """How far a run is.

    Attributes:
        updates: of the weights, so far.
        evaluated_epochs: epochs that are over, with their evaluation.
        best: the figures of the best evaluation, empty before the first.
        history: the figures of every evaluation.
    """

    updates: int = 0
    evaluated_epochs: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def write_json(content: Any, file: Path) -> None:
    """Writes a JSON file at once."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """All whole checkpoints of a run, the oldest first."""
    folders = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in output_dir.glob("checkpoint-*")}
    updates = {folder: int(match[1]) for folder, match in folders.items() if match and (folder / STATE).is_file()}
    return sorted(updates, key=lambda folder: updates[folder])


def find_resumed(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: the newest for "latest" (None where there is none yet), else the folder named.

    Raises:
        FileNotFoundError: the folder is not a whole checkpoint.
    """
    if resume == "latest":
        return max(find_checkpoints(output_dir), key=lambda folder: int(folder.name.split("-")[1]), default=None)
    if not (Path(resume) / STATE).is_file():
        raise FileNotFoundError(
            f"--resume {resume}: no checkpoint there (a folder with {STATE}); "
            f"in {output_dir} are {[folder.name for folder in find_checkpoints(output_dir)]}."
        )
    return Path(resume)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a killed run was writing: a checkpoint, or a model that `save_for_hub` had not yet moved."""
    for pattern in (".unfinished-*", ".saving-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainingState,
    ema: ExponentialMovingAverage | None,
    settings: dict[str, Any],
    keep: int,
) -> Path:
    """Saves everything that an exact continuation needs as `checkpoint-<updates>`; all but the newest `keep` go.

    It is called on every process. `settings` are those that a continuation has to share.

    Raises:
        OSError: it cannot be written; earlier checkpoints are as they were.
    """
    folder = output_dir / f"checkpoint-{state.updates}"
    unfinished = output_dir / f".unfinished-{folder.name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if ema is not None:
                weights = ema.model.state_dict()
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished / EMA)
            write_json({"settings": settings, "state": asdict(state)}, unfinished / STATE)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is one or another, by who meets it
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"The checkpoint could not be saved to {folder}: {error}") from error
    if accelerator.is_main_process:
        for old in find_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(
    accelerator: Accelerator, folder: Path, ema: ExponentialMovingAverage | None, settings: dict[str, Any]
) -> TrainingState:
    """Loads what `save_checkpoint` wrote into the prepared model and optimizer and into the average.

    Raises:
        ValueError: the checkpoint is damaged, or of a run with other settings.
    """
    settings = json.loads(json.dumps(settings))  # tuples became lists in the file, too
    with _named_where_damaged(folder):
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        saved_settings, state = saved["settings"], TrainingState(**saved["state"])
    if differing := [name for name in settings if settings[name] != saved_settings.get(name)]:
        listed = "; ".join(f"{name} was {saved_settings.get(name)} and is {settings[name]}" for name in differing)
        raise ValueError(f"{folder} cannot be continued exactly, the run was set up differently: {listed}.")
    with _named_where_damaged(folder):
        accelerator.load_state(str(folder))
        if ema is not None:
            ema.model.load_state_dict(load_file(folder / EMA))
    return state


@contextmanager
def _named_where_damaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # JSON, zip, pickle, torch and safetensors each have their own
        others = [other.name for other in find_checkpoints(folder.parent) if other.name != folder.name]
        advice = (
            f"go on from another with --resume, there are {others}" if others else "there is no other in its folder"
        )
        raise ValueError(f"The checkpoint {folder} is damaged: {error!r}; {advice}.") from error

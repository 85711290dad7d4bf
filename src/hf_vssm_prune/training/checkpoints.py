"""Checkpoints of a training run: writing them completely or not at all, finding them, and removing old ones.

A checkpoint has the complete model, EMA weights and optimizer state as safetensors, under the plain model's names,
regardless of the number of processes of the run that wrote it and of whether it used DDP or FSDP. It has no random
state, because all randomness in a step depends only on the seed and the position in the run.
"""

import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_vssm_prune.hub import saving
from hf_vssm_prune.training.arguments import RunArguments
from hf_vssm_prune.training.arguments.parsing import check_output_folder
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.distribution import (
    load_whole_model_state,
    load_whole_optimizer_state,
    whole_model_state,
    whole_optimizer_state,
)
from hf_vssm_prune.training.ema import ExponentialMovingAverage
from hf_vssm_prune.training.run_settings import compare_settings, with_new_names


if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

RESULTS = "all_results.json"  # written at the end of a run
STATE, MODEL, EMA, OPTIMIZER = "training_state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"  # prefixes of folders that are being written or moved
LOCK = ".run.lock"  # locked while a run writes to the folder


@dataclass
class TrainingState:
    """The progress of a run.

    Attributes:
        steps: number of optimizer steps so far.
        evaluated_epochs: number of finished and evaluated epochs.
        best: the metrics of the best evaluation, empty before the first.
        history: the metrics of every evaluation.
    """

    steps: int = 0
    evaluated_epochs: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def find_checkpoints(output_dir: Path, after: int = -1) -> list[Path]:
    """All complete checkpoints of a run, or those after a number of steps, the oldest first."""
    folders = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in output_dir.glob("checkpoint-*")}
    steps = {folder: int(match[1]) for folder, match in folders.items() if match and (folder / STATE).is_file()}
    return sorted((folder for folder in steps if steps[folder] > after), key=lambda folder: steps[folder])


def say_last(output_dir: Path) -> str:
    """A sentence that names the last checkpoint."""
    checkpoints = find_checkpoints(output_dir)
    return f"The last checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."


def find_resumed(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint to resume from: the newest for "latest" (None if there is none yet), otherwise the given folder.

    Raises:
        FileNotFoundError: the folder is not a complete checkpoint.
    """
    if resume == "latest":
        return next(reversed(find_checkpoints(output_dir)), None)
    if not (Path(resume) / STATE).is_file():
        raise FileNotFoundError(
            f"--resume {resume} is not a checkpoint (a folder with {STATE}); the checkpoints in {output_dir} are "
            f"{[folder.name for folder in find_checkpoints(output_dir)]}."
        )
    return Path(resume)


def check_output_dir(run: RunArguments) -> None:
    """Raises an error if two runs would be mixed in a folder.

    Raises:
        FileExistsError: the folder has checkpoints or results, and the run does not resume.
        NotADirectoryError: the folder or one of its parents is a file.
        PermissionError: there is no permission to write there.
        FileNotFoundError: the checkpoint to resume from does not exist.
    """
    output_dir = Path(run.output_dir)
    check_output_folder("output_dir", output_dir)
    _restore_replaced(output_dir)
    if run.resume is not None:
        find_resumed(output_dir, run.resume)
    elif found := find_checkpoints(output_dir):
        raise FileExistsError(
            f"--output_dir {output_dir} contains checkpoints of an earlier run (the last is {found[-1].name}): "
            "resume it with --resume latest, or choose another folder."
        )
    elif (output_dir / RESULTS).exists():
        raise FileExistsError(
            f"--output_dir {output_dir} contains the results of an earlier run ({RESULTS}), which had no checkpoints: "
            "choose another folder."
        )


@contextmanager
def only_run_in(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Creates a run's folder, makes sure that no other run writes to it in the meantime, and removes what a killed run
    has left there. It is called on every process.

    Raises:
        FileExistsError: another run is writing to it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if not accelerator.is_main_process:
        yield
        return
    lock = _lock(output_dir)
    try:
        remove_unfinished(output_dir)
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                (output_dir / LOCK).unlink()
            os.close(lock)  # unlocks it


def _lock(output_dir: Path) -> int | None:
    """Locks a run's folder, and returns the lock file's descriptor; None if there is none. If the folder cannot be
    locked, this is logged.

    The lock belongs to this process alone: the system removes it if the process is killed, even while workers of its
    data loaders live on.

    Raises:
        FileExistsError: another process has locked it.
    """
    if sys.platform == "win32":
        return None
    descriptor = None
    try:
        descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None and error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise FileExistsError(
                f"--output_dir {output_dir}: another run is writing to this folder; wait until it ends, or choose "
                "another folder. If it was on a machine that has crashed since, a network file system may still have "
                f"its lock: remove {output_dir / LOCK}."
            ) from error
        logger.warning(
            "%s cannot be locked (%s), so a second run in this folder would not be noticed.", output_dir, error
        )
    return descriptor


def _restore_replaced(output_dir: Path) -> None:
    """Moves back the checkpoint that a killed run had moved away, but not yet replaced."""
    for replaced in output_dir.glob(f"{REPLACED}*"):
        folder = output_dir / replaced.name.removeprefix(REPLACED)
        if not folder.exists():
            with suppress(FileNotFoundError):  # another process of the run was faster
                replaced.rename(folder)


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a killed run was writing or replacing: a checkpoint, or a model that `save_for_hub` had not yet
    moved into place."""
    for pattern in (f"{UNFINISHED}*", f"{REPLACED}*", f"{saving.UNFINISHED}*", f"*/{saving.UNFINISHED}*"):
        for folder in output_dir.glob(pattern):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Removes a folder, or a link to one."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class TrainedParts:
    """The parts of a checkpoint, apart from the progress of the run.

    Attributes:
        model: the model prepared by Accelerate.
        optimizer: torch's optimizer for that model.
        ema: the moving average of the weights, if there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ExponentialMovingAverage | None


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainingState,
    parts: TrainedParts,
    settings: dict[str, Any],
    keep: int,
) -> Path:
    """Saves everything that is needed to resume exactly as `checkpoint-<steps>`, and removes all but the newest `keep`
    checkpoints.

    It is called on every process. `settings` are those that a resumed run has to share.

    Raises:
        OSError: it cannot be written; earlier checkpoints are unchanged.
    """
    folder = output_dir / f"checkpoint-{state.steps}"
    unfinished = output_dir / f"{UNFINISHED}{folder.name}"
    files = {MODEL: whole_model_state(parts.model)}
    if parts.ema is not None:
        files[EMA] = whole_model_state(parts.ema.model)
    files[OPTIMIZER], parameter_groups = whole_optimizer_state(parts.model, parts.optimizer)
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            for name, tensors in files.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished / name)
            content = {
                "settings": settings,
                "state": asdict(state),
                "parameter_groups": parameter_groups,
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            write_json(content, unfinished / STATE)
            for name in files:
                saving.share_as(unfinished / STATE, unfinished / name)
            _replace_folder(folder, unfinished)
        except (OSError, SafetensorError) as error:  # a full disk raises either, depending on who is writing
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"The checkpoint could not be saved to {folder}: {error}") from error
        for old in find_checkpoints(output_dir)[:-keep]:
            _remove(old)
    accelerator.wait_for_everyone()
    return folder


def _replace_folder(folder: Path, by: Path) -> None:
    """Moves another folder into a folder's place, and only then removes the old one."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        folder.rename(replaced)
    by.rename(folder)
    if replaced.exists():
        _remove(replaced)


def load_checkpoint(
    accelerator: Accelerator, folder: Path, parts: TrainedParts, settings: dict[str, Any]
) -> tuple[TrainingState, list[str]]:
    """Loads what `save_checkpoint` wrote.

    Returns:
        The progress of the run, and a description of the settings in `SPREAD` that differ.

    Raises:
        ValueError: the checkpoint is damaged, or from a run with other settings.
        OSError: the system cannot read it.
    """
    with _named_where_damaged(folder):
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = TrainingState(**with_new_names(saved["state"]))
        state.history = [with_new_names(each) for each in state.history]
        fixed, spread = compare_settings(saved["settings"], settings)
    if fixed:
        listed = "; ".join(fixed)
        raise ValueError(f"{folder} cannot be resumed exactly, because the run was set up differently: {listed}.")
    with _named_where_damaged(folder):
        load_whole_model_state(parts.model, load_file(folder / MODEL))
        if parts.ema is not None:
            load_whole_model_state(parts.ema.model, load_file(folder / EMA))
        moments = load_file(folder / OPTIMIZER)
        load_whole_optimizer_state(parts.model, parts.optimizer, moments, saved["parameter_groups"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
    return state, spread


@contextmanager
def _named_where_damaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # JSON, torch and safetensors each raise their own
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise OSError(f"The checkpoint {folder} cannot be read: {error}") from error
        others = [other.name for other in find_checkpoints(folder.parent) if other.name != folder.name]
        advice = (
            f"remove it, and --resume latest will resume from an earlier one: {others}"
            if others
            else "there is no other checkpoint in its folder"
        )
        raise ValueError(f"The checkpoint {folder} is damaged: {error!r}; {advice}.") from error

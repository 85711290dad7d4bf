"""Resumes a training run from one of its checkpoints, on all of its processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_vssm_prune.hub.saving import CONFIG
from hf_vssm_prune.training.checkpoints import (
    TrainedParts,
    TrainingState,
    find_checkpoints,
    find_resumed,
    load_checkpoint,
)
from hf_vssm_prune.training.distribution import of_all_processes


def resume_run(
    accelerator: Accelerator,
    output_dir: Path,
    resume: str,
    parts: TrainedParts,
    settings: dict[str, Any],
    write: Callable[[str], None],
) -> TrainingState:
    """Loads a checkpoint into the parts of a run. It is called on every process.

    Args:
        accelerator: that of the run.
        output_dir: the folder of the run.
        resume: the checkpoint's folder, or "latest"; see `find_resumed`.
        parts: receive the checkpoint's weights and optimizer state.
        settings: those that the run has to share with the checkpoint's.
        write: writes a line to the log.

    Returns:
        The progress of the run; that of a new run if there is no checkpoint yet.

    Raises:
        ValueError: see `load_checkpoint`; there are later checkpoints than this one; or the processes would not resume
            at the same step.
    """
    state = TrainingState()
    if (folder := find_resumed(output_dir, resume)) is None:
        write(f"No checkpoint in {output_dir} yet: starting a new run.")
    else:
        state, differing = load_checkpoint(accelerator, folder, parts, settings)
        if later := find_checkpoints(output_dir, after=state.steps):
            raise ValueError(
                f"{folder} is from step {state.steps}, but {output_dir} has later checkpoints, up to "
                f"{later[-1].name}, from which --resume latest would resume: remove them, or copy {folder.name} to "
                "another --output_dir."
            )
        if differing:
            write(
                "Each step has the same images as before, but drop path and the mixing of images use other random "
                f"numbers: {differing}."
            )
        write(f"Resuming from {folder}, after {state.steps} steps.")
    _agree_on_progress(accelerator, output_dir, state)
    return state


def _agree_on_progress(accelerator: Accelerator, output_dir: Path, state: TrainingState) -> None:
    """Makes sure that all processes resume at the same place. On hosts that do not share a disk, each has its own copy
    of the checkpoint, and only the first has the best model so far.

    Raises:
        ValueError: they do not.
    """
    steps = of_all_processes(accelerator, state.steps)
    if len(set(steps)) > 1:
        raise ValueError(
            f"The processes would resume after different numbers of steps ({sorted(set(steps))}): copy the newest "
            f"checkpoint to {output_dir} on each host."
        )
    has_best, *_ = of_all_processes(accelerator, (output_dir / "best" / CONFIG).is_file())
    if not has_best:
        # The checkpoint was copied from another folder, without the best model so far, or the run was killed while it
        # replaced that model.
        state.best = {}

"""Stopping a run from outside: the first signal asks it to save and end, a second one ends it at once."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType


STOPPING = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def leave_stopping_to_main_process(worker: int) -> None:
    """For a data loader's workers: launchers and terminals send signals to them as well, and without its workers the
    main process could not go on to the end of the step, after which it saves. They end when it does.

    Args:
        worker: its number, as `DataLoader` gives it to its `worker_init_fn`.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class TrainingInterruptedError(Exception):
    """A run was stopped by a signal after it saved a checkpoint.

    Attributes:
        signal: which one.
        checkpoint: from which the run can go on.
    """

    def __init__(self, received: signal.Signals, checkpoint: Path) -> None:
        super().__init__(
            f"Stopped by {received.name}; everything is saved in {checkpoint}. Resume with --resume latest."
        )
        self.signal = received
        self.checkpoint = checkpoint


class StopRequest:
    """Within this context SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is closed) are noted rather than obeyed;
    those that are ignored, as SIGHUP is under nohup, still are.

    Attributes:
        received: the signal, or None so far.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread set handlers; elsewhere signals act as they always do.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

"""Stops a run on a signal: the first signal makes it save and exit, a later one ends it immediately."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType


STOPPING = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_SIGNAL = 0.5  # seconds after the first signal in which another one is not a second request


def leave_stopping_to_main_process(worker: int) -> None:
    """Makes a data loader's worker ignore signals, which launchers and terminals send to workers as well. The main
    process still needs its workers to finish the step before it saves; they end when it does.

    Args:
        worker: the worker's number, which `DataLoader` passes to its `worker_init_fn`.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class TrainingInterruptedError(Exception):
    """A run was stopped by a signal after it saved a checkpoint.

    Attributes:
        signal: the signal.
        checkpoint: the checkpoint from which the run can be resumed.
    """

    def __init__(self, received: signal.Signals, checkpoint: Path) -> None:
        super().__init__(
            f"Stopped by {received.name}; everything is saved in {checkpoint}. Resume with --resume latest."
        )
        self.signal = received
        self.checkpoint = checkpoint


class StopRequest:
    """Inside this context, SIGINT (Ctrl-C), SIGTERM and SIGHUP (closed terminal) are recorded instead of ending the
    process. Signals that were ignored before, such as SIGHUP under nohup, are still ignored.

    Attributes:
        received: the signal received, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python allows only the main thread to set handlers; in other threads, signals have their usual effect.
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
        # If a scheduler or terminal signals all processes, those of a launcher get the signal from the launcher, too.
        for other in self._previous:
            signal.signal(other, signal.SIG_IGN)
        time.sleep(SAME_SIGNAL)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

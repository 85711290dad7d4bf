"""Retries requests if the Hub is busy or fails temporarily; huggingface_hub does this only for some requests."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError


# Errors for missing or broken connections, from the library that huggingface_hub uses, which has had several names.
_HTTP = next(base.__module__.partition(".")[0] for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
TransportError: type[Exception] = sys.modules[_HTTP].TransportError
WAITS = (1.0, 3.0)  # seconds before the second and the third attempt
BUSY = (429, 500, 502, 503, 504)

Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Returns what `ask` returns, after at most three attempts."""
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            if not _is_worth_another_attempt(error):
                raise
            time.sleep(wait)
    return ask()


def _is_worth_another_attempt(error: BaseException) -> bool:
    causes = list(_causes(error))
    # huggingface_hub raises this one after its own retries.
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return False
    if any(isinstance(cause, TransportError) for cause in causes):
        return True
    return any(isinstance(cause, HfHubHTTPError) and cause.response.status_code in BUSY for cause in causes)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

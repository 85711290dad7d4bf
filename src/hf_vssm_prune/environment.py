"""Switches that are environment variables. Nothing is imported here: wheels are built where nothing is installed."""

import os


OFF = ("", "0", "false", "f", "no", "n", "off")


def is_switched_on(variable: str) -> bool:
    """Whether the environment variable is set to anything but nothing, 0, false, no or off, in whatever case."""
    return os.environ.get(variable, "").strip().lower() not in OFF

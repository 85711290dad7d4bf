"""Paths as users write them."""

import os
from pathlib import Path


def local_path(name_or_path: str | Path) -> Path:
    """The path that a name would have, with `~` replaced by a home folder.

    A `~name` that is nobody's home stays as it is, since it may be the name of a file or of a data set;
    `Path.expanduser` would raise a RuntimeError.
    """
    return Path(os.path.expanduser(name_or_path))

"""Directories that are made once: complete or absent, whoever asks and whenever a process dies."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """`directory`, filled by `make` when it is not there yet; processes that want the same one wait for the first.

    It is made under another name, flushed to disk and renamed, so that a directory with this name is complete.
    """
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f".{directory.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.is_dir():
            return directory
        partial = directory.parent / f".{directory.name}.partial"
        if partial.exists():  # a killed run's: the lock is ours, so nobody writes there any more
            shutil.rmtree(partial)
        partial.mkdir()
        make(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        os.rename(partial, directory)
    return directory

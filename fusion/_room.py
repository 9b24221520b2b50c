"""A disk that takes no more, said in a sentence with the file that was being written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusion._say import size

# The system's words for a disk, a quota or a limit that is reached, which libraries pass on with or without errno.
SYSTEM = tuple(os.strerror(one) for one in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# torch.save and numpy.save say only that they could not write.
CUT_OFF = ("PytorchStreamWriter failed writing", "iostream error", " requested and ")


@contextmanager
def room(*directories: Path) -> Iterator[None]:
    """Writing below these directories; ValueError, naming the file that was written last, when the disk is full."""
    try:
        yield
    except Exception as error:
        reason = _full(error)
        if reason is None:
            raise
        place = _last_written(directories)
        free = size(shutil.disk_usage(place if place.exists() else place.parent).free)
        raise ValueError(
            f"the disk took no more ({reason}) at {place}, {free} free there; make room, the same command continues"
        ) from error


def _full(error: BaseException | None) -> str | None:
    """Why nothing more could be written; None when the error, and what led to it, is another one."""
    while error is not None:
        said = str(error)
        found = next((words for words in SYSTEM if words in said), None)
        if found is not None:
            return found
        if any(words in said for words in CUT_OFF):
            return "a file was cut off"
        error = error.__cause__ or error.__context__
    return None


def _last_written(directories: tuple[Path, ...]) -> Path:
    """The newest file below that a step or a conversion writes; without any, the first directory."""
    found = (file for directory in directories for file in directory.rglob("*") if file.is_file())
    own = (file for file in found if file.suffix != ".lock" and ".ranks" not in file.parts)
    files = [file for file in own if not file.name.startswith("traceback-")]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=directories[0])

"""How a sentence about a wrong name ends: with the nearest right one."""

import difflib
import re
from collections.abc import Iterable

SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def nearest(given: object, allowed: Iterable[str]) -> str:
    """The end of a sentence: "; did you mean 'density'?", or what is allowed when nothing is near."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    if not names:
        return "; there are none"
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"; there is {shown}" if len(names) == 1 else f"; there are {shown}"


def size(count: float) -> str:
    """A number of bytes as people say it: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError(count)


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def bytes_of(text: str | int, what: str = "size") -> int:
    """The number of bytes in "512MiB", "5GB" or 1000000; ValueError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(text), re.IGNORECASE)
    if found is None or found[2].lower() not in SIZES:
        raise ValueError(f"{what} is '{text}'; a size like 512MiB or 5GB is needed")
    return int(float(found[1]) * SIZES[found[2].lower()])

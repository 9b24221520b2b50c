"""The loops of _loops.c, built by the machine's own C compiler when they are first called, and kept for later.

Loading them takes a millisecond; a just-in-time compiler would take as long to start as a small merge. Each loop has a
twin in plain torch that gives the same bits, for other devices and for machines without a compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-funroll-loops", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fPIC", "-shared")
NATIVE = ("-march=native",)
SOURCE = Path(__file__).with_name("_loops.c")
ONE_BUILDS = threading.Lock()
POINTER, COUNT, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "count_upper": (POINTER, COUNT, COUNT, POINTER, POINTER),
    "count_lower": (POINTER, COUNT, COUNT, POINTER, POINTER, COUNT, POINTER),
    "count_nonzero": (POINTER, COUNT, COUNT, POINTER),
    "read_finite": (COUNT, COUNT, COUNT, POINTER),
    "uniform": (COUNT, COUNT, POINTER, COUNT),
    "block_products": (POINTER, COUNT, COUNT, POINTER, POINTER, POINTER, POINTER),
    "block_squares": (POINTER, COUNT, COUNT, POINTER, POINTER),
    "sample": (POINTER, COUNT, COUNT, POINTER, POINTER, COUNT, COUNT, POINTER, POINTER, POINTER, POINTER),
    "weigh": (POINTER, COUNT, COUNT, POINTER, POINTER, NUMBER, POINTER),
    "agree": (POINTER, COUNT, COUNT, POINTER, POINTER, POINTER, POINTER, POINTER, NUMBER, POINTER, POINTER),
    "ranks": (POINTER, COUNT, COUNT, POINTER, POINTER),
}


def loops(x: Tensor) -> ctypes.CDLL | None:
    """The compiled loops, for a tensor they can work on; None where plain torch has to do. Calls release the GIL."""
    return library() if x.device.type == "cpu" and x.dtype == torch.float32 else None


def address(x: Tensor | None) -> int | None:
    """Where the entries of a contiguous tensor lie."""
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops, built unless they lie in the cache already; None, with a warning, where they can't be."""
    with ONE_BUILDS:
        return _library()


def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        _without("there is no C compiler ($CC, or cc)")
        return None
    # another processor, another compiler or another source is another library
    what = (SOURCE.read_bytes(), compiler.encode(), platform.machine().encode(), _processor())
    name = f"loops-{hashlib.sha256(b'|'.join(what)).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("FUSION_CACHE") or Path.home() / ".cache" / "fusion")
    if not (folder / name).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed whole: several processes may build it
                built = Path(scratch) / name
                said = _build(compiler, NATIVE, built) and _build(compiler, (), built)
                if said:
                    _without(f"{compiler} does not compile {SOURCE}: {said}")
                    return None
                os.replace(built, folder / name)
        except OSError as error:
            _without(f"they can't be kept: {error}")
            return None
    found = ctypes.CDLL(str(folder / name))
    for function, arguments in SIGNATURES.items():
        one = getattr(found, function)  # by index it would be another one every time
        one.argtypes, one.restype = arguments, COUNT if function == "read_finite" else None
    return found


def _build(compiler: str, more: tuple[str, ...], out: Path) -> str:
    """What the compiler complained of; nothing where all went well."""
    done = subprocess.run([compiler, *FLAGS, *more, "-o", str(out), str(SOURCE)], capture_output=True, text=True)
    return done.stderr.strip() or f"status {done.returncode}" if done.returncode else ""


def _processor() -> bytes:
    """What tells one processor's instructions from another's, where the system says it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_bytes().splitlines() if file.exists() else []
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), platform.processor().encode())


def _without(why: str) -> None:
    warnings.warn(f"merging goes without compiled loops and takes longer, with the same result: {why}", stacklevel=3)

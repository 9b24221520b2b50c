"""What DeepSpeed leaves behind: locks of compilations that were killed, and shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion._deepspeed import STALE, check_operators

from .processes import environments

LEAVES = """
import deepspeed
from pathlib import Path
from fusion._deepspeed import forget_shared_memory

deepspeed.init_distributed("gloo", verbose=False)
segments = Path("/dev/shm").glob
print(len([*segments("deepspeed_*_PORT_*")]), end=" ")
forget_shared_memory()
print(len([*segments("deepspeed_*_PORT_*")]))
"""


def test_no_shared_memory_outlives_a_run():
    (environ,) = environments(1)
    code = LEAVES.replace("PORT", environ["MASTER_PORT"])
    said = subprocess.run(
        [sys.executable, "-c", code], env=environ | {"LOCAL_SIZE": "1"}, capture_output=True, text=True, timeout=300
    )
    assert said.stdout.split()[-2:] == ["1", "0"], said.stderr[-2000:]


def operator(root: Path) -> Path:
    lock = root / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_lock_of_a_killed_compilation_is_named(tmp_path):
    lock = operator(tmp_path)
    with pytest.raises(ValueError, match=f"'deepspeed_shm_comm' has been compiling for .* delete {lock}"):
        check_operators(tmp_path, now=lock.stat().st_mtime + STALE + 1)


def test_a_young_lock_may_be_somebody_elses(tmp_path):
    lock = operator(tmp_path)
    assert f"delete {lock}" in (check_operators(tmp_path) or "")


def test_a_lock_that_a_process_holds_is_waited_for(tmp_path):
    lock = operator(tmp_path)
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        assert check_operators(tmp_path, now=lock.stat().st_mtime + STALE + 1) is None
    finally:
        os.close(descriptor)


def test_without_locks_nothing_is_said(tmp_path):
    assert check_operators(tmp_path) is None

"""A process whose work is done ends with its libraries' handlers, and without Python's own last act."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from fusion import _ending

class Kept:
    def __del__(self):
        print("taken apart")

kept = sys.modules["kept"] = Kept()
atexit.register(print, "handled")
print("worked")
{}
"""


@pytest.mark.parametrize(
    ("last", "said", "status"),
    [
        ("_ending.done()", ["worked", "handled"], 0),
        ("", ["worked", "handled", "taken apart"], 0),
        ("sys.exit(3)", ["worked", "handled", "taken apart"], 3),
    ],
    ids=["done", "not done", "failed"],
)
def test_only_what_is_done_ends_at_once(last, said, status):
    found = subprocess.run([sys.executable, "-c", PROGRAM.format(last)], capture_output=True, text=True)
    assert (found.stdout.split("\n")[:-1], found.returncode, found.stderr) == (said, status, "")


@pytest.mark.parametrize(("words", "status"), [(["list", "post"], 0), (["list", "nothing"], 1)])
def test_the_command_says_all_and_keeps_its_status(words, status):
    """Its output goes to a pipe, so it lies in a buffer when the command ends."""
    found = subprocess.run([sys.executable, "-m", "fusion.cli", *words], capture_output=True, text=True)
    assert found.returncode == status
    assert ("lines" in found.stdout) == (status == 0) and ("unknown room" in found.stderr) == (status == 1)

"""How a process ends whose work is all done: without Python's own last act.

That takes torch's thousand modules apart, which is a tenth of a second, of a fast merge a twentieth; and in it a rank's
threads have ended the process with SIGABRT, which a launcher takes for a failed job.
"""

import atexit
import os
import sys
from contextlib import suppress

_done = False


def done() -> None:
    """From here on nothing is left but what libraries registered for the end, and the exit status is 0."""
    global _done
    _done = True


@atexit.register  # before any library's handler, so that it runs after all of them
def _leave() -> None:
    if _done:
        with suppress(BrokenPipeError):  # of `fusion list | head`
            sys.stdout.flush()
        os._exit(0)

"""Progress of a long loop: a rich bar on rank 0 of a terminal, else a plain line at most every ten seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Generic, TypeVar

from fusion._say import duration

T = TypeVar("T")
EVERY = 10.0  # seconds between plain lines


class Progress(Generic[T]):
    """Iterate over it, or call `advance` in a `with` block."""

    def __init__(self, work: Iterable[T] | int, description: str, total: int | None = None, show: bool = True):
        # an int stands for that many rounds
        self.work: Iterable[T] = range(work) if isinstance(work, int) else work  # type: ignore[assignment]
        self.total = total if total is not None else len(self.work) if isinstance(self.work, Sized) else None
        self.description, self.show = description, show
        self.done = 0
        self.start = self.told = time.monotonic()
        self.bar = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task(description, total=self.total)
            self.bar.start()

    def advance(self, count: int = 1) -> None:
        """`count` more rounds are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif self.show and time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            of = f"/{self.total} ({100 * self.done // self.total} %)" if self.total else ""
            print(f"  {self.description}: {self.done}{of}, {duration(self.told - self.start)}", flush=True)

    def close(self) -> None:
        """Takes the bar away from the terminal's control; called twice it does nothing."""
        if self.bar is not None:
            self.bar.stop()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.work:
                yield item
                self.advance()

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

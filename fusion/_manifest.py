"""What of a merge is done: one line a tensor with its checksum and readings, written as soon as the tensor is."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Manifest:
    """The lines of all ranks; this rank appends to its own file."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory = directory
        self.lock = threading.Lock()
        self.lines: dict[str, dict[str, Any]] = {}
        self.reload()
        own = directory / f"manifest-{rank}.jsonl"
        if own.exists():  # what a kill cut off is taken away, or the next line would be part of it
            os.truncate(own, own.read_bytes().rfind(b"\n") + 1)
        self.file = open(own, "a", encoding="utf-8")

    def reload(self) -> None:
        """Reads what all ranks have written so far; a line without its end is not written yet."""
        for file in sorted(self.directory.glob("manifest-*.jsonl")):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                entry = json.loads(line)
                self.lines[entry["tensor"]] = entry

    def has(self, key: str) -> bool:
        return key in self.lines

    def checksum(self, key: str) -> str:
        return str(self.lines[key]["checksum"])

    def add(self, key: str, checksum: str, action: str, readings: Mapping[str, Tensor]) -> None:
        """Notes that the tensor (or range of one) lies in its file."""
        found = {name: value.tolist() for name, value in readings.items()}
        entry = {"tensor": key, "checksum": checksum, "action": action, "readings": found}
        with self.lock:
            self.lines[key] = entry
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def close(self) -> None:
        self.file.close()

"""What a torch.save file says, read without running any of it and without its numbers: where each tensor lies.

A pickle builds its objects by calling what it names. Here every name gives an inert record, tensors give the place
of their bytes in the file, so that neither a class to trust nor the package that wrote the file is needed.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SIZES = {
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


@dataclass(frozen=True)
class Stored:
    """A tensor's numbers in a file: row-major from byte `offset` when `contiguous`."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    contiguous: bool = True

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class _Storage:
    offset: int
    dtype: str


class Record:
    """What a pickle says of an object whose class is left alone: its arguments, its state, what was put into it."""

    kind = ""
    args: tuple = ()

    def __init__(self, *args: Any, **fields: Any):
        self.args = args
        self.__dict__.update(fields)

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __call__(self, *args: Any) -> Record:
        return Record(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class _Table(dict):
    """A dictionary that takes attributes, as a state dict's `_metadata`."""


def plain(value: Any) -> Any:
    """The value of an enumeration's member, anything else as it is."""
    return value.args[0] if isinstance(value, Record) and len(value.args) == 1 else value


def read_torch(file: Path, start: int = 0, length: int | None = None) -> Any:
    """The object that torch.save wrote to bytes [start, start + length) of a file, its tensors as `Stored`.

    Raises ValueError for a file that is cut off, compressed or of the format before torch 1.6.
    """
    with file.open("rb") as stream:
        window = _Window(stream, start, length)
        try:
            archive = zipfile.ZipFile(window)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{file} is cut off or was not written by torch.save as a zip file: {error}") from error
        roots = [name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError(f"{file} is a zip file, but not one that torch.save wrote")
        root = roots[0]
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError(f"{file} holds big-endian numbers, which are not read")

        def locate(key: str) -> int:
            entry = archive.getinfo(f"{root}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{file}: {entry.filename} is compressed; numbers are read in place")
            window.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", window.read(4))
            return start + entry.header_offset + 30 + name + extra

        return _Reader(io.BytesIO(archive.read(f"{root}data.pkl")), file, locate).load()


def read_plain(file: Path) -> Any:
    """The object that pickle.dump wrote to a file, its classes as records; ValueError for one that is cut off."""
    with file.open("rb") as stream:
        try:
            return _Reader(stream, file, lambda key: 0).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:  # all that damage may raise
            raise ValueError(f"{file} is cut off or was not written by pickle: {error}") from error


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path, locate: Callable[[str], int]):
        super().__init__(stream)
        self.file, self.locate = file, locate
        self.known: dict[str, Any] = {
            "collections.OrderedDict": _Table,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed_tensor,
            "torch._utils._rebuild_parameter": lambda data, *rest: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
            "torch._tensor._rebuild_from_type_v2": lambda build, kind, args, state: build(*args),
            **{f"builtins.{one.__name__}": one for one in (set, frozenset, list, dict, tuple, int, float, complex)},
        }

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted in self.known:
            return self.known[dotted]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in SIZES:
            return name
        return type(name, (Record,), {"kind": dotted})

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        return _Storage(self.locate(str(key)), dtype if isinstance(dtype, str) else dtype.kind)

    def tensor(self, storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Stored:
        return self.typed_tensor(storage, offset, shape, stride, False, None, storage.dtype)

    def typed_tensor(
        self, storage: _Storage, offset: int, shape: Any, stride: Any, grad: bool, hooks: Any, dtype: str, *rest: Any
    ) -> Stored:
        expected, contiguous = 1, True
        for size, step in zip(reversed(shape), reversed(stride)):
            contiguous &= size == 1 or step == expected
            expected *= size
        place = storage.offset + offset * SIZES.get(dtype, 0)
        return Stored(self.file, place, dtype, tuple(shape), contiguous and dtype in SIZES)


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of their own."""

    def __init__(self, stream: BinaryIO, start: int, length: int | None):
        self.stream, self.start = stream, start
        self.length = stream.seek(0, io.SEEK_END) - start if length is None else length
        self.seek(0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.length}[whence]
        return self.stream.seek(self.start + origin + offset) - self.start

    def tell(self) -> int:
        return self.stream.tell() - self.start

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self.tell())
        return self.stream.read(left if size is None or size < 0 else min(size, left))

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

"""A lazy GGUF reader over mmap: header and tensor directory of all split parts, no weight byte.

Own parser because the gguf package's reader fails on tensor types it doesn't know, ignores split
parts and decodes every string up front. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mlacli.errors import GgufError
from mlacli.loading import quant_types
from mlacli.loading.quant_types import QType

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Far above what files hold, far below what hurts; the format's own limit for keys is 65535.
_LONGEST_NAME, _LONGEST_TEXT, _MOST_ITEMS = 65535, 1 << 26, 1 << 24
_DAMAGED = "the file is damaged or incomplete: download or convert it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` row-major (GGUF's ne reversed), `offset` from byte 0."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    part: int
    offset: int

    @property
    def n_rows(self) -> int:
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows

    @property
    def row_bytes(self) -> int:
        return self.qtype.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes


class _Cursor:
    """Reads little-endian values from a mapped file and names the offset where it ends early."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def skip(self, n: int, what: str) -> int:
        """The offset before `n` bytes of `what`, which must lie inside the file."""
        at = self.at
        if n > self.size - at:
            raise GgufError(
                f"{self.path.name} ends inside {what} at offset {at}: {n} bytes wanted, "
                f"{self.size - at} left",
                _DAMAGED,
            )
        self.at = at + n
        return at

    def scalar(self, code: str, what: str) -> Any:
        fmt = "<" + code
        return struct.unpack_from(fmt, self.data, self.skip(struct.calcsize(fmt), what))[0]

    def string(self, what: str, most: int) -> str:
        """Text of at most `most` bytes: a length that is a lie must not fill the memory."""
        n = self.scalar("Q", f"the length of {what}")
        at = self.skip(n, what)
        if n > most:
            raise GgufError(f"{what} has {n} bytes at offset {at}, more than {most}", _DAMAGED)
        return self.data[at : at + n].decode("utf-8", "replace")

    def skip_value(self, kind: int, what: str) -> None:
        if kind in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[kind]), what)
        elif kind == _STRING:
            self.skip(self.scalar("Q", what), what)
        elif kind == _ARRAY:
            item = self.scalar("I", what)
            count = self.scalar("Q", what)
            if item in _SCALARS:
                self.skip(struct.calcsize(_SCALARS[item]) * count, what)
            elif item == _STRING:
                self._skip_strings(count, what)
            else:
                raise GgufError(f"{what} is an array of unknown value type {item}", _DAMAGED)
        else:
            raise GgufError(
                f"{what} has unknown value type {kind} at offset {self.at - 4}", _DAMAGED
            )

    def _skip_strings(self, count: int, what: str) -> None:
        # 129k tokens are common, so this loop is kept bare.
        unpack, data, at, last = struct.Struct("<Q").unpack_from, self.data, self.at, self.size - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + unpack(data, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        self.at = min(at, self.size)
        raise GgufError(
            f"{self.path.name} ends inside {what} at offset {self.at}: {count} strings wanted",
            _DAMAGED,
        )


class Metadata(Mapping[str, Any]):
    """GGUF key-value pairs, decoded on access; `override_kv` pairs replace the file's."""

    def __init__(self, cursor: _Cursor | None = None) -> None:
        self._cursor = cursor
        self._where: dict[str, tuple[int, int]] = {}
        self._decoded: dict[str, Any] = {}

    def index(self, n_pairs: int) -> None:
        """Record where each of the next `n_pairs` values lies, decoding none."""
        cursor = self._cursor
        assert cursor is not None
        for i in range(n_pairs):
            key = cursor.string(f"key {i}", _LONGEST_NAME)
            kind = cursor.scalar("I", f"the type of {key}")
            if key in self._where:
                raise GgufError(f"key {key} appears twice, at offset {cursor.at}", _DAMAGED)
            self._where[key] = kind, cursor.at
            cursor.skip_value(kind, key)

    def override(self, pairs: Mapping[str, Any]) -> None:
        self._decoded.update(pairs)
        self._where.update(dict.fromkeys(pairs, (-1, 0)))

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            kind, at = self._where[key]
            assert self._cursor is not None
            self._cursor.at = at
            self._decoded[key] = self._value(self._cursor, kind, key)
        return self._decoded[key]

    @staticmethod
    def _value(cursor: _Cursor, kind: int, key: str) -> Any:
        if kind == _STRING:
            return cursor.string(key, _LONGEST_TEXT)
        if kind != _ARRAY:
            return cursor.scalar(_SCALARS[kind], key)
        item, count = cursor.scalar("I", key), cursor.scalar("Q", key)
        if count > _MOST_ITEMS:
            raise GgufError(f"{key} is an array of {count}, more than {_MOST_ITEMS}", _DAMAGED)
        if item == _STRING:
            return [cursor.string(key, _LONGEST_TEXT) for _ in range(count)]
        return list(
            struct.unpack_from(
                f"<{count}{_SCALARS[item]}",
                cursor.data,
                cursor.skip(struct.calcsize(_SCALARS[item]) * count, key),
            )
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; GgufError when it is missing without a default, or no number."""
        value = self.get(key, default)
        if value is None:
            raise GgufError(f"metadata key {key} is missing", "the architecture needs it")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
            raise GgufError(f"metadata key {key} is {value!r}, not a number", _DAMAGED)
        return value

    def integer(self, key: str, default: int | None = None, low: int = 0) -> int:
        """An integer of at least `low`."""
        value = self.number(key, default)
        if value != int(value) or value < low:
            raise GgufError(
                f"metadata key {key} is {value}, not an integer of at least {low}", _DAMAGED
            )
        return int(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise GgufError(f"metadata key {key} is {value!r}, not a string", _DAMAGED)
        return value


class GgufFile:
    """One model: metadata of the first part, tensors of all parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = Metadata()
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: list[mmap.mmap] = []

    @classmethod
    def open(cls, path: str | Path, override_kv: Mapping[str, Any] | None = None) -> Self:
        """The model at `path`, any part of a split set; only headers are read."""
        file = cls(_first_part(Path(path)))
        try:
            file._read_parts()
        except BaseException:
            file.close()
            raise
        file.metadata.override(override_kv or {})
        return file

    @property
    def arch(self) -> str:
        return self.metadata.text("general.architecture")

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) for part in self._parts)

    def data(self, info: TensorInfo) -> memoryview:
        """The tensor's bytes, still in the file: pages are read as they are touched."""
        return memoryview(self._parts[info.part])[info.offset : info.offset + info.nbytes]

    def rows(self, info: TensorInfo) -> Any:
        """The same as uint8 [*leading axes, bytes of a row], or what slices like it."""
        import numpy as np

        return np.frombuffer(self.data(info), np.uint8).reshape(*info.shape[:-1], info.row_bytes)

    def close(self) -> None:
        for part in self._parts:
            try:
                part.close()
            except BufferError:  # a weight still points into it; the map goes with that weight
                continue
        self._parts = []

    def _read_parts(self) -> None:
        self.metadata = self._read_part(self.path, 0)
        count = self.metadata.integer("split.count", 1)
        if count > 1:
            _check_part(self.metadata, self.path, 0)
        for i in range(1, count):
            path = _part_path(self.path, i, count)
            _check_part(self._read_part(path, i), path, i)
        total = self.metadata.integer("split.tensors.count", len(self.tensors))
        if count > 1 and total != len(self.tensors):
            raise GgufError(
                f"{count} parts hold {len(self.tensors)} tensors, metadata says {total}", _DAMAGED
            )

    def _read_part(self, path: Path, part: int) -> Metadata:
        try:
            with path.open("rb") as f:
                self._parts.append(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            hint = (
                "all parts of a split model must lie in one folder"
                if _PART_NAME.fullmatch(path.name)
                else "check the path given by -m"
            )
            raise GgufError(f"no file {path}", hint) from None
        except ValueError:
            raise GgufError(f"{path.name} is empty", _DAMAGED) from None
        except OSError as e:
            raise GgufError(
                f"can't open {path}: {e.strerror}", "check the path and rights"
            ) from None
        cursor = _Cursor(self._parts[-1], path)
        if cursor.data[:4] != b"GGUF":
            raise GgufError(f"{path.name} is not a GGUF file", "convert the model to GGUF first")
        cursor.at = 4
        version = cursor.scalar("I", "the version")
        if version not in (2, 3):
            big = version & 0xFFFF == 0 and version != 0
            raise GgufError(
                f"{path.name} is {'big-endian' if big else f'GGUF version {version}'}, "
                "mlacli reads little-endian versions 2 and 3",
                "convert the model again with a current llama.cpp",
            )
        n_tensors, n_pairs = cursor.scalar("Q", "the counts"), cursor.scalar("Q", "the counts")
        metadata = Metadata(cursor)
        metadata.index(n_pairs)
        directory = cursor.at
        alignment = metadata.integer("general.alignment", 32, low=1)
        cursor.at = directory  # reading a value moves the cursor
        found = [self._read_info(cursor, i, part) for i in range(n_tensors)]
        start = -(-cursor.at // alignment) * alignment
        for info in found:
            self._add(info, start, alignment, cursor)
        return metadata

    @staticmethod
    def _read_info(cursor: _Cursor, i: int, part: int) -> TensorInfo:
        name = cursor.string(f"the name of tensor {i}", _LONGEST_NAME)
        what = f"the entry of tensor {name}"
        n_dims = cursor.scalar("I", what)
        if not 1 <= n_dims <= 4:
            raise GgufError(
                f"tensor {name} has {n_dims} dimensions at offset {cursor.at - 4}", _DAMAGED
            )
        ne = [cursor.scalar("Q", what) for _ in range(n_dims)]
        qtype = quant_types.from_id(cursor.scalar("I", what), name)
        return TensorInfo(name, tuple(reversed(ne)), qtype, part, cursor.scalar("Q", what))

    def _add(self, info: TensorInfo, start: int, alignment: int, cursor: _Cursor) -> None:
        if info.name in self.tensors:
            raise GgufError(f"tensor {info.name} appears twice", _DAMAGED)
        if 0 in info.shape or info.shape[-1] % info.qtype.block:
            raise GgufError(
                f"tensor {info.name} has shape {list(info.shape)}, whose rows don't fill blocks of "
                f"{info.qtype.block} ({info.qtype.name})",
                _DAMAGED,
            )
        if info.offset % alignment:
            raise GgufError(
                f"tensor {info.name} lies at offset {info.offset}, not a multiple of {alignment}",
                _DAMAGED,
            )
        end = start + info.offset + info.nbytes
        if end > cursor.size:
            raise GgufError(
                f"{cursor.path.name} ends at offset {cursor.size} inside tensor {info.name}, "
                f"which reaches to {end}",
                _DAMAGED,
            )
        self.tensors[info.name] = TensorInfo(
            info.name, info.shape, info.qtype, info.part, start + info.offset
        )


_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def _first_part(path: Path) -> Path:
    match = _PART_NAME.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")


def _part_path(first: Path, i: int, count: int) -> Path:
    match = _PART_NAME.fullmatch(first.name)
    if match is None or int(match[3]) != count:
        raise GgufError(
            f"{first.name} is one of {count} parts, but its name doesn't end in "
            f"-00001-of-{count:05d}.gguf",
            "keep the names that gguf-split gave the parts",
        )
    return first.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf")


def _check_part(metadata: Metadata, path: Path, i: int) -> None:
    """GgufError unless the part at `path` says that it is number `i`, counted from 0."""
    number = metadata.integer("split.no", -1, low=-1)
    if number != i:
        raise GgufError(
            f"{path.name} says it is part {number + 1}, not {i + 1}",
            "parts are mixed up: keep the names that gguf-split gave them",
        )

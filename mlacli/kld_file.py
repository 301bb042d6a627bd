"""llama.cpp's file of a base model's log-probabilities, written and read.

`_logits_`, then int32 n_ctx, n_vocab, n_chunks, the tokens of all chunks, and for each scored token
a row: float32 scale and lowest log-probability, then one uint16 per vocabulary entry (padded to an
even count). log p = scale * code + lowest; what lies more than 16 below the likeliest is clipped.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mlacli.errors import MlacliError

Floats = NDArray[np.float32]
Codes = NDArray[np.uint16]
Tokens = NDArray[np.int32]

_MAGIC = b"_logits_"
_HEAD = struct.Struct("<8siii")
_RANGE = np.float32(16)
_HINT = "write it anew with --kl-divergence-base and without --kl-divergence"


def n_scored(n_ctx: int) -> int:
    """Scored tokens per chunk: the second half, less the one that has no successor."""
    return n_ctx - 1 - n_ctx // 2


def _row_width(n_vocab: int) -> int:
    """uint16 of one row: 4 for the two floats, and an even count of codes."""
    return 2 * ((n_vocab + 1) // 2) + 4


def log_softmax(logits: Floats) -> Floats:
    """log p [m, V]; the sum of exponentials in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    log_p: Floats = shifted - np.log(total).astype(np.float32)
    return log_p


def encode_rows(logits: Floats) -> Codes:
    """[m, V] -> [m, row width]."""
    m, n_vocab = logits.shape
    log_p = log_softmax(logits)
    top = log_p.max(-1, keepdims=True)
    lowest = np.maximum(log_p.min(-1, keepdims=True), top - _RANGE)
    scale = ((top - lowest) / np.float32(65535)).astype(np.float32)
    codes = np.zeros_like(log_p)
    np.divide(log_p - lowest, scale, out=codes, where=(log_p > lowest) & (scale > 0))
    rows = np.zeros((m, _row_width(n_vocab)), "<u2")
    rows[:, :4] = np.concatenate([scale, lowest], axis=-1).astype("<f4").view("<u2")
    rows[:, 4 : 4 + n_vocab] = np.rint(codes)
    return rows


def decode_rows(rows: Codes, n_vocab: int) -> Floats:
    """[m, row width] -> log p [m, V]."""
    floats = np.ascontiguousarray(rows[:, :4]).view("<f4")
    scale, lowest = floats[:, :1], floats[:, 1:]
    log_p: Floats = scale * rows[:, 4 : 4 + n_vocab].astype(np.float32) + lowest
    return log_p


class BaseWriter:
    """Writes a base file; under its name only once it is complete."""

    def __init__(self, path: str | Path, tokens: Tokens, n_vocab: int) -> None:
        """`tokens` [n_chunks, n_ctx] as they were before any BOS took a chunk's first place."""
        self._path, self._part = Path(path), Path(f"{path}.part")
        self._n_rows = len(tokens) * n_scored(tokens.shape[1])
        try:
            self._file = self._part.open("wb")
        except OSError as e:
            raise MlacliError(
                f"can't write {self._part}: {e.strerror}", "check --kl-divergence-base"
            ) from e
        self._file.write(_HEAD.pack(_MAGIC, tokens.shape[1], n_vocab, len(tokens)))
        self._file.write(tokens.astype("<i4").tobytes())

    def write(self, logits: Floats) -> None:
        """The next scored rows [m, V]."""
        self._file.write(encode_rows(logits).tobytes())
        self._n_rows -= len(logits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            assert self._n_rows == 0, "a row was not written"
            os.replace(self._part, self._path)
        else:
            self._part.unlink()


class BaseFile:
    """A base file that is there: checked against its own size, rows read when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                head = file.read(_HEAD.size)
        except OSError as e:
            raise MlacliError(f"can't read {path}: {e.strerror}", "check the base file") from e
        if len(head) < _HEAD.size or head[:8] != _MAGIC:
            raise MlacliError(f"{path} is no file of log-probabilities", _HINT)
        _, self.n_ctx, self.n_vocab, self.n_chunks = _HEAD.unpack(head)
        if min(self.n_ctx - 2, self.n_vocab, self.n_chunks) < 1:
            raise MlacliError(
                f"{path} claims {self.n_chunks} chunks of {self.n_ctx} tokens from a vocabulary "
                f"of {self.n_vocab}", _HINT,
            )  # fmt: skip
        self._shape = (self.n_chunks, n_scored(self.n_ctx), _row_width(self.n_vocab))
        self._start = _HEAD.size + 4 * self.n_chunks * self.n_ctx
        rows = self._shape[0] * self._shape[1] * self._shape[2] * 2
        if size != self._start + rows:
            raise MlacliError(f"{path} has {size} bytes instead of {self._start + rows}", _HINT)
        shape = (self.n_chunks, self.n_ctx)
        self.tokens: Tokens = np.memmap(self.path, "<i4", "r", _HEAD.size, shape)
        self._rows: Codes = np.memmap(self.path, "<u2", "r", self._start, self._shape)

    def log_probs(self, chunk: int, start: int, stop: int) -> Floats:
        """log p [stop - start, V] of scored tokens start..stop of a chunk."""
        return decode_rows(np.asarray(self._rows[chunk, start:stop]), self.n_vocab)

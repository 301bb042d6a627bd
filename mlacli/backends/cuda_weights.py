"""A CUDA rank's weights: tiles for products, GGUF bytes for the rest; upload and download.

A weight travels in pieces of whole row tiles: into page-locked memory, to a staging area on the
device, and from there repacked to its place, so that its GGUF bytes are never there as a whole.
One that stays in host memory is repacked on the device too, piece by piece, and comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlacli.backends.cuda_array import Array
from mlacli.loading.drawn import NUMBERS, Drawn
from mlacli.loading.quant_types import QType
from mlacli.loading.tiles import HEADER, ROWS, TiledShape, tiled_shape
from mlacli.loading.untile import edge_blocks, has_foreign_groups, untile
from mlacli.parallel.host_stream import READ_ONCE

if TYPE_CHECKING:
    from mlacli.backends.cuda_device import Device
    from mlacli.parallel.shards import Shard

Bytes = NDArray[np.uint8]
PIECE = 32 << 20  # most bytes that travel at once
_ROOM = 60 << 20  # on the device for a piece and its tiles


@dataclass(frozen=True, slots=True, eq=False)
class CudaWeight:
    """A shard of local `shape` on the device: in `tiles`, or as GGUF bytes where that is None."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    held: Array
    layout: TiledShape | None = None  # None = GGUF bytes [*leading, bytes of a row]
    skip: int = 0  # columns of the first block that are another rank's
    first: int = 0  # of its indices along the leading axis, where that is cut
    # Blocks shared with other ranks, as the file has them: read when they are asked for.
    edges: Callable[[], Bytes] | None = None
    block: HostBlock | None = None  # of host memory, where `held` lies; None = on the device

    @property
    def reachable(self) -> bool:
        """Whether kernels can read it where it lies."""
        return self.block is None or self.block.mapped

    @property
    def tiles(self) -> Array | None:
        return None if self.layout is None else self.held

    @property
    def raw(self) -> Array:
        assert self.layout is None, f"{self.name} lies in tiles"
        return self.held

    @property
    def row_bytes(self) -> int:
        return self.qtype.row_bytes(self.skip + self.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class HostBlock:
    """Host memory for one weight: as the device knows it (page-locked and mapped), as NumPy does.

    `mapped` False: it could not be page-locked, only copies reach it.
    """

    array: Array
    memory: Bytes
    mapped: bool


def begin(device: Device, shards: Sequence[Shard]) -> None:
    """Compiles what uploading `shards` launches, all at once."""
    types = {s.qtype.id for s in shards if s.tiled}
    with device.prepared():
        for qtype in sorted(types):
            device.launch("repack_tiles", (1,), 128, WTYPE=qtype)


def upload(device: Device, raw: Bytes, shard: Shard, tiled: bool = True) -> CudaWeight:
    """Sends `raw` [..., bytes of a row] to the device; returns before it is there.

    Launches on the device's stream find it. With `tiled` false nothing is repacked.
    """
    skip, first = shard.skip, shard.start if shard.axis == 0 else 0
    if shard.host:
        return _keep(device, raw, shard, tiled and shard.tiled)
    if not (tiled and shard.tiled):
        held = device.take(raw.shape, np.uint8)
        at = 0
        for piece in _pieces(_three_axes(raw), PIECE):
            _send(device, _bytes_at(held.ptr + at, piece.raw.nbytes), piece.raw)
            at += piece.raw.nbytes
        return CudaWeight(shard.tensor, shard.shape, shard.qtype, held, None, skip, first)
    layout = tiled_shape(shard.shape, shard.qtype, skip)
    tiles = device.take((layout.nbytes,), np.uint8)
    _repack(device, tiles, _three_axes(raw), layout, shard, skip)
    edges = _edges(raw, shard, skip)
    return CudaWeight(shard.tensor, shard.shape, shard.qtype, tiles, layout, skip, first, edges)


def download(device: Device, w: CudaWeight) -> Bytes:
    """The bytes that were uploaded, out of what the device holds."""
    if w.block is None:
        held: Bytes = device.get(w.held)
    else:
        device.synchronize()
        held = w.block.memory.reshape(w.held.shape).copy()
    if w.layout is None:
        return held
    edges = None if w.edges is None else w.edges()
    return untile(held, w.shape, w.qtype, w.skip, edges)


def near(ops: Any, w: CudaWeight, n: int) -> Any:
    """`w`, or a copy in scratch where `n` tokens would read it over the link several times."""
    if w.block is None or n <= READ_ONCE:
        return w
    held = ops.new((w.held.nbytes,), np.uint8)
    ops.device.bring(held, w.held)
    return replace(w, held=held.reshape(*w.held.shape), block=None)


def _repack(
    device: Device, tiles: Array, raw: Bytes, layout: TiledShape, shard: Shard, skip: int
) -> None:
    device.send(tiles[:HEADER], np.zeros(HEADER, np.uint8))
    staging = device.spare(PIECE)
    for piece in _pieces(raw, staging.nbytes):
        _send(device, staging[: piece.raw.nbytes], piece.raw)
        first = piece.lead * layout.n_row_tiles + piece.row // ROWS
        n_row_tiles = piece.raw.shape[0] * -(-piece.raw.shape[1] // ROWS)
        device.launch(
            "repack_tiles", (n_row_tiles * -(-layout.n_col_tiles // 4),), 128, tiles, staging,
            first, raw.shape[1], layout.all_row_tiles, shard.shape[-1], skip, layout.n_col_tiles,
            raw.shape[2], WTYPE=shard.qtype.id,
        )  # fmt: skip


def _keep(device: Device, raw: Bytes, shard: Shard, tiled: bool) -> CudaWeight:
    """The weight in host memory, in the bytes that it would have on the device."""
    skip, first = shard.skip, shard.start if shard.axis == 0 else 0
    if not tiled:
        block = device.take_host(raw.shape)
        _keep_bytes(device, block.memory, raw)
        return CudaWeight(
            shard.tensor, shard.shape, shard.qtype, block.array, None, skip, first, None, block
        )
    layout = tiled_shape(shard.shape, shard.qtype, skip)
    block = device.take_host((layout.nbytes,))
    _repack_back(device, block.memory, _three_axes(raw), layout, shard)
    edges = _edges(raw, shard, skip)
    return CudaWeight(
        shard.tensor, shard.shape, shard.qtype, block.array, layout, skip, first, edges, block
    )


def _edges(raw: Any, shard: Shard, skip: int) -> Callable[[], Bytes] | None:
    """What download() needs of blocks that are only partly this rank's; None where all are.

    Of a model's experts they are gigabytes, so that only rows which are copies anyway, of several
    tensors, don't wait until then.
    """
    if not has_foreign_groups(shard.shape[-1], shard.qtype, skip):
        return None
    if len(shard.sources) == 1:
        return partial(edge_blocks, raw, shard.qtype)
    found = edge_blocks(raw, shard.qtype)
    return lambda: found


def _keep_bytes(device: Device, out: Bytes, raw: Any) -> None:
    """`raw` into host memory; what the device draws comes from there."""
    if not isinstance(raw, Drawn):
        device.keep(out, raw)
        return
    spare, flat, at = device.spare(PIECE), out.reshape(-1), 0
    for piece in _pieces(_three_axes(raw), spare.nbytes):
        staged = spare[: piece.raw.nbytes]
        _send(device, staged, piece.raw)
        device.send_back(flat[at : at + staged.nbytes], staged)
        at += staged.nbytes


def _repack_back(device: Device, out: Bytes, raw: Bytes, layout: TiledShape, shard: Shard) -> None:
    """Tiles of `raw` [leading, rows, bytes] into `out`, through the device.

    Each piece becomes a small weight of its own there, whose planes are copied to their places; the
    header, raised by all pieces, comes last.
    """
    spare = device.spare(_ROOM)
    part = raw.nbytes / (raw.nbytes + layout.nbytes)
    most = min(PIECE, int((spare.nbytes - 6 * HEADER) * part)) // HEADER * HEADER
    staging, tiles = spare[:most], spare[most:]
    device.send(tiles[:HEADER], np.zeros(HEADER, np.uint8))
    for piece in _pieces(raw, most):
        lead, rows, _ = piece.raw.shape
        own = tiled_shape((lead, rows, shard.shape[-1]), shard.qtype, shard.skip)
        assert own.nbytes <= tiles.nbytes, "a piece has room on the device"
        _send(device, staging[: piece.raw.nbytes], piece.raw)
        device.launch(
            "repack_tiles", (own.all_row_tiles * -(-layout.n_col_tiles // 4),), 128, tiles, staging,
            0, rows, own.all_row_tiles, shard.shape[-1], shard.skip, layout.n_col_tiles,
            raw.shape[2], WTYPE=shard.qtype.id,
        )  # fmt: skip
        before = piece.lead * layout.n_row_tiles + piece.row // ROWS
        for name, (at, nbytes) in own.planes.items():
            start, whole = layout.planes[name]
            to = start + before * (whole // layout.all_row_tiles)
            device.send_back(out[to : to + nbytes], tiles[at : at + nbytes])
    device.send_back(out[:HEADER], tiles[:HEADER])


def _send(device: Device, target: Array, raw: Any) -> None:
    """What the device draws itself is not sent: kernels/draw.cu."""
    if not isinstance(raw, Drawn) or target.ptr % 4:
        device.send(target, np.asarray(raw))
        return
    (lead, rows, width), kind = raw.shape, raw.source
    fields = [place | mask << 16 | rest << 24 for place, mask, rest in kind.fields]
    device.launch(
        "draw_bytes", (min(1 << 16, -(-raw.nbytes // 1024)),), 256, target, lead, rows, width,
        raw.first, *raw.strides[:2], _signed(kind.key), kind.scale, kind.qtype.nbytes,
        *map(_signed, [*fields, *[0xFFFF] * (4 - len(fields))]),
        DRAW=NUMBERS.get(kind.qtype.name, 3),
    )  # fmt: skip


def _signed(word: int) -> int:
    """32 bits as an int parameter."""
    return word - (word >> 31 << 32)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole leading indices from `lead` on, or rows of one from `row` on, a multiple of 16."""

    lead: int
    row: int
    raw: Bytes  # [leading, rows, bytes]


def _pieces(raw: Bytes, most: int) -> Iterator[_Piece]:
    """`raw` [leading, rows, bytes] in pieces of at most `most` bytes."""
    lead, rows, row_bytes = raw.shape
    at_once = most // max(1, rows * row_bytes)
    if at_once:
        for i in range(0, lead, at_once):
            yield _Piece(i, 0, raw[i : i + at_once])
        return
    step = most // (ROWS * row_bytes) * ROWS
    assert step, "the plan leaves no room for a row of tiles"
    for i in range(lead):
        for row in range(0, rows, step):
            yield _Piece(i, row, raw[i : i + 1, row : row + step])


def _three_axes(raw: Any) -> Any:
    """[leading, rows, bytes] without a copy: only vectors and matrices lack axes."""
    assert raw.ndim <= 3
    return raw[(None,) * (3 - raw.ndim)]


def _bytes_at(ptr: int, nbytes: int) -> Array:
    return Array.dense(ptr, (nbytes,), np.uint8)

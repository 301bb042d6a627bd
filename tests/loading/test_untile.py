"""Tiles back into GGUF bytes. Weakest link: kit/tiled.py, held against gguf by test_tiles.py."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from kit.tiled import TILED, cut_row, qtype_of, shapes, tile_weight
from kit.toy_gguf import random_weight

from mlacli.loading import untile as untile_module
from mlacli.loading.tiles import is_tiled, packed_columns, tiled_shape
from mlacli.loading.untile import edge_blocks, has_foreign_groups, untile


@pytest.mark.parametrize("name", TILED)
def test_tiles_give_the_file_s_bytes_again(name, monkeypatch) -> None:
    monkeypatch.setattr(untile_module, "_CHUNK", 3000)  # several turns
    rng = np.random.default_rng(90 + int(T[name]))
    for shape, skip in shapes(name):
        q = qtype_of(name)
        held, _ = cut_row(name, shape[-1], skip)
        raw = random_weight((*shape[:-1], held), T[name], rng).view(np.uint8)
        raw = raw.reshape(*shape[:-1], -1)
        edges = edge_blocks(raw, q) if has_foreign_groups(shape[-1], q, skip) else None
        back = untile(tile_weight(raw, name, shape, skip), shape, q, skip, edges)
        assert back.shape == raw.shape
        wrong = np.argwhere(back != raw)
        assert not len(wrong), f"{shape} skip {skip}: {len(wrong)} bytes differ, first {wrong[0]}"


def test_every_exponent_of_mxfp4_comes_back() -> None:
    raw = np.zeros((1, 256 * 17), np.uint8)
    raw[0, ::17] = np.arange(256)
    q = qtype_of("MXFP4")
    with np.errstate(over="ignore"):
        back = untile(tile_weight(raw, "MXFP4", (1, 8192)), (1, 8192), q, 0)
    assert np.array_equal(back, raw)


def test_a_changed_byte_in_memory_shows() -> None:
    q, shape = qtype_of("Q4_K"), (16, 256)
    raw = random_weight(shape, T.Q4_K, np.random.default_rng(1)).view(np.uint8)
    buffer = tile_weight(raw, "Q4_K", shape)
    for plane, (at, size) in tiled_shape(shape, q).planes.items():
        if size:
            broken = buffer.copy()
            broken[at + size // 2] ^= 1
            assert not np.array_equal(untile(broken, shape, q, 0), raw), plane


def test_bytes_in_tiles() -> None:
    q4_k, q6_k = qtype_of("Q4_K"), qtype_of("Q6_K")
    # 16 x 256: four tiles of 512 + 64 bytes, 64 bytes of d, each plane on 256 bytes
    assert tiled_shape((16, 256), q4_k).nbytes == 256 + 4 * 512 + 4 * 64 + 256
    assert tiled_shape((2, 17, 512), q6_k).nbytes == 256 + 2 * 2 * (8 * (512 + 256 + 64) + 2 * 32)
    assert packed_columns(160, q4_k, 32) == 256 and packed_columns(160, q4_k, 128) == 512
    assert packed_columns(96, qtype_of("Q8_0")) == 128
    assert not is_tiled("token_embd.weight", (64, 256), q4_k)
    assert is_tiled("output.weight", (64, 256), q4_k) and not is_tiled("x", (64,), q4_k)

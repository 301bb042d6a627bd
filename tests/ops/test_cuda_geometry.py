"""Which form a product of one token takes."""

from types import SimpleNamespace
from typing import Any

import pytest
from kit.tiled import qtype_of

from mlacli.backends.cuda_geometry import piece_down_geometry, piece_geometry, row_tiles

H200 = SimpleNamespace(capability=90, n_sm=132)


def weight(name: str, *shape: int) -> Any:
    return SimpleNamespace(shape=shape, qtype=qtype_of(name), skip=0, block=None)


@pytest.mark.parametrize(
    ("rows", "columns", "name", "by_pieces"),
    [
        (7168, 8192, "Q4_K", True),  # V3's attn_output on one of two ranks
        (7168, 16384, "Q4_K", False),  # and whole
        (7168, 9216, "Q6_K", True),
        (7168, 18432, "Q6_K", False),
        (6144, 12288, "Q6_K", False),  # GLM-5
        (129280, 7168, "Q6_K", True),  # a head
        (2048, 2048, "Q4_K", False),  # not wide
    ],
)
def test_wide_weights_come_in_pieces_while_x_fits_registers(
    rows: int, columns: int, name: str, by_pieces: bool
) -> None:
    w = weight(name, rows, columns)
    assert (piece_geometry(H200, [w], row_tiles(rows)) is not None) == by_pieces


@pytest.mark.parametrize(
    ("columns", "n_used", "by_pieces"), [(1024, 8, True), (2048, 8, False), (2048, 4, True)]
)
def test_so_do_experts(columns: int, n_used: int, by_pieces: bool) -> None:
    down, shared = weight("Q6_K", 256, 7168, columns), weight("Q6_K", 7168, columns)
    assert (piece_down_geometry(H200, down, shared, n_used) is not None) == by_pieces

"""When a plan keeps types that tiles make larger as in the file: not on a GPU's cost of context."""

from dataclasses import replace
from typing import Any

import pytest

from mlacli.flags import LOADED, library_values, to_params
from mlacli.loading import synthetic
from mlacli.loading.presets import preset, type_name
from mlacli.loading.synthetic import SyntheticFile
from mlacli.loading.tiles import GROWN
from mlacli.prepare import Prepared, prepare

G = 1 << 30


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> SyntheticFile:
    """V2-Lite's first layers, experts of IQ2_XXS but for the down projections of Q3_K."""

    def rare(quant: str, tensor: str, shape: tuple[int, ...], layers: int) -> str:
        if "_exps" not in tensor:
            return type_name(quant, tensor, shape, layers)
        return "Q3_K" if "down" in tensor else "IQ2_XXS"

    monkeypatch.setattr(synthetic, "type_name", rare)
    return SyntheticFile(replace(preset("v2lite:8"), f=1536))


def plan(file: SyntheticFile, vram: int, **flags: Any) -> Prepared:
    params = to_params(library_values(LOADED, flags))
    split = replace(params.split, vram=(vram,), margin=0)
    return prepare(file, replace(params, split=split), refuse_oversize=False)


def tiled(prepared: Prepared) -> set[str]:
    experts = (s for s in prepared.plan.shards if s.tensor.endswith("_exps.weight"))
    return {s.qtype.name for s in experts if s.tiled}


def words(prepared: Prepared) -> str:
    return " ".join(" ".join(row) for row in prepared.effective if row[0] == "weights")


def test_tiles_where_they_cost_no_context(file: SyntheticFile) -> None:
    whole = plan(file, 80 * G, ctx_size=4096)
    assert not whole.plan.small and tiled(whole) == {"IQ2_XXS", "Q3_K"}
    assert "in tiles" in words(whole)
    need = whole.plan.ranks[0].total
    assert tiled(plan(file, need, ctx_size=4096)) == {"IQ2_XXS", "Q3_K"}

    tight = plan(file, need - (1 << 20), ctx_size=4096)
    rank = tight.plan.ranks[0]
    assert tight.plan.small and not tiled(tight) & set(GROWN)
    assert rank.total <= rank.capacity and rank.weights < 0.8 * whole.plan.ranks[0].weights
    assert "as in the file" in words(tight)


def test_host_memory_holds_them_as_in_the_file(file: SyntheticFile) -> None:
    on_host = plan(file, 80 * G, ctx_size=4096, cpu_moe=True).plan
    experts = [s for s in on_host.shards if s.tensor.endswith("_exps.weight")]
    assert experts and all(s.host and s.raw for s in experts)
    assert sum(r.host for r in on_host.ranks) == sum(s.nbytes for s in experts)

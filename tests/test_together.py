"""Several models loaded at once, as --compare does: memory, and threads in turns."""

from dataclasses import replace
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

import mlacli
from mlacli.errors import MemoryBudgetError
from mlacli.flags import to_params
from mlacli.prepare import prepare, together

V3 = Path(__file__).parent / "golden" / "models" / "v3.gguf"


def test_models_that_fit_alone_share_the_float32_copies():
    one = prepare(V3, to_params({"ctx_size": 256}))
    rank = one.plan.ranks[0]

    def with_capacity(capacity):
        return replace(one, plan=replace(one.plan, ranks=(replace(rank, capacity=capacity),)))

    roomy = with_capacity(10 * rank.resident)
    assert together([roomy, roomy])[0] is roomy
    tight = with_capacity(2 * rank.resident - rank.dequant // 2)
    assert rank.dequant > 1
    found = together([tight, tight])
    assert [p.plan.ranks[0].dequant for p in found] == [rank.dequant // 2] * 2
    with pytest.raises(MemoryBudgetError) as caught:
        together([with_capacity(rank.resident - rank.dequant)] * 4)
    assert "all 4 modes are loaded at once" in caught.value.hint
    one.gguf.close()


def test_each_engine_has_its_own_threads_when_it_is_its_turn():
    def blas_threads():
        return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}

    with (
        mlacli.load(V3, ctx_size=256, threads=2) as alone,
        mlacli.load(V3, ctx_size=256, threads=2, device="cpu,cpu", split_mode="graph") as two,
    ):
        assert blas_threads() == {1}
        alone.take_turn()
        assert blas_threads() == {2}
        two.take_turn()
        assert blas_threads() == {1}

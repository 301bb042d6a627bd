"""Weights in host memory: the kernels on the CPU, copies as late as they may come; no GPU."""

from typing import Any

import numpy as np
import pytest
from kit.compare import nmse
from kit.golden_files import EXACT, FILES, golden
from kit.simt_device import why_not
from kit.simt_engine import device_of, simulated

from mlacli.parallel import host_stream

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs here")
CMOE: dict[str, Any] = {"cpu_moe": True}
Run = tuple[np.ndarray, np.ndarray, Any]


def run(**flags: Any) -> Run:
    """(decode of two tokens, prefill of nine, the device) of a golden model."""
    tokens, _ = golden("v2lite")
    with (
        pytest.MonkeyPatch.context() as patch,
        simulated(patch, FILES["v2lite"], **EXACT, **flags) as engine,
    ):
        decoded = np.stack([engine.decode(token) for token in tokens[:2]])
        return decoded, engine.logits(tokens[:9]), device_of(engine)


@pytest.fixture(scope="module")
def on_device() -> Run:
    return run()


@pytest.mark.parametrize("flags", [CMOE, {"override_tensor": ("ffn_up_exps=CPU",)}], ids=str)
def test_results_are_those_of_experts_on_the_device(
    monkeypatch: pytest.MonkeyPatch, on_device: Run, flags: dict[str, Any]
) -> None:
    """Bit for bit, for chunks of two experts."""
    monkeypatch.setattr(host_stream, "SLOT_BYTES", 24 << 10)
    got = run(**flags)
    assert got[2].host_bytes and got[2].link.nbytes
    assert np.array_equal(got[0], on_device[0]) and np.array_equal(got[1], on_device[1])


def test_what_could_not_be_locked_is_copied(on_device: Run) -> None:
    """Few tokens sum in another order: the shared expert comes after the routed ones."""
    got = run(mapped=False, **CMOE)
    assert nmse(got[0], on_device[0]) <= 1e-9 and np.array_equal(got[1], on_device[1])

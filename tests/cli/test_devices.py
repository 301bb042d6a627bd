"""devices without a GPU, and with a probe that stands in for one."""

import json
import sys
import types

import pytest

from mlacli.backends import cuda_devices, cuda_ways


@pytest.fixture
def no_gpu(monkeypatch):
    """CuPy without a device, whatever this machine has."""
    monkeypatch.setattr(cuda_devices, "device_count", lambda: 0)

    def refuse(name):
        from mlacli.errors import BackendError

        raise BackendError(f"device {name} is not available: no driver here", "install one")

    monkeypatch.setattr(cuda_devices, "device_memory", refuse)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two measured GPUs of 40 GiB; what was asked for is noted in `asked`."""
    from dataclasses import make_dataclass

    gpu = make_dataclass(
        "Gpu", ["name", "model", "capability", "n_sm", "total", "free", "memory_rate", "host_rate"]
    )
    probe = make_dataclass("Probe", ["gpus", "access", "links", "how", "why", "sums", "nccl"])
    gpus = tuple(gpu(f"cuda{i}", "Toy", 90, 132, 40 << 30, 39 << 30, 4e12, 50e9) for i in (0, 1))
    access, links = ((False, True), (True, False)), ((0.0, 380e9), (381e9, 0.0))
    sums = {2048: 2.25, 7168: 2.5}
    module = types.ModuleType("mlacli.backends.cuda_probe")
    module.asked = []

    def measured(indices):
        module.asked.append(("measured", list(indices)))
        return probe(gpus, access, links, "p2p", "they reach", sums, "works, 11.9 us")

    def listed(indices):
        module.asked.append(("listed", list(indices)))
        return probe(tuple(gpus), access, (), "", "", {}, "")

    module.measured, module.listed = measured, listed
    monkeypatch.setitem(sys.modules, "mlacli.backends.cuda_probe", module)
    monkeypatch.setattr("mlacli.backends.cuda_probe", module, raising=False)
    monkeypatch.setattr(cuda_devices, "device_count", lambda: 2)
    monkeypatch.setattr(cuda_devices, "device_memory", lambda name: (40 << 30, 39 << 30))
    monkeypatch.setattr(cuda_devices, "device_capability", lambda name: 90)
    monkeypatch.setattr(cuda_ways, "obstacle", lambda way, devices: "")
    return module


def test_without_a_gpu_it_says_so(mlacli, no_gpu):
    done = mlacli("devices")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[2].startswith("cpu")
    assert done.out.splitlines()[-1] == "no GPU: no driver here (install one)"
    assert json.loads(mlacli("devices", "--json").out)["no_gpu"] == "no driver here (install one)"


def test_without_cupy_it_says_what_to_install(mlacli, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # no such module, wherever this runs
    assert "mlacli[cuda13]" in mlacli("devices").out
    for line in (("plan", "-dev", "cuda0"), ("run-model", "-dev", "cuda0", "-p", "x")):
        done = mlacli(*line)
        assert done.code == 1 and "CuPy is not installed (install mlacli[cuda13]" in done.err


def test_advice_needs_gpus_or_vram(mlacli, no_gpu):
    done = mlacli("devices", "--synthetic", "v2lite:4")
    assert done.code == 1 and "--vram" in done.err
    done = mlacli("devices", "--synthetic", "v2lite:4", "--vram", "20G,20G", "-c", "4096")
    assert done.code == 0 and "an H200's speeds" in done.out
    assert done.out.splitlines()[-1] == "advice: -sm graph on 2"


def test_a_cpu_is_no_gpu(mlacli):
    assert mlacli("devices", "-dev", "cpu").code == 2


def test_tables_of_what_was_measured(mlacli, two_gpus):
    done = mlacli("devices")
    assert (done.code, done.err) == (0, "")
    assert "yes 380 GB/s" in done.out and "yes 381 GB/s" in done.out
    assert "p2p (they reach): 2.25 us for 2048 floats, 2.50 us for 7168 floats" in done.out
    assert "NCCL   works, 11.9 us" in done.out
    assert mlacli("devices", "--no-measure", "-dev", "cuda1").code == 0
    assert two_gpus.asked == [("measured", [0, 1]), ("listed", [1])]


def test_advice_for_what_fits(mlacli, two_gpus):
    done = mlacli("devices", "--synthetic", "v2lite", "-c", "4096", "--json")
    found = json.loads(done.out)
    modes = [(c["mode"], len(c["devices"]), c["fits"]) for c in found["choices"]]
    assert modes == [("none", 1, True), ("layer", 2, True), ("graph", 2, True)]
    assert found["advice"]["mode"] == "graph" and found["advice"]["devices"] == ["cuda0", "cuda1"]
    done = mlacli("devices", "--synthetic", "v3", "-c", "4096")
    assert done.out.splitlines()[-1].startswith("advice: none fits")


def test_speeds_compare_at_one_depth(mlacli, no_gpu):
    """One GPU holds fewer rows than two; the depth is what all that fit can reach."""
    done = mlacli("devices", "--synthetic", "v2lite", "--vram", "13G,13G", "--json")
    choices = json.loads(done.out)["choices"]
    contexts = [c["n_ctx"] for c in choices]
    assert all(c["fits"] for c in choices) and contexts[0] < contexts[2]
    assert {c["n_kv_deep"] for c in choices} == {min(contexts)}
    done = mlacli("devices", "--synthetic", "v3", "--vram", ",".join(["141G"] * 4))
    head, *rows = [line.split() for line in done.out.splitlines() if "gpu" in line or "t/s" in line]
    assert head[-1] == rows[-1][3] == "163840" and rows[0][3:5] == ["doesn't", "fit"]

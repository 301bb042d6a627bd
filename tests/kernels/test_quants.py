"""kernels/include/quants.cuh against gguf-py, bit for bit: built by g++, by NVRTC, on a GPU.

Weakest link: gguf-py. The g++ build shares all code with the device but a few intrinsics.
"""

import hashlib
import runpy
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from kit.harness import INCLUDE, program
from kit.toy_gguf import random_weight

HERE = Path(__file__).parent
FLOATS = ("F32", "F16", "BF16")
# Byte offsets of the float16 scales in a block; IQ1_M and MXFP4 have none such.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "MXFP4": (), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "IQ4_XS": (0,), "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
}  # fmt: skip
ALL = (*FLOATS, *HALVES)


def wild_rows(name: str, rows: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of random bytes, scales of any sign and size that are finite; (rows, bytes), uint8."""
    block, size = gguf.GGML_QUANT_SIZES[T[name]]
    raw = rng.integers(0, 256, (rows * n // block, size), np.uint8)
    if name in FLOATS:  # one exponent bit cleared: no infinities, subnormals stay
        raw[:, -1] &= 0xBF
    for at in HALVES.get(name, ()):
        infinite = raw[:, at + 1] & 0x7C == 0x7C
        raw[infinite, at + 1] &= 0xBF
    if name == "IQ1_M":  # the top bits of its scale
        raw[:, 55] &= 0xBF
    return raw.reshape(rows, -1)


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Asserts bit equality of float32 arrays without NaNs."""
    assert got.shape == want.shape
    assert not np.isnan(want).any()
    wrong = np.flatnonzero(got.view(np.uint32) != want.view(np.uint32))
    first = wrong[0] if len(wrong) else 0
    assert not len(wrong), f"{len(wrong)} differ, at {first}: {got.flat[first]}, gguf says " + str(
        want.flat[first]
    )


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quants")
    return program(HERE / "quants_harness.cpp", folder, "-O2")


def unpacked(harness: Path, name: str, raw: np.ndarray, n: int) -> np.ndarray:
    """What the harness makes of rows of n values; (rows, n)."""
    words = [str(harness), str(int(T[name])), str(len(raw)), str(n)]
    done = subprocess.run(words, input=raw.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(len(raw), n)


@pytest.mark.parametrize("name", ALL)
def test_random_weights_unpack_as_gguf_does(harness, name) -> None:
    rng = np.random.default_rng(int(T[name]))
    raw = random_weight((6, 1280), T[name], rng).view(np.uint8)
    same_bits(unpacked(harness, name, raw, 1280), dequantize(raw, T[name]).reshape(6, 1280))


@pytest.mark.parametrize("name", ALL)
def test_any_bytes_unpack_as_gguf_does(harness, name) -> None:
    rng = np.random.default_rng(100 + int(T[name]))
    raw = wild_rows(name, 40, 2048, rng)
    with np.errstate(over="ignore"):  # MXFP4's largest scale times 12
        want = dequantize(raw, T[name]).reshape(40, 2048)
    same_bits(unpacked(harness, name, raw, 2048), want)


@pytest.mark.parametrize("n", [1, 31, 33, 77])
@pytest.mark.parametrize("name", FLOATS)
def test_rows_of_any_length(harness, name, n) -> None:
    raw = wild_rows(name, 5, n, np.random.default_rng(n))
    same_bits(unpacked(harness, name, raw, n), dequantize(raw, T[name]).reshape(5, n))


@pytest.mark.parametrize("n", [32, 96])
@pytest.mark.parametrize("name", [t for t in HALVES if gguf.GGML_QUANT_SIZES[T[t]][0] == 32])
def test_rows_shorter_than_256(harness, name, n) -> None:
    raw = wild_rows(name, 5, n, np.random.default_rng(n))
    with np.errstate(over="ignore"):
        want = dequantize(raw, T[name]).reshape(5, n)
    same_bits(unpacked(harness, name, raw, n), want)


def test_codebooks_are_gguf_pys() -> None:
    made = runpy.run_path(str(HERE / "make_quant_tables.py"))
    assert made["TARGET"].read_text() == made["text"](), "run tests/kernels/make_quant_tables.py"
    quants = gguf.quants
    assert quants.IQ1_M.grid_hex == quants.IQ1_S.grid_hex  # one table serves both


# ------------------------------------------------------------------ NVRTC and GPU
KERNEL = '#include "quants.cuh"\n' + "\n".join(
    f"""extern "C" __global__ void unpack_{name}(float* out, const unsigned char* raw, int rows,
                                         int n, int row_bytes) {{
  const int groups = (n + 31) / 32, at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= rows * groups) return;
  float v[32];
  load_group_tail<QT_{name}>(raw + (long long)(at / groups) * row_bytes, at % groups, n, v);
  for (int i = 0; i < 32; ++i)
    if (at % groups * 32 + i < n) out[(long long)(at / groups) * n + at % groups * 32 + i] = v[i];
}}"""
    for name in ALL
)
# CuPy's disk cache looks at the text alone, not at headers: make a changed header a changed text.
HEADERS = b"".join(path.read_bytes() for path in sorted(INCLUDE.glob("*.cuh")))
KERNEL += f"\n// headers {hashlib.sha256(HEADERS).hexdigest()}\n"


@pytest.mark.parametrize("arch", ["sm_90a", "sm_75"])
def test_nvrtc_compiles_every_type_without_spills(arch) -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy isn't installed: no NVRTC").cuda.nvrtc
    program = nvrtc.createProgram(KERNEL, "quants_test.cu", (), ())
    options = (f"-arch={arch}", "-std=c++17", f"-I{INCLUDE}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    frames = [line for line in log.splitlines() if "spill" in line]
    none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert len(frames) == len(ALL), log
    assert all(none in line for line in frames), log


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_gpu_unpacks_as_gguf_does(name) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy isn't installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    rows, n = 40, 2048
    raw = wild_rows(name, rows, n, np.random.default_rng(200 + int(T[name])))
    with np.errstate(over="ignore"):
        want = dequantize(raw, T[name]).reshape(rows, n).copy()
    if name == "MXFP4":  # the device flushes scales and products below 2^-126
        subnormal = np.repeat(raw.reshape(rows, -1, 17)[..., 0] < 2, 32, axis=-1)
        want[subnormal | (np.abs(want) < np.finfo(np.float32).tiny)] *= 0
    module = cupy.RawModule(code=KERNEL, options=("-std=c++17", f"-I{INCLUDE}"))
    out = cupy.full((rows, n), cupy.nan, cupy.float32)
    size = (out, cupy.asarray(raw), np.int32(rows), np.int32(n), np.int32(raw.shape[1]))
    module.get_function(f"unpack_{name}")((rows * n // 32 // 64,), (64,), size)
    same_bits(out.get(), want)

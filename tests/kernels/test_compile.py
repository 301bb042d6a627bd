"""Every kernel compiles for the oldest and the tuned architecture; needs NVRTC, not a GPU."""

import pytest

cupy = pytest.importorskip("cupy", reason="needs CuPy's NVRTC (pip install 'mlacli[cuda13]')")

from cupy.cuda import nvrtc  # noqa: E402

from mlacli.backends.cuda_kernels import signatures, source  # noqa: E402

DEFINES = {
    "cache": ("-DCACHE=__nv_bfloat16",),
    "embed": ("-DWTYPE=12",),
    "matmul_vec": ("-DWTYPE=14", "-DCOLS=8", "-DROWS=2"),
    "matmul_experts": ("-DWTYPE=12", "-DWTYPE_UP=8"),
    "mla_decode": ("-DR=512", "-DP=64", "-DHALF=1", "-DCACHE=__half"),
}


def include_path() -> str:
    from cupy._environment import get_cuda_path

    return f"-I{get_cuda_path()}/include"


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
@pytest.mark.parametrize("name", sorted({file for file, _ in signatures().values()}))
def test_kernel_compiles(name: str, arch: str) -> None:
    program = nvrtc.createProgram(source(name), f"{name}.cu", (), ())
    options = (f"-arch={arch}", "-std=c++17", include_path(), *DEFINES.get(name, ()))
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)

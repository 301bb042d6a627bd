"""A command line with one fault planted: `python -m kit.faults FAULT PLACE RANK WORDS...`.

FAULT: exception, illegal (a kernel that stores through a null pointer), memory (an allocation that
fails), SIGINT or SIGTERM. PLACE: load, prefill or decode. RANK: whose device or ops it strikes.
The device layer is wrapped from outside; the program itself knows nothing of faults. MLACLI_STRUCK
names the file that gets the time of the strike.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mlacli.engine import Engine

NTH = {"load": 5, "prefill": 1, "decode": 3}  # the call of the place, or the rank's piece of a load
WORDS = "planted fault"


class Fault:
    """What is to happen, and where the engine is."""

    def __init__(self, kind: str, place: str, rank: int) -> None:
        self.kind, self.place, self.rank = kind, place, rank
        self.phase = ""
        self.calls = 0  # of the engine for this place
        self.struck = False
        self.of_rank: list[Any] = []  # devices, or ops of the CPU
        self.kernel: Any = None

    def is_due(self, one: Any) -> bool:
        """Whether now is the time and `one` belongs to the rank."""
        if self.struck or self.phase != self.place or self.rank >= len(self.of_rank):
            return False
        if one is not self.of_rank[self.rank]:
            return False
        if self.place == "load":
            self.calls += 1
        captures = self.kind == "memory" or (self.kind == "exception" and self.place != "load")
        return self.calls >= (1 if captures and hasattr(one, "capture") else NTH[self.place])

    def note(self) -> None:
        self.struck = True
        Path(os.environ["MLACLI_STRUCK"]).write_text(str(time.time()))

    def strike(self, one: Any) -> None:
        """`one` does something now."""
        if self.kind in ("memory", "no fault") or not self.is_due(one):
            return
        self.note()
        if self.kind == "exception":
            raise ValueError(WORDS)
        if self.kind == "illegal":
            self.kernel((1,), (32,), (0,), stream=one.stream)
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))

    # ---- where the engine is ----------------------------------------------------------------

    def watch_engine(self) -> None:
        plain_load, plain_start = Engine._load, Engine._start
        plain_ahead, plain_warm = Engine.decode_ahead, Engine.warm_up

        @functools.wraps(plain_load)
        def load(engine: Any, *args: Any) -> Any:
            return self.during("load", plain_load, engine, *args)

        @functools.wraps(plain_start)
        def start(engine: Any, phase: str, *args: Any) -> Any:
            return self.during(phase, plain_start, engine, phase, *args)

        @functools.wraps(plain_ahead)
        def ahead(engine: Any, *args: Any) -> Any:
            return self.during("decode", plain_ahead, engine, *args)

        @functools.wraps(plain_warm)
        def warm(engine: Any) -> Any:
            self.phase = "warming up"
            try:
                return plain_warm(engine)
            finally:
                self.phase = ""

        Engine._load, Engine._start = load, start  # type: ignore[method-assign]
        Engine.decode_ahead, Engine.warm_up = ahead, warm  # type: ignore[method-assign]

    def during(self, phase: str, call: Any, *args: Any) -> Any:
        before, self.phase = self.phase, self.phase or phase
        if self.phase == self.place and self.place != "load":
            self.calls += 1
        try:
            return call(*args)
        finally:
            self.phase = before

    # ---- what is struck ---------------------------------------------------------------------

    def wrap_cpu(self) -> None:
        from mlacli.backends.numpy_ops import NumpyOps

        self.collect(NumpyOps)
        for name in ("upload", "step"):
            self.wrap(NumpyOps, name)

    def wrap_gpu(self) -> None:
        import cupy as cp

        from mlacli.backends import cuda_errors
        from mlacli.backends.cuda_device import CudaDevice
        from mlacli.backends.cuda_ops import CudaOps

        self.collect(CudaDevice)
        self.wrap(CudaDevice, "send")
        if self.kind.startswith("SIG") and self.place != "load":
            self.wrap(CudaDevice, "copy_in")
        if self.kind == "exception" and self.place != "load":
            self.wrap(CudaOps, "latent_attention", lambda ops: ops.device)
        plain_capture, plain_ended = CudaDevice.capture, CudaDevice._ended
        plain_memory = cp.cuda.Memory
        n_arenas = 0

        def ended(device: Any) -> Any:
            if self.kind == "memory" and self.is_due(device):
                self.note()
                device.stream.end_capture()
                error = cp.cuda.runtime.CUDARuntimeError(2)
                cuda_errors.met_on(device.name, error)
                raise error
            return plain_ended(device)

        def capture(device: Any, launches: Any) -> Any:
            replay = plain_capture(device, launches)

            def struck() -> None:
                if self.kind == "illegal":  # exceptions come out of forwards
                    self.strike(device)
                replay()

            return struck

        def memory(nbytes: int) -> Any:
            nonlocal n_arenas
            n_arenas += 1
            if self.kind == "memory" and self.place == "load" and n_arenas == self.rank + 1:
                self.note()
                raise cp.cuda.runtime.CUDARuntimeError(2)
            return plain_memory(nbytes)

        CudaDevice.capture, CudaDevice._ended = capture, ended  # type: ignore[method-assign]
        cp.cuda.Memory = memory
        if self.kind == "illegal":
            text = 'extern "C" __global__ void planted(int* at) { at[threadIdx.x] = 1; }'
            self.kernel = cp.RawKernel(text, "planted")

    def collect(self, kind: Any) -> None:
        plain = kind.__init__

        @functools.wraps(plain)
        def init(one: Any, *args: Any, **more: Any) -> None:
            plain(one, *args, **more)
            self.of_rank.append(one)

        kind.__init__ = init

    def wrap(self, kind: Any, name: str, whose: Any = lambda one: one) -> None:
        plain = getattr(kind, name)

        @functools.wraps(plain)
        def wrapped(one: Any, *args: Any, **more: Any) -> Any:
            self.strike(whose(one))
            return plain(one, *args, **more)

        setattr(kind, name, wrapped)


def main() -> None:
    kind, place, rank, *words = sys.argv[1:]
    fault = Fault(kind, place, int(rank))
    fault.watch_engine()
    if "cpu" in words[words.index("-dev") + 1]:
        fault.wrap_cpu()
    else:
        fault.wrap_gpu()
    from mlacli.cli import main as cli

    sys.argv = ["mlacli", *words]
    cli()


if __name__ == "__main__":
    main()

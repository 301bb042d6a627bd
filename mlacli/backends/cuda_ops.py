"""The ops of one CUDA rank: which kernels compute each op, in which form, on which memory.

Few tokens take cuda_matvec, which folds norms into products and products into the residual stream;
many take cuda_gemm on float16 activations; what lies in GGUF bytes takes cuda_raw or cuda_plain,
experts are in cuda_experts. Knows no CuPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.backends import cuda_experts, cuda_rows, cuda_weights
from mlacli.backends import cuda_gemm as gemm
from mlacli.backends import cuda_matvec as matvec
from mlacli.backends import cuda_plain as plain
from mlacli.backends import cuda_raw as raw
from mlacli.backends.cuda_acts import Act, Chosen
from mlacli.backends.cuda_array import Array
from mlacli.backends.cuda_device import Device, Host
from mlacli.backends.cuda_group import Mail
from mlacli.backends.cuda_host_experts import HostExperts
from mlacli.backends.cuda_mla import Attention
from mlacli.backends.cuda_together import Brought, Peers
from mlacli.backends.cuda_weights import CudaWeight
from mlacli.errors import BackendError
from mlacli.ops import LayerCache, LayerWeights, Ops, Step
from mlacli.parallel.comm import SoloComm
from mlacli.parallel.cuda_sizes import FEW, bucket
from mlacli.parallel.host_stream import is_routed
from mlacli.params import ContextParams

if TYPE_CHECKING:
    from mlacli.models.indexer import Indexer
    from mlacli.models.parts import Routing
    from mlacli.parallel.shards import Shard


class CudaOps(Ops):
    """Ops on `device`, whose arena holds all their memory, for a model with `hp`."""

    def __init__(
        self, peers: Peers | None, context: ContextParams, device: Device, hp: Any
    ) -> None:
        """`peers`: who the sums are shared with; None for a rank that has all of its layers."""
        self.peers, self.context, self.device, self.hp = peers, context, device, hp
        self.comm = SoloComm()  # what leaves this rank goes through peers, send and receive
        self.forms = set()
        self.attention = Attention(self, hp)
        self.host_experts = HostExperts(self)
        self._counter: Any = None  # of route's last CTA, see cuda_matvec.route
        self.stream: Any = None  # the residual stream of a step [n, d]
        self.sent: list[Array] = []  # to the next pipeline stage, which pulls it
        self._n_received = 0
        self._routed: Any = None  # the last choice of experts, until the next sum
        self.n_sm, self.capability = device.n_sm, device.capability
        # A test hook: choices [n, count] by the name of the weight that would make them.
        self.imposed: dict[str, Host] = {}
        self._layer = 0  # where a half layer's temporaries begin
        self._pos: Any = None  # of the step under way

    # ---- steps ------------------------------------------------------------------------------

    def take_buffers(self, n_ubatch: int) -> None:
        """What outlives a half layer, and a step; for steps of at most `n_ubatch` tokens."""
        self._counter = self.put(np.zeros(1, np.int32))
        self.stream = self.device.take((n_ubatch, self.hp.d), np.float32)
        self.attention.take_buffers(n_ubatch)
        self.host_experts.take_buffers()

    def makes_copies(self, n: int) -> bool:
        """Whether a step of `n` tokens can't be captured, for copies out of host memory."""
        return self.host_experts.copies_in(n)

    def begin_step(self, n: int, pos: Array) -> None:
        """A step of `n` real tokens at `pos` follows."""
        self._pos, self.sent, self._n_received = pos, [], 0
        self.attention.begin_step(n)
        self.host_experts.begin(bucket(n, self.context.n_ubatch))

    def step_kind(self, n: int, n_kv: int) -> tuple[Any, ...]:
        """What a captured step depends on beside its size."""
        return self.attention.step_kind(n, n_kv)

    def host(self, x: Act) -> Host:
        return self.device.get(self.f32(x))

    # ---- weights and cache ------------------------------------------------------------------

    def begin_upload(self, shards: Sequence[Shard]) -> None:
        cuda_weights.begin(self.device, shards)

    def upload(self, pieces: Any, shard: Shard) -> CudaWeight:
        w = cuda_weights.upload(self.device, pieces, shard, tiled=self.capability >= 80)
        if is_routed(shard.tensor):
            self.host_experts.add(shard.layer, w)
        elif not w.reachable:
            raise BackendError(
                f"{shard.tensor} can't stay in host memory: {self.load_problem()}",
                "only routed experts do without page-locked memory: leave the others on the GPU",
            )
        return w

    def load_problem(self) -> str | None:
        return self.device.host_problem

    def end_upload(self) -> None:
        self.device.end_sends()

    def download(self, w: CudaWeight) -> Any:
        return cuda_weights.download(self.device, w)

    def new_rows(self, n_ctx: int, width: int, cache_type: str, transposed: bool = False) -> Any:
        assert not transposed, "-fa off is refused on GPUs"
        return self.attention.new_rows(n_ctx, width, cache_type)

    def new_index_rows(self, n_ctx: int, width: int, cache_type: str) -> Any:
        return self.attention.new_index_rows(n_ctx, width, cache_type)

    def read_rows(self, rows: Any, n: int) -> Host:
        return cuda_rows.read(self.device, rows, n)

    def write_rows(self, rows: Any, values: Host) -> None:
        cuda_rows.write(self.device, rows, values)

    # ---- the residual stream ----------------------------------------------------------------

    def embed(self, tokens: Array, w: CudaWeight) -> Act:
        n, d = len(tokens), w.shape[1]
        residual = self.stream[:n]
        self._layer = self.device.mark()
        self.run("embed_f32", (n,), 128, residual, tokens, w.raw, d, w.row_bytes, WTYPE=w.qtype.id)
        return Act((n, d), residual)

    def receive(self) -> Any:
        """First the residual stream, then the rows that a layer before chose: of the step's n."""
        n, self._n_received = len(self._pos), self._n_received + 1
        if self._n_received == 2:
            return self.attention.chosen[:n]
        self._layer = self.device.mark()
        return Act((n, self.hp.d), self.stream[:n])

    def send(self, x: Any) -> None:
        self.sent.append(self.f32(x) if isinstance(x, Act) else x)

    def received(self, n: int) -> list[Array]:
        """Where a step of `n` tokens will look for what it receives."""
        found = [self.stream[:n]]
        return found if self.attention.chosen is None else [*found, self.attention.chosen[:n]]

    def rms_norm(self, x: Act, w: CudaWeight, eps: float) -> Act:
        """Not taken yet: products of few tokens fold it in."""
        return Act(x.shape, normed=(self.f32(x), w, eps))

    def reduce_add_norm(
        self, partial: Act | None, residual: Act, norm: CudaWeight | None, eps: float
    ) -> tuple[Act, Act]:
        stream = self.f32(residual)
        if self.peers is not None:
            routed, self._routed = self._routed, None
            self.peers.reduce_add(Brought(stream, partial, routed))
        elif partial is not None and partial.run is not None:
            partial.run(stream, True)
        elif partial is not None:
            plain.add(self, stream, self.f32(partial), into=stream)
        self.device.rewind(self._layer)  # the next half layer reuses this one's temporaries
        residual = Act(residual.shape, stream)
        return residual, residual if norm is None else self.rms_norm(residual, norm, eps)

    def rows(self, x: Act, wanted: Any) -> Act:
        assert x.normed is not None, "the last norm is taken of the wanted rows alone"
        stream, weight, eps = x.normed
        if len(x) == len(wanted) == 1:
            return x
        y = self.new((len(wanted), x.shape[1]))
        if len(wanted):
            self.run("rows_f32", (len(wanted),), 256, y, stream, wanted, x.shape[1])
        return Act(y.shape, normed=(y, weight, eps))

    def logits(self, x: Act, output: CudaWeight | None) -> Act:
        if self.peers is None:
            assert output is not None, "a rank without peers holds every tensor"
            return self.matmul(x, output)
        columns = None if output is None else self.f32(self.matmul(x, output))
        return _held(self.peers.gather(columns, len(x)))

    # ---- products ---------------------------------------------------------------------------

    def matmul(self, x: Act, w: CudaWeight) -> Act:
        """Pending: it may yet add into the residual stream."""

        def run(into: Array | None, add: bool) -> Array:
            y = self.new((len(x), w.shape[0])) if into is None else into
            self.products(x, [(w, y)], add=add)
            return y

        def send(mail: Mail) -> None:
            values, norm = self.unnormed(x)
            matvec.products(self, [(w, mail)], values, norm)

        return Act((len(x), w.shape[0]), run=run, send=send if matvec.sends(len(x), w) else None)

    def project(self, x: Act, q: CudaWeight, kv_a: CudaWeight, r: int) -> tuple[Act, Act, Act]:
        y, kv = self.new((len(x), q.shape[0])), self.new((len(x), kv_a.shape[0]))
        self.products(x, [(q, y), (kv_a, kv)])
        return _held(y), _held(kv[:, :r]), _held(kv[:, r:])

    def products(
        self, x: Act, pairs: Sequence[tuple[CudaWeight, Array]], add: bool = False
    ) -> None:
        """out = x w^T for each (w, out [n, rows]); `add`: added to it."""
        if not len(x):  # a ubatch whose logits nobody wants
            return
        pairs = [(cuda_weights.near(self, w, len(x)), out) for w, out in pairs]
        tiled = [(w, out) for w, out in pairs if w.tiles is not None]
        if tiled and len(x) <= FEW:
            values, norm = self.unnormed(x)
            matvec.products(self, tiled, values, norm, add)
        elif tiled and gemm.fits(self, *(w for w, _ in tiled)):
            gemm.products(self, tiled, self.f16(x), add=add)
        elif tiled:
            for pair in tiled:
                gemm.products(self, [pair], self.f16(x), add=add)
        for w, out in pairs:
            if w.tiles is None:
                raw.product(self, x, w, out, add)

    def gated(self, x: Act, gate: CudaWeight, up: CudaWeight) -> Act:
        n, f = len(x), gate.shape[0]
        if not matvec.takes(gate, up):
            both = [self.new((n, f)), self.new((n, f))]
            self.products(x, list(zip((gate, up), both, strict=True)))
            return _held(plain.silu_mul(self, *both))
        if n > FEW:
            gate, up = (cuda_weights.near(self, w, n) for w in (gate, up))
            return Act((n, f), f16=gemm.gated(self, gate, up, self.f16(x)))
        h = self.new((n, f))
        values, norm = self.unnormed(x)
        matvec.gated(self, gate, up, h, values, norm)
        return _held(h)

    # ---- attention --------------------------------------------------------------------------

    def latent_attention(
        self, q: Act, c_kv: Act, k_pe: Act, w: LayerWeights, kv: LayerCache, step: Step, hp: Any,
        chosen: Any = None,
    ) -> Act:  # fmt: skip
        return self.attention.attend(
            self.f32(q), self.f32(c_kv), self.f32(k_pe), w, kv.rows, step, chosen
        )

    def choose_rows(
        self, x: Act, q_a: Act, w: LayerWeights, rows: Any, step: Step, indexer: Indexer
    ) -> Any:
        return self.attention.choose(x, q_a, w, rows, step, indexer)

    # ---- routed experts ---------------------------------------------------------------------

    def route(self, x: Act, gate: CudaWeight, bias: CudaWeight | None, routing: Routing) -> Chosen:
        n, n_experts = len(x), gate.shape[0]
        if n > FEW or not matvec.routes(gate):
            if gate.qtype.name == "F32" and self.capability >= 80:
                scores = gemm.route_scores(self, self.f32(x), gate)
            else:
                scores = self.new((n, n_experts))
                self.products(x, [(gate, scores)])
            imposed = self._imposed_on(gate, n)
            chosen = plain.route(self, scores, bias, routing, self._pos, imposed)
            self._routed = chosen.ids
            return chosen
        chosen = Chosen(self.new((n, routing.n_used), np.int32), self.new((n, routing.n_used)))
        values, norm = self.unnormed(x)
        matvec.route(
            self, chosen.ids, chosen.weights, self.new((n, n_experts)), self._counter, gate,
            values, routing, norm, bias, self._pos, self._imposed_on(gate, n),
        )  # fmt: skip
        self._routed = chosen.ids
        return chosen

    def _imposed_on(self, gate: CudaWeight, n: int) -> Array | None:
        """Ids [n, n_used] to take instead of choosing; not in a captured step."""
        ids = self.imposed.get(gate.name)
        if ids is None:
            return None
        padded = np.full((n, ids.shape[1]), -1, np.int32)
        padded[: len(ids)] = ids
        return self.put(padded)

    def experts(self, x: Act, chosen: Chosen | None, w: LayerWeights) -> Act | None:
        """Pending, as matmul()."""
        if chosen is None and w.ffn_down_shexp is None:
            return None

        def run(into: Array | None, add: bool) -> Array:
            y = self.new(x.shape) if into is None else into
            cuda_experts.experts(self, x, chosen, w, y, add)
            return y

        return Act(x.shape, run=run, send=cuda_experts.sender(self, x, chosen, w))

    # ---- plumbing ---------------------------------------------------------------------------

    def f32(self, x: Act) -> Array:
        """The float32 values of `x`, computed now if nobody asked before."""
        if x.f32 is None and x.run is not None:
            x.f32, x.run = x.run(None, False), None
        elif x.f32 is None and x.normed is not None:
            if len(x) > FEW and self.capability >= 80:
                x.f32, x.f16 = gemm.norm16(self, *x.normed, keep=True)
            else:
                values, weight, eps = x.normed
                x.f32 = plain.rms_norm(self, values, weight.raw, eps)
        elif x.f32 is None and x.f16 is not None:
            x.f32 = gemm.to32(self, x.f16)
        assert x.f32 is not None
        return x.f32

    def f16(self, x: Act) -> Array:
        """A sixteenth of `x` as float16, computed now if nobody asked before."""
        if x.f16 is None and x.f32 is None and x.normed is not None:
            _, x.f16 = gemm.norm16(self, *x.normed)
        elif x.f16 is None:
            x.f16 = gemm.to16(self, self.f32(x))
        return x.f16

    def unnormed(self, x: Act) -> tuple[Array, matvec.Norm | None]:
        """Values in float32, and the norm that is still to be taken of them."""
        if x.f32 is None and x.normed is not None:
            values, weight, eps = x.normed
            return values, (weight, eps)
        return self.f32(x), None

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Scratch until the end of the half layer; its content is whatever was there."""
        return self.device.take(shape, dtype)

    def put(self, host: Host) -> Array:
        """A device copy that stays where it is until the arena is rewound."""
        device = self.device.take(host.shape, host.dtype)
        self.device.copy_in(device, host)
        return device

    def run(self, name: str, grid: tuple[int, ...], block: int, *args: Any, **how: Any) -> None:
        self.device.launch(name, grid, block, *args, **how)


def _held(array: Array) -> Act:
    return Act(array.shape, array)

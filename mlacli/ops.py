"""The op interface that model files are written against, one object per rank.

Fine ops are abstract; coarse ops have composed defaults made of fine ones, which a backend may
replace by fused kernels. Letters: n tokens, t cache rows, d model width, h local heads, r kv rank,
k nope, p rope, v value, E experts, f expert width, I indexer heads, i their width. `Act` and
`Weight` are opaque to models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlacli.attention_forms import AttentionForm, attention_form
from mlacli.errors import UnsupportedFeature

if TYPE_CHECKING:
    from mlacli.models.parts import Routing, Temperature
    from mlacli.parallel.comm import Comm
    from mlacli.params import ContextParams

Act = Any  # an activation of the backend
Weight = Any  # a weight of the backend, in its GGUF bytes or repacked
_ABSENT = "compat.py refuses forms that a backend has not"
_NO_SESSIONS = "this backend can't save or load its cache in this version"


@dataclass(frozen=True, slots=True)
class Step:
    """Arrays of one forward: token ids and positions [n], rotation [n, p/2], wanted rows."""

    tokens: Act
    pos: Act
    cos: Act
    sin: Act
    n: int
    n_kv: int  # cache rows in use once this step's are stored
    out_rows: Sequence[int]


class LayerWeights:
    """One layer's weights by GGUF name without `blk.N.` and `.weight`; None when not held here."""

    def __init__(self, weights: dict[str, Weight]) -> None:
        self._weights = weights

    def __getattr__(self, name: str) -> Weight:
        return self._weights.get(name)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A rank's weights. token_embd None: not the first stage; output_norm None: not the last."""

    token_embd: Weight
    output_norm: Weight
    output: Weight  # None also on a last-stage rank without vocabulary rows
    layers: dict[int, LayerWeights] = field(default_factory=dict)

    def find(self, layer: int | None, name: str) -> Weight:
        """The weight by its short name (`attn_q_b`); `layer` None = the model's own."""
        return getattr(self if layer is None else self.layers[layer], name)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of past tokens: the parts of attention_forms.cache_parts, else None."""

    rows: Any = None  # [n_ctx, r + p]: c_kv, then k_pe
    columns: Any = None  # [n_ctx, r], the same c_kv, transposed in memory
    keys: Any = None  # [n_ctx, h * (k + p)]: each head's nope, then k_pe
    values: Any = None  # [n_ctx, h * v]

    @property
    def nbytes(self) -> int:
        parts = (self.rows, self.columns, self.keys, self.values)
        return sum(part.nbytes for part in parts if part is not None)


class Ops(Protocol):
    """Everything a model file may call."""

    comm: Comm
    context: ContextParams
    forms: set[AttentionForm]  # those that ran; the engine empties it

    # ---- fine ops: a backend defines these --------------------------------------------------

    def step(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int],
    ) -> Step: ...  # fmt: skip

    def upload(self, pieces: Any, shard: Any) -> Weight:
        """A weight from a shard's bytes."""
        ...

    def download(self, w: Weight) -> Any:
        """The shard's bytes again, as they lie in this rank's memory: the inverse of upload."""
        ...

    def new_rows(self, n_ctx: int, width: int, cache_type: str, transposed: bool = False) -> Any:
        """Cache rows [n_ctx, width] of one layer, in memory [width, n_ctx] when transposed."""
        ...

    def read_rows(self, rows: Any, n: int) -> Any:
        """Cache rows 0..n-1 on the host as float32 [n, width], whatever their type and layout."""
        raise UnsupportedFeature(_NO_SESSIONS, "leave --prompt-cache out")

    def write_rows(self, rows: Any, values: Any) -> None:
        """The inverse: host values [n, width] into cache rows 0..n-1."""
        raise UnsupportedFeature(_NO_SESSIONS, "leave --prompt-cache out")

    def embed(self, tokens: Act, w: Weight) -> Act:
        """Rows of w [n, d]."""
        ...

    def matmul(self, x: Act, w: Weight) -> Act:
        """x w^T: [n, in] -> [n, out]."""
        ...

    def rms_norm(self, x: Act, w: Weight, eps: float) -> Act:
        """x / sqrt(mean(x^2) + eps) * w."""
        ...

    def rope(self, x: Act, step: Step) -> Act:
        """x [n, p] or [n, h, p] with pairs (2i, 2i+1) rotated."""
        ...

    def temper(self, q: Act, temperature: Temperature, step: Step) -> Act:
        """q [n, ...] times 1 + scale * ln(1 + floor(pos / length)) of each token."""
        ...

    def silu_mul(self, gate: Act, up: Act) -> Act:
        """silu(gate) * up."""
        ...

    def add(self, a: Act, b: Act) -> Act: ...

    def columns(self, x: Act, start: int, stop: int) -> Act:
        """The last axis from start to stop."""
        ...

    def rows(self, x: Act, wanted: Sequence[int]) -> Act: ...

    def store(self, rows: Any, c_kv: Act, k_pe: Act, step: Step) -> None:
        """Write one cache row per token: c_kv, then k_pe."""
        ...

    def store_columns(self, columns: Any, c_kv: Act, step: Step) -> None:
        """Write c_kv to the transposed copy."""
        raise AssertionError(_ABSENT)

    def store_heads(
        self, keys: Any, values: Any, c_kv: Act, k_pe: Act, k_b: Weight, v_b: Weight, step: Step
    ) -> None:
        """Expand c_kv and write each head's key and value."""
        raise AssertionError(_ABSENT)

    def heads_up(self, x: Act, w: Weight) -> Act:
        """Per head x[:, h] w[h]^T: [n, h, a], [h, b, a] -> [n, h, b]."""
        ...

    def split_heads(self, q: Act, k: int, p: int) -> tuple[Act, Act]:
        """[n, h * (k + p)] -> ([n, h, k], [n, h, p])."""
        ...

    def attend_absorbed(
        self, q_lat: Act, q_pe: Act, kv: LayerCache, r: int, step: Step, scale: float,
        blockwise: bool,
    ) -> Act:  # fmt: skip
        """Softmax over latent rows: [n, h, r]. Values come from the transposed copy if there."""
        ...

    def attend_expanded(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, k_b: Weight, v_b: Weight, step: Step,
        scale: float,
    ) -> Act:  # fmt: skip
        """Block-wise softmax with keys and values built per head, block by block: [n, h, v]."""
        raise AssertionError(_ABSENT)

    def attend_heads(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, step: Step, scale: float, blockwise: bool
    ) -> Act:
        """Softmax over cached keys and values of each head: [n, h, v]."""
        raise AssertionError(_ABSENT)

    def route(self, x: Act, gate: Weight, bias: Weight | None, routing: Routing) -> Any:
        """Chosen expert ids and their weights, [n, n_used] each; ties go to the lower id."""
        ...

    def moe_up(self, x: Act, chosen: Any, w: LayerWeights) -> Any:
        """silu(gate_e x) * up_e x for each chosen expert held here."""
        ...

    def moe_down(self, h: Any, chosen: Any, w: LayerWeights) -> Act:
        """Weighted sum over chosen experts held here [n, d]."""
        ...

    # ---- fine ops of sparse attention: a backend may lack them ------------------------------

    def layer_norm(self, x: Act, w: Weight, bias: Weight, eps: float) -> Act:
        """(x - mean) / sqrt(variance + eps) * w + bias."""
        raise UnsupportedFeature("this backend has no sparse attention", "use --no-dsa")

    def rope_first(self, x: Act, step: Step) -> Act:
        """x [n, i] or [n, I, i] with its first p columns rotated like `rope`, the rest as it is."""
        raise UnsupportedFeature("this backend has no sparse attention", "use --no-dsa")

    def store_index(self, rows: Any, keys: Act, step: Step) -> None:
        """Write one index key per token."""
        raise UnsupportedFeature("this backend has no sparse attention", "use --no-dsa")

    def heads(self, x: Act, n_heads: int) -> Act:
        """[n, I * i] -> [n, I, i]."""
        raise UnsupportedFeature("this backend has no sparse attention", "use --no-dsa")

    def dsa_select(
        self, q: Act, weights: Act, rows: Any, step: Step, top_k: int, imposed: Act | None = None
    ) -> Act:
        """The top_k cache rows of each token in ascending order [n, top_k]; needs n_kv > top_k.

        Row j scores sum_I weights[I] * max(0, q[I] . key_j) / sqrt(I * i); rows beyond the token
        score -inf, ties go to the lower row. `imposed` rows are taken instead (a test hook).
        """
        raise UnsupportedFeature("this backend has no sparse attention", "use --no-dsa")

    def attend_chosen(
        self, q_lat: Act, q_pe: Act, kv: LayerCache, chosen: Act, r: int, step: Step, scale: float
    ) -> Act:
        """Softmax over each token's chosen rows, those beyond the token left out: [n, h, r]."""
        raise UnsupportedFeature("this backend has no sparse attention", "use --no-dsa")

    # ---- coarse ops: composed defaults ------------------------------------------------------

    def execute(
        self, tokens: Sequence[int], n_past: int, frequencies: Sequence[float],
        out_rows: Sequence[int], forward: Callable[[Step], Act | None],
    ) -> Any:  # fmt: skip
        """The logits of one forward as a host array; a backend may capture and replay it."""
        return forward(self.step(tokens, n_past, frequencies, out_rows))

    def project(
        self, x: Act, q_a: Weight | None, kv_a: Weight, r: int
    ) -> tuple[Act | None, Act, Act]:
        """(q_a x or None, c_kv [n, r], k_pe [n, p]): the mirrored products of one input."""
        kv = self.matmul(x, kv_a)
        q = None if q_a is None else self.matmul(x, q_a)
        return q, self.columns(kv, 0, r), self.columns(kv, r, kv.shape[-1])

    def gated(self, x: Act, gate: Weight, up: Weight) -> Act:
        """silu(gate x) * up x."""
        return self.silu_mul(self.matmul(x, gate), self.matmul(x, up))

    def store_kv(
        self, kv: LayerCache, c_kv: Act, k_pe: Act, k_b: Weight, v_b: Weight, step: Step
    ) -> None:
        """Write each token to every part of a layer's cache."""
        if kv.keys is not None:
            self.store_heads(kv.keys, kv.values, c_kv, k_pe, k_b, v_b, step)
            return
        self.store(kv.rows, c_kv, k_pe, step)
        if kv.columns is not None:
            self.store_columns(kv.columns, c_kv, step)

    def mla_attention(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, k_b: Weight, v_b: Weight, step: Step,
        scale: float,
    ) -> Act:  # fmt: skip
        """Attention of local heads over a layer's cache [n, h * v], in the form that -mla and -fa
        ask for.

        k_b [h, r, k] takes a query into latent space, v_b [h, v, r] takes the result out of it.
        """
        form = attention_form(self.context, step.n)
        if form.keys == "per-head":
            o = self.attend_heads(q_nope, q_pe, kv, step, scale, form.blockwise)
        elif form.keys == "expanded":
            o = self.attend_expanded(q_nope, q_pe, kv, k_b, v_b, step, scale)
        else:
            q_lat, r = self.heads_up(q_nope, k_b), k_b.shape[1]
            o = self.attend_absorbed(q_lat, q_pe, kv, r, step, scale, form.blockwise)
            o = self.heads_up(o, v_b)
        return o.reshape(step.n, -1)

    def sparse_attention(
        self, q_nope: Act, q_pe: Act, kv: LayerCache, k_b: Weight, v_b: Weight, chosen: Act,
        step: Step, scale: float,
    ) -> Act:  # fmt: skip
        """`mla_attention` over each token's chosen rows alone [n, h * v], always absorbed."""
        q_lat = self.heads_up(q_nope, k_b)
        o = self.attend_chosen(q_lat, q_pe, kv, chosen, k_b.shape[1], step, scale)
        return self.heads_up(o, v_b).reshape(step.n, -1)

    def reduce_add_norm(
        self, partial: Act | None, residual: Act, norm: Weight | None, eps: float
    ) -> tuple[Act, Act]:
        """(residual + sum of all ranks' partials, its norm). The residual is never rounded."""
        residual = self.add(residual, self.comm.all_reduce(partial))
        return residual, None if norm is None else self.rms_norm(residual, norm, eps)

    def logits(self, x: Act, output: Weight | None) -> Act:
        """[n_out, V], each rank's vocabulary rows put together in rank order."""
        return self.comm.all_gather(None if output is None else self.matmul(x, output))

    def send(self, residual: Act) -> None:
        """Hand the residual stream to the next pipeline stage."""
        self.comm.send(residual)

    def receive(self) -> Act:
        """The residual stream of the stage before."""
        return self.comm.receive()

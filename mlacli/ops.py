"""The op interface that model files are written against, one object per rank.

Coarse on purpose: a backend may fuse inside each of them (composed_ops.py makes them of fine ops).
Letters: n tokens, t cache rows, d model width, h local heads, r kv rank,
k nope, p rope, v value, E experts, f expert width, I indexer heads, i their width. `Act` and
`Weight` are opaque to models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlacli.attention_forms import AttentionForm

if TYPE_CHECKING:
    from mlacli.models.indexer import Indexer
    from mlacli.models.parts import Routing
    from mlacli.parallel.comm import Comm
    from mlacli.params import ContextParams

Act = Any  # an activation of the backend
Weight = Any  # a weight of the backend, in its GGUF bytes or repacked


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
    """Everything a model file may call, and what loads and runs it."""

    comm: Comm
    context: ContextParams
    forms: set[AttentionForm]  # those that ran; the engine empties it

    def host(self, x: Act) -> Any:
        """A host array of an activation."""
        ...

    def begin_upload(self, shards: Any) -> None:
        """`shards` will be uploaded: what that needs may be compiled together."""
        return

    def upload(self, pieces: Any, shard: Any) -> Weight:
        """A weight from a shard's bytes."""
        ...

    def end_upload(self) -> None:
        """The last weight has been handed over: wait until all are in place."""
        return

    def load_problem(self) -> str | None:
        """What came out worse than planned when weights were placed, for people."""
        return None

    def download(self, w: Weight) -> Any:
        """The shard's bytes again, as they lie in this rank's memory: the inverse of upload."""
        ...

    def new_rows(self, n_ctx: int, width: int, cache_type: str, transposed: bool = False) -> Any:
        """Cache rows [n_ctx, width] of one layer, in memory [width, n_ctx] when transposed."""
        ...

    def read_rows(self, rows: Any, n: int) -> Any:
        """Cache rows 0..n-1 on the host as float32 [n, width], whatever their type and layout."""
        ...

    def write_rows(self, rows: Any, values: Any) -> None:
        """The inverse: host values [n, width] into cache rows 0..n-1."""
        ...

    # ---- what models call --------------------------------------------------------------------

    def new_index_rows(self, n_ctx: int, width: int, cache_type: str) -> Any:
        """Index keys [n_ctx, width] of one layer."""
        ...

    def embed(self, tokens: Act, w: Weight) -> Act:
        """Rows of w [n, d]."""
        ...

    def matmul(self, x: Act, w: Weight) -> Act:
        """x w^T: [n, in] -> [n, out]."""
        ...

    def rms_norm(self, x: Act, w: Weight, eps: float) -> Act:
        """x / sqrt(mean(x^2) + eps) * w."""
        ...

    def rows(self, x: Act, wanted: Sequence[int]) -> Act: ...

    def project(self, x: Act, q: Weight, kv_a: Weight, r: int) -> tuple[Act, Act, Act]:
        """(q x, c_kv [n, r], k_pe [n, p]): the products of one input."""
        ...

    def gated(self, x: Act, gate: Weight, up: Weight) -> Act:
        """silu(gate x) * up x."""
        ...

    def latent_attention(
        self, q: Act, c_kv: Act, k_pe: Act, w: LayerWeights, kv: LayerCache, step: Step, hp: Any,
        chosen: Act | None = None,
    ) -> Act:  # fmt: skip
        """Attention of local heads [n, h * v], once each token's latent row is in the cache.

        c_kv [n, r] is normed and k_pe [n, p] rotated on the way there;
        q [n, h * (k + p)] comes unrotated; `chosen` rows [n, top_k] alone are met where given.
        """
        ...

    def choose_rows(
        self, x: Act, q_a: Act, w: LayerWeights, rows: Any, step: Step, indexer: Indexer
    ) -> Act | None:
        """The cache rows [n, top_k] that each token attends to; None while there are no more.

        The tokens' index keys are stored in `rows` either way: later steps will score them.
        """
        ...

    def route(self, x: Act, gate: Weight, bias: Weight | None, routing: Routing) -> Any:
        """Chosen expert ids and their weights, [n, n_used] each; ties go to the lower id."""
        ...

    def experts(self, x: Act, chosen: Any, w: LayerWeights) -> Act | None:
        """Weighted sum over chosen experts held here plus the shared expert [n, d]; None: neither.

        `chosen` is None on a rank without routed experts.
        """
        ...

    def reduce_add_norm(
        self, partial: Act | None, residual: Act, norm: Weight | None, eps: float
    ) -> tuple[Act, Act]:
        """(residual + sum of all ranks' partials, its norm). The residual is never rounded."""
        ...

    def logits(self, x: Act, output: Weight | None) -> Act:
        """[n_out, V], each rank's vocabulary rows put together in rank order."""
        ...

    def send(self, residual: Act) -> None:
        """Hand the residual stream to the next pipeline stage."""
        self.comm.send(residual)

    def receive(self) -> Act:
        """The residual stream of the stage before."""
        return self.comm.receive()

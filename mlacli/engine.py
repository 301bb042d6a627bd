"""Engine: a prepared model on its ranks. Prefill by ubatch, decode, rewind; knows no backend.

`load()` is the library's front door: values as on the command line, by long flag name.
"""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from mlacli.attention_forms import AttentionForm
from mlacli.backends import Forward, Ranks, open_ranks
from mlacli.errors import ContextFull, UsageError
from mlacli.flags import LOADED, library_values, to_params
from mlacli.generation import SAMPLING_FLAGS, Generation
from mlacli.latent_cache import LatentCache
from mlacli.layer_watch import LayerWatch, Watcher
from mlacli.loading.gather import Checked, check_tensors
from mlacli.loading.page_lock import PageLock
from mlacli.loading.weights import load_weights, short_name
from mlacli.ops import ModelWeights, Ops
from mlacli.parallel.memory import most_logit_rows
from mlacli.parallel.memory_watch import MemoryWatch
from mlacli.prepare import Prepared, prepare
from mlacli.sampling import Sampler
from mlacli.timings import Timings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlacli.loading.gguf_file import GgufFile
    from mlacli.loading.tokenizer import Tokenizer
    from mlacli.parallel.memory_watch import Beside
    from mlacli.parallel.shards import Shard

    Floats = NDArray[np.float32]

Phase = Literal["prefill", "decode"]


def load(path: str | Path | None = None, **flags: Any) -> Engine:
    """An Engine for the file at `path` (None = the bundled model), a context manager.

    Keywords are long flag names with the values of the command line: device="cpu,cpu",
    split_mode="graph", cache_type_k="f32". Unknown names raise UsageError.
    """
    values = library_values(LOADED + SAMPLING_FLAGS, flags)
    return Engine(prepare(path, to_params(values)))


def _release(ranks: Ranks, gguf: GgufFile) -> None:
    """What an engine holds beside memory; knows no engine, so that one can be collected."""
    ranks.close()
    gguf.close()


class Engine(Generation):
    """Runs one sequence, one call at a time. Tokens 0..n_kv-1 are in the cache."""

    def __init__(
        self, prepared: Prepared, progress: Callable[[int, int], None] | None = None,
        compiling: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Loads the weights; `progress` is told bytes done and bytes in all.

        `compiling` is told of kernels compiled and of how many, when any is.
        """
        start = time.perf_counter()
        self.prepared, self.params = prepared, prepared.params
        self.n_ctx, self.n_kv = prepared.plan.n_ctx, 0
        self._ids: list[int] = []  # of the cached tokens
        self.context_full = False
        self.timings = Timings()
        self.forms: dict[Phase, set[AttentionForm]] = {"prefill": set(), "decode": set()}
        self.watch: Watcher | None = None  # is shown the residual stream after every layer
        self.on_ubatch: Callable[[int, int], None] | None = None  # tokens of a prompt done, in all
        self._memory = MemoryWatch(prepared.plan)
        try:
            self._ranks = open_ranks(
                prepared.plan, prepared.params.context, prepared.hparams, prepared.n_threads
            )
        except BaseException:
            prepared.gguf.close()
            raise
        self._release = weakref.finalize(self, _release, self._ranks, prepared.gguf)
        self._turn = 0  # grows with each rewind: a generation that lost its cache notices
        self._weights: list[ModelWeights] = []
        self._caches: list[LatentCache] = []
        self.page_lock = PageLock()  # what --mlock did
        self.checked: Checked | None = None  # what --check-tensors went through
        try:
            self._load(progress)
            if prepared.params.model.check_tensors:
                self.checked = self.check_tensors()
            loaded = time.perf_counter()
            self.n_compiled = self._compile(compiling)
        except BaseException:
            self.close()
            raise
        self.timings.load_s = loaded - start
        self.compile_s = time.perf_counter() - loaded  # seconds that n_compiled kernels took

    def _load(self, progress: Callable[[int, int], None] | None) -> None:
        import numpy as np

        plan, hp = self.prepared.plan, self.prepared.hparams
        total, done = sum(shard.nbytes for shard in plan.shards), 0

        def count(n: int) -> None:
            nonlocal done
            self._ranks.group.check()
            done += n
            if progress is not None:
                progress(done, total)

        def one_rank(rank: int) -> tuple[ModelWeights, LatentCache]:
            ops, part = self._ops(rank), plan.ranks[rank]
            with np.errstate(all="ignore"):  # of NaN in the file: the sampler refuses the result
                on_cpu, asked = part.kind == "cpu", self.params.model
                weights = load_weights(
                    self.prepared.gguf, plan, rank, hp, ops, count,
                    copied=on_cpu and asked.no_mmap,
                    lock=self.page_lock if on_cpu and asked.mlock else None,
                )  # fmt: skip
            layers = range(*part.layers) if part.n_cached_layers else range(0)
            cache = LatentCache(ops, layers, plan.n_ctx, plan.cache)
            if hp.sparse is not None:
                cache_type = self.params.context.indexer_cache_type_k
                cache.add_index(ops, hp.sparse.full, hp.sparse.width, cache_type)
            return weights, cache

        with self._ranks.explained():
            loaded = self._ranks.group.run(one_rank)
        for weights, cache in loaded:
            self._weights.append(weights)
            self._caches.append(cache)

    def _compile(self, report: Callable[[int, int], None] | None) -> int:
        """Compiles what steps will launch, where a backend compiles at all."""
        return self._ranks.compile(self._frequencies, self._forwards(), report)

    def check_tensors(self) -> Checked:
        """Every tensor as the ranks hold it compared with the file, and none with NaN in it."""
        self._check_open()

        def download(shard: Shard) -> Any:
            weight = self._weights[shard.rank].find(shard.layer, short_name(shard.tensor))
            return self._ops(shard.rank).download(weight)

        file, plan, hp = self.prepared.gguf, self.prepared.plan, self.prepared.hparams
        with self._ranks.explained():
            return check_tensors(file, plan, hp, download)

    @property
    def load_problems(self) -> list[str]:
        """What came out worse than planned when weights were placed."""
        found = (ops.load_problem() for ops in self._ranks.ops)
        return [problem for problem in found if problem is not None]

    def _ops(self, rank: int) -> Ops:
        return self._ranks.ops[rank]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End the ranks and let go of the file; also done when the engine is collected."""
        self._weights, self._caches = [], []
        self._release()

    def take_turn(self) -> None:
        """Set this engine's threads for the process: call it where engines work in turns."""
        self._ranks.take_turn()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a file without tokenizer: feed it ids."""
        self._check_open()
        return self.prepared.tokenizer()

    @property
    def attention_forms(self) -> dict[str, str]:
        """The forms that attention really took so far, by phase; "" before its first run."""
        return {phase: " + ".join(sorted(map(str, used))) for phase, used in self.forms.items()}

    @property
    def n_captured(self) -> int:
        """Graphs that the ranks captured so far: the first step of its kind takes longer."""
        return self._ranks.n_captured

    @property
    def sums(self) -> str:
        """How GPUs add their partials under -sm graph, and why so; "" where none has to."""
        return self._ranks.sums

    @staticmethod
    def peak_memory() -> int:
        """Largest resident size of this process so far, in bytes."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def memory(self) -> dict[str, int]:
        """Bytes in use by device: what a GPU has more since opening; the process's CPU pages."""
        return self._memory.added()

    def memory_beside(self) -> dict[str, Beside]:
        """Of each GPU, what is in use that the plan doesn't name."""
        return self._memory.beside(self._ranks.nccl_bytes)

    # ---- forward ----------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], all_rows: bool = False) -> Floats:
        """Append `ids` to the cache; logits [1, V] of the last one, or [n, V] of all."""
        import numpy as np

        first = 0 if all_rows else len(ids) - 1
        return np.concatenate(list(self.stream_logits(ids, first)))

    def stream_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Floats]:
        """Append `ids`; of each ubatch the logits [m, V] of its tokens from ids[first] on.

        m is 0 where a ubatch ends before `first`; no more than one ubatch's rows exist at once, and
        one that wants very many is cut (memory.LOGIT_BYTES). On GPUs the next one has begun by the
        time that one is handed out.
        """
        self._check(ids)
        n_batch, n_ubatch, done = self.params.context.n_batch, self.params.context.n_ubatch, 0
        begun: list[tuple[Callable[[], Floats], int]] = []
        for batch in range(0, len(ids), n_batch):
            in_batch = ids[batch : batch + n_batch]
            for start in range(0, len(in_batch), n_ubatch):
                ubatch = in_batch[start : start + n_ubatch]
                for part, rows in self._parts(ubatch, max(0, first - batch - start)):
                    done += len(part)
                    begun.append((self._start("prefill", part, rows), done))
                    if len(begun) > self._ranks.n_ahead:
                        yield self._finished(*begun.pop(0), len(ids))
        while begun:
            yield self._finished(*begun.pop(0), len(ids))

    def _finished(self, logits: Callable[[], Floats], done: int, n_all: int) -> Floats:
        found = logits()
        if self.on_ubatch is not None:
            self.on_ubatch(done, n_all)
        return found

    def _parts(self, ids: Sequence[int], first: int) -> Iterator[tuple[Sequence[int], range]]:
        """A ubatch whose rows from `first` on are wanted, in equal parts where they are too many.

        The plan pays for the logits of no more rows.
        """
        most, step = most_logit_rows(self.prepared.hparams.n_vocab), len(ids)
        if len(ids) - first > most:
            step = -(-len(ids) // -(-len(ids) // most))
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            yield part, range(max(0, first - start), len(part))

    def decode(self, token_id: int) -> Floats:
        """Append one token; its logits [V]."""
        self._check([token_id])
        row: Floats = self._start("decode", [token_id], [0])()[0]
        return row

    def decode_ahead(self, token_id: int, n: int, sampler: Sampler) -> list[int]:
        """Append one token, and each that `sampler` draws after it but the last; those drawn.

        At least one and at most `n` of them, at one go on the device; empty where the sampler's
        chain, or the backend, samples on the host: use decode().
        """
        self._check([token_id])
        n = min(n, self.n_ctx - self.n_kv)
        if sampler.on_host or not self._ranks.can_sample(sampler.params, sampler.banned):
            return []
        n_past = self.n_kv
        ids = self._ranks.execute_ahead(
            token_id, n_past, n, self._frequencies, sampler.params, sampler.seed, sampler.banned,
            self._forwards(),
        )  # fmt: skip
        self._note_forms("decode")
        self.n_kv = n_past + len(ids)
        self._ids += [token_id, *ids[:-1]]
        return ids

    def _note_forms(self, phase: Phase) -> None:
        for ops in self._ranks.ops:
            self.forms[phase] |= ops.forms
            ops.forms.clear()

    def rewind(self, n_kv: int) -> None:
        """Forget all tokens from position `n_kv` on."""
        if not 0 <= n_kv <= self.n_kv:
            raise UsageError(f"can't rewind to {n_kv}: {self.n_kv} tokens are cached", "")
        self.n_kv = n_kv
        del self._ids[n_kv:]
        self._turn += 1

    def warm_up(self) -> None:
        """One token computed and forgotten: later ones find memory, kernels and graphs in place."""
        known, self.timings = self.timings, Timings()
        self.rewind(0)
        self.decode(0)
        self.rewind(0)
        self._ranks.capture_ahead(self._frequencies, self.params.sampling, self._forwards())
        self.timings = known
        for used in self.forms.values():
            used.clear()

    def save_session(self, path: str) -> None:
        """Write the cached tokens and their rows to a file that any mode and rank count loads."""
        from mlacli import session_file

        self._check_open()
        holders: dict[int, session_file.Holder] = {}
        for ops, cache in zip(self._ranks.ops, self._caches, strict=True):
            for layer in cache.rows:
                holders.setdefault(layer, (ops, cache))
        with self._ranks.explained():
            session_file.save(path, self.prepared, holders, self._ids)

    def load_session(self, path: str, prompt_ids: Sequence[int]) -> int:
        """Take the rows of as many first tokens of the prompt as the file has; how many."""
        from mlacli import session_file

        self._check_open()
        self.rewind(0)
        ranks = list(zip(self._ranks.ops, self._caches, strict=True))
        with self._ranks.explained():
            self._ids = session_file.load(path, self.prepared, ranks, prompt_ids)
        self.n_kv = len(self._ids)
        return self.n_kv

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """Logits [n, V] of every token of a sequence, from an empty cache."""
        self.rewind(0)
        return self.prefill(token_ids, all_rows=True)

    def _check_open(self) -> None:
        if not self._release.alive:
            raise UsageError("the engine is closed", "load the model again")

    def _check(self, ids: Sequence[int]) -> None:
        self._check_open()
        n_vocab = self.prepared.hparams.n_vocab
        if not len(ids):
            raise UsageError("no tokens to compute", "give at least one")
        bad = next((i for i in ids if not 0 <= i < n_vocab), None)
        if bad is not None:
            raise UsageError(f"token id {bad} is not in the vocabulary of {n_vocab}", "")
        if self.n_kv + len(ids) > self.n_ctx:
            raise ContextFull(
                f"{self.n_kv} cached and {len(ids)} new tokens exceed the context of {self.n_ctx}",
                "give a larger -c or fewer tokens",
            )

    @cached_property
    def _frequencies(self) -> Sequence[float]:
        hp = self.prepared.hparams
        frequencies: Sequence[float] = hp.rope.frequencies(hp.p)
        return frequencies

    def _forwards(self) -> list[Forward]:
        """The model as each rank runs it."""
        hp, model, plan = self.prepared.hparams, self.prepared.model, self.prepared.plan

        def forward(rank: int) -> Forward:
            weights, cache = self._weights[rank], self._caches[rank]
            seen: Any = self._ops(rank)
            if self.watch is not None and (rank == 0 or self.params.split.mode != "graph"):
                seen = LayerWatch(seen, plan.ranks[rank].layers[0], self.watch)
            return lambda step: model.forward(seen, hp, weights, cache, step)

        return [forward(rank) for rank in range(len(plan.ranks))]

    def _start(self, phase: Phase, ids: Sequence[int], rows: Sequence[int]) -> Callable[[], Floats]:
        """Begins a step; its tokens count as cached from now on."""
        n_past = self.n_kv
        logits = self._ranks.start(
            ids, n_past, self._frequencies, rows, self._forwards(),
            capture=self.watch is None,  # a watcher reads on the host
        )  # fmt: skip
        self._note_forms(phase)
        self.n_kv = n_past + len(ids)
        self._ids += ids
        return logits

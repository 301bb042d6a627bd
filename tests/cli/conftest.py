"""Runs command lines in this process, with or without a fake model behind them."""

import os
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

from mlacli.cli import run
from mlacli.errors import MlacliError
from mlacli.prepare import bundled_model
from mlacli.timings import Timings

GOLDEN = Path(__file__).parent / "golden"
VOCAB = 300


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def mlacli(capsys, monkeypatch):
    """mlacli("plan", "-m", ...) -> Outcome."""
    for name in [n for n in os.environ if n.startswith(("LLAMA_ARG_", "MLACLI_"))]:
        monkeypatch.delenv(name)

    def call(*words: str) -> Outcome:
        capsys.readouterr()
        code = run(list(words))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def golden():
    """golden(name, text): equal to golden/<name>.txt; UPDATE_GOLDEN=1 writes the files anew."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(text)
        assert text == path.read_text()

    return check


class FakeTokenizer:
    """Bytes are ids; 0 is BOS and 1 ends a generation."""

    warnings: tuple[str, ...] = ()
    eog_ids = frozenset({1})
    bos_id, eos_id = 0, 1

    def __init__(self, add_bos: bool = True) -> None:
        self.add_bos = add_bos

    def encode(self, text, add_special=True, parse_special=True):
        assert parse_special
        return ([0] if self.add_bos and add_special and text else []) + list(text.encode())

    def is_hidden(self, token_id):
        return token_id < 2

    def piece(self, token_id):
        return (b"<BOS>", b"<EOS>")[token_id] if token_id < 2 else bytes([token_id])

    def decode(self, ids):
        return bytes(i for i in ids if i > 1).decode("utf-8", "replace")

    def stream(self):
        return SimpleNamespace(push=lambda i: self.decode([i]), flush=lambda: "")


@dataclass
class FakeModel:
    """What the commands see of prepare() and Engine; `answer` is what it generates."""

    answer: list[int] = field(default_factory=lambda: [*list(b" world"), 1])
    tokenizer: FakeTokenizer | None = field(default_factory=FakeTokenizer)
    n_ctx: int = 256
    findings: tuple = ()
    predicted_tps: float | None = None
    fails_after: int | None = None  # pieces, then KeyboardInterrupt
    calls: list = field(default_factory=list)
    path: str | None = None
    params: object = None
    weights_loaded: bool = False
    error: MlacliError | None = None
    metadata: dict = field(default_factory=dict)
    saved: dict = field(default_factory=dict)  # path -> what save_session was called at
    kernels: int = 0  # that a load compiles
    load_problems: list[str] = field(default_factory=list)

    @property
    def engine_class(self):
        return FakeEngine

    def prepare(self, path, params, *, refuse_oversize=True):
        self.path, self.params = path, params
        if self.error:
            raise self.error
        return SimpleNamespace(
            path=Path(path or "bundled.gguf"),
            params=params,
            n_threads=params.context.n_threads or 1,
            plan=SimpleNamespace(n_ctx=self.n_ctx, n_ubatch=params.context.n_ubatch, ranks=()),
            hparams=SimpleNamespace(n_vocab=VOCAB),
            gguf=SimpleNamespace(metadata=self.metadata),
            findings=self.findings,
            effective=(("split mode", "none", ""), ("context", str(self.n_ctx), "given")),
            predicted_tps=self.predicted_tps,
            tokenizer=lambda: self.tokenizer,
            check_memory=lambda: None,
        )

    def engine(self, prepared, progress=None, compiling=None):
        self.weights_loaded = True
        progress(1, 2)
        engine = FakeEngine(self, prepared)
        if self.kernels:
            compiling(0, self.kernels)
            engine.n_compiled = self.kernels
        return engine


class FakeEngine:
    """Counts what is asked of it; logits favour id (n_kv + 1) % VOCAB."""

    def __init__(self, model, prepared):
        self.model, self.prepared, self.params = model, prepared, prepared.params
        self.n_ctx, self.n_kv, self.context_full = model.n_ctx, 0, False
        self.closed, self.checked = False, None
        self.timings = Timings(
            load_s=0.5, prompt_s=0.25, n_prompt=5, decode_s=2.0, n_decoded=7, ttft_s=0.3,
            sample_s=0.1, n_sampled=8,
        )  # fmt: skip
        self.page_lock = SimpleNamespace(problem=None)
        self.on_ubatch = None
        self.n_compiled, self.n_captured, self.compile_s, self.sums = 0, 0, 1.25, ""
        self.load_problems = model.load_problems

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.model.calls.append(("close",))

    attention_forms = MappingProxyType({"prefill": "toy form", "decode": "other form"})

    def peak_memory(self):
        return 64 << 20

    def memory(self):
        return {"cpu": 32 << 20}

    def memory_beside(self):
        return {}

    def decode_ahead(self, token_id, n, sampler):
        return []

    def warm_up(self):
        self.model.calls.append(("warm",))

    def take_turn(self):
        self.model.calls.append(("turn", self.params.split.mode))

    def rewind(self, n_kv):
        assert n_kv <= self.n_kv
        self.n_kv = n_kv
        self.model.calls.append(("rewind", n_kv))

    def decode(self, token_id):
        assert 0 <= token_id < VOCAB and self.n_kv < self.n_ctx
        self.model.calls.append(("decode", self.n_kv))
        self.n_kv += 1
        return np.zeros(VOCAB, np.float32)

    def prefill(self, ids, all_rows=False):
        assert self.n_kv + len(ids) <= self.n_ctx and max(ids) < VOCAB
        self.model.calls.append(("prefill", self.n_kv, len(ids)))
        self.n_kv += len(ids)
        return np.zeros((1, VOCAB), np.float32)

    def generate_ids(self, prompt_ids, n_predict=-1, sampler=None, reuse=False):
        self.model.calls.append(("generate", list(prompt_ids), n_predict, sampler))
        room = self.n_ctx - len(prompt_ids)
        for n, token_id in enumerate(self.model.answer):
            if n == self.model.fails_after:
                raise KeyboardInterrupt
            if n == room:
                self.context_full = True
                return
            if n == n_predict:
                return
            yield token_id


@pytest.fixture
def fake_model(monkeypatch):
    """A FakeModel that `mlacli.prepare` and `mlacli.engine` now stand for."""
    model = FakeModel()
    rows = lambda plan: (("device", "total"), [("cpu", "1.5 GiB")])  # noqa: E731
    fakes = {
        "mlacli.prepare": {
            "prepare": model.prepare,
            "together": list,
            "bundled_model": bundled_model,
        },
        "mlacli.engine": {"Engine": model.engine},
        "mlacli.parallel.plan_report": {
            "plan_rows": rows,
            "shard_rows": lambda plan: (("tensor", "rank"), [("output.weight", "0")]),
            "memory_rows": lambda plan, gpus: (("memory", "self"), [("cpu", "12")]),
            "beside_lines": lambda found: [],
            "plan_as_dict": lambda plan: {"n_ctx": plan.n_ctx},
        },
    }
    for name, names in fakes.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return model


@dataclass(frozen=True)
class FakeFinding:
    level: str
    flag: str
    verdict: str
    message: str
    hint: str = ""


@pytest.fixture
def fake_rules(monkeypatch):
    """A `mlacli.compat` of three rules, so that the report is tested apart from the real ones."""

    def guard(arch, params):
        if not (params.split.mode == "graph" and params.model.run_time_repack):
            return params, ()
        word = params.spelled("run_time_repack")
        finding = FakeFinding(
            "warning",
            word,
            "downgraded",
            f"-sm graph becomes -sm layer on {arch} because of {word}",
            f"leave {word} out",
        )
        return replace(params, split=replace(params.split, mode="layer")), (finding,)

    def check(arch, params):
        found = []
        if "cache_type_v" in params.typed:
            word = params.spelled("cache_type_v")
            found.append(FakeFinding("note", word, "no effect", "the latent row holds V too"))
        if params.split.mode == "graph" and not params.context.flash_attn:
            word = params.spelled("flash_attn")
            found.append(FakeFinding("error", word, "refused", "-sm graph needs -fa on", "drop it"))
        return tuple(found)

    module = types.ModuleType("mlacli.compat")
    vars(module).update(guard=guard, check=check)
    monkeypatch.setitem(sys.modules, "mlacli.compat", module)

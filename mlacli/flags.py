"""Every flag once: names, value, default, help. The parser, --help and the library read this table.

No click here: `cli/words.py` walks a command line by it, `load()` looks up the long names.
Spelling and defaults are llama.cpp's and ik_llama.cpp's; what those have and mlacli has not is in
`flags_foreign.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from mlacli.devices import default_devices
from mlacli.errors import UsageError
from mlacli.flag_entry import Flag
from mlacli.flag_values import (
    cache_type,
    choice,
    compared_modes,
    devices,
    integer,
    layers,
    nearest,
    on_off,
    override_kv,
    placement,
    rows_kept,
    shares,
    size,
    sizes,
    split_mode,
    text,
)
from mlacli.flags_commands import CHECK, LOGS, LOOK, OTHER
from mlacli.flags_generation import CHAT, PROMPT, SAMPLING, SESSION, WARMUP
from mlacli.loading.presets import preset
from mlacli.params import ContextParams, ModelParams, Params, SamplingParams, SplitParams

MODEL: tuple[Flag, ...] = (
    Flag(
        ("-m", "--model"),
        text,
        "GGUF file, of a split set any part; the bundled model by default",
        "FILE",
    ),
    Flag(
        ("--override-kv", "-okv"),
        override_kv,
        "override a metadata key, KEY=TYPE:VALUE",
        "KV",
        repeats=True,
    ),
)

DEVICES: tuple[Flag, ...] = (
    Flag(
        ("-dev", "--device"),
        devices,
        "devices, in rank order: cpu,cpu or cuda0,cuda1; all GPUs by default, cpu without any",
        "LIST",
    ),
    Flag(
        ("-sm", "--split-mode"),
        split_mode,
        "none | layer | graph | auto; layer with several devices, none with one",
        "MODE",
    ),
    Flag(
        ("-ts", "--tensor-split"),
        shares,
        "share of each device, e.g. 3,1; equal or by memory by default",
        "SHARES",
        (),
    ),
    Flag(("--max-gpu",), integer(0), "only the first N of -dev take part; 0 = all", "N", 0),
    Flag(("-mg", "--main-gpu"), integer(0), "device used by -sm none, an index into -dev", "N", 0),
    Flag(
        ("-ngl", "--gpu-layers", "--n-gpu-layers"),
        layers,
        "layers kept on GPUs, counted from the last; all by default",
        "N",
    ),
    Flag(
        ("--expert-split",),
        choice("width", "layer", "id"),
        "routed experts under graph: width | layer | id",
        "RULE",
        "width",
    ),
    Flag(
        ("--comm",),
        choice("auto", "p2p", "nccl", "host"),
        "how GPUs sum under graph: through each other's memory, NCCL or host memory",
        "WAY",
        "auto",
    ),
    Flag(("--margin",), size, "memory that stays free on each device", "SIZE", 1 << 30),
)

PLACEMENT: tuple[Flag, ...] = (
    Flag(
        ("-ncmoe", "--n-cpu-moe"),
        integer(0),
        "keep routed experts of N layers in host memory",
        "N",
        0,
    ),
    Flag(("-cmoe", "--cpu-moe"), None, "keep all routed experts in host memory"),
    Flag(
        ("-ot", "--override-tensor"),
        placement,
        "place tensors, regex=DEVICE[,...]",
        "RULES",
        repeats=True,
    ),
    Flag(("-rtr", "--run-time-repack"), None, "repack weights while loading"),
    Flag(("-muge", "--merge-up-gate-experts"), None, "one product for expert gate and up"),
)

CONTEXT: tuple[Flag, ...] = (
    Flag(("-c", "--ctx-size"), integer(0),
         "context size; 0 = what the model and memory allow", "N", 0),
    Flag(("-b", "--batch-size"), integer(1), "logical batch", "N", 2048),
    Flag(("-ub", "--ubatch-size"), integer(1), "tokens per forward in prefill", "N", 512),
    Flag(("-mla", "--mla-use"), integer(0, 3),
         "attention: 0 cached per head, 1 absorbed, 2 and 3 expanded prefill", "N", 3),
    Flag(("-fa", "--flash-attn"), on_off,
         "block-wise attention, or whole score matrices: on | off | auto",
         "WORD", True, optional="on"),
    Flag(("-ctk", "--cache-type-k"), cache_type,
         "type of the latent cache, of K under -mla 0: f32 f16 bf16 q8_0", "TYPE", "f16"),
    Flag(("-ctv", "--cache-type-v"), cache_type,
         "type of V where it has its own cache: -mla 0, and 1 with -fa off", "TYPE", "f16"),
    Flag(("-amb", "--attention-max-batch"), integer(0),
         "score matrices held at once by -fa off, at least 128; 0 = all", "MIB", 256),
    Flag(("-gap", "--graph-attn-precision"), choice("f16", "f32"),
         "rounding of query, cached row and probabilities: f16 | f32", "TYPE", "f16"),
    Flag(("-grt", "--graph-reduce-type"), choice("f32", "f16", "bf16", "q8_0"),
         "type of the partial sums of ubatches over 32 tokens", "TYPE", "f32"),
    Flag(("-dsa", "--dsa"), None, "sparse attention; on wherever the file has an indexer"),
    Flag(("--no-dsa",), None, "dense attention, indexer left out"),
    Flag(("-dsatk", "--dsa-top-k"), rows_kept,
         "cache rows a token attends to; -1, the default, is the file's number", "N"),
    Flag(("-ictk", "--indexer-cache-type-k"), cache_type,
         "type of the indexer's key cache: f32 f16 bf16 q8_0", "TYPE", "f16"),
    Flag(("-t", "--threads"), integer(1, 1 << 16),
         "CPU threads, divided among CPU ranks; by default as many as the model keeps busy", "N"),
)  # fmt: skip

RUN: tuple[Flag, ...] = (
    Flag(("--strict",), None, "exit 3 instead of running differently than asked"),
    Flag(
        ("-v", "--verbose", "--log-verbose"),
        None,
        "print each tensor's shard per rank, and how attention ran",
    ),
)

LOAD: tuple[Flag, ...] = (
    Flag(
        ("--check-tensors",),
        None,
        "after loading, compare what the devices hold with the file, byte for byte; refuse NaN",
    ),
    Flag(("--mmap",), None, "map the model file (on by default)"),
    Flag(("--no-mmap",), None, "copy what a CPU rank holds of it into memory instead"),
    Flag(("--mlock",), None, "lock the pages of CPU ranks' weights in memory"),
)

SYNTHETIC = Flag(
    ("--synthetic",),
    preset,
    "no file: random weights in the shapes of v2lite, glm47flash, v3, kimi_k2, mistral4 or "
    "glm5, of N layers where N is given",
    "PRESET[:N]",
)

SWEEP: tuple[Flag, ...] = (
    Flag(
        ("-n", "--predict", "--n-predict"),
        integer(-2),
        "decode steps per row; a quarter of -ub when not positive",
        "N",
        -1,
    ),
    Flag(("-nrep", "--n-repetitions"), integer(1), "repetitions of the first row", "N", 1),
    Flag(("-wb", "--warmup-batch"), None, "warm up with one ubatch"),
    *WARMUP,
    Flag(("--sweep-stride",), integer(1), "measure every Nth row", "N", 1),
    Flag(("--sweep-memory",), None, "report peak resident and device memory per row"),
    Flag(
        ("--output-format",),
        choice("md", "jsonl", "csv", table="md"),
        "md (or table) | jsonl | csv",
        "WORD",
        "md",
    ),
    Flag(("--compare",), compared_modes, "measure modes in turn: none,layer,graph", "MODES", ()),
    SYNTHETIC,
    Flag(("--plot",), text, "draw S_PP and S_TG over N_KV: FILE.png, .svg or .pdf", "FILE"),
    Flag(
        ("--results",),
        text,
        "with --plot: draw saved results instead of measuring; may be repeated",
        "FILE",
        (),
        repeats=True,
    ),
)

PERPLEXITY: tuple[Flag, ...] = (
    Flag(("-f", "--file"), text, "the text to score, - for stdin", "FILE"),
    Flag(("--chunks",), integer(-1), "score at most N chunks of -c tokens; -1 all", "N", -1),
    Flag(("--ppl-stride",), integer(0), "overlapping windows, N tokens apart; 0 = off", "N", 0),
    Flag(
        ("--kl-divergence-base", "--save-all-logits"),
        text,
        "write log-probabilities to FILE, or read them with --kl-divergence",
        "FILE",
    ),
    Flag(("--kl-divergence",), None, "compare with the file of --kl-divergence-base"),
    Flag(("--compare",), compared_modes, "score modes against the first of them", "MODES", ()),
)

PLAN: tuple[Flag, ...] = (
    Flag(("--vram",), sizes, "plan for devices that needn't exist, e.g. 80G,80G,24G", "SIZES", ()),
    Flag(("--json",), None, "print the plan as JSON"),
)

ADVICE: tuple[Flag, ...] = (*MODEL, SYNTHETIC, CONTEXT[0], PLAN[0])
COMMON: tuple[Flag, ...] = MODEL + DEVICES + PLACEMENT + CONTEXT + RUN
LOADED: tuple[Flag, ...] = COMMON + LOAD  # by commands that read weights
GENERATION: tuple[Flag, ...] = PROMPT + CHAT + SAMPLING + SESSION

Sections = tuple[tuple[str, tuple[Flag, ...]], ...]
_COMMON_SECTIONS: Sections = (
    ("Model", MODEL),
    ("Devices and split", DEVICES),
    ("Placement", PLACEMENT),
    ("Context and precision", CONTEXT),
    ("Run", RUN + LOGS),
    ("Other", OTHER),
)


def _perplexity_sections() -> Sections:
    """The common ones; -c is the length of a chunk there, 512 as in llama.cpp."""
    chunk = "tokens of a chunk, whose second half is scored"
    return tuple(
        (title, tuple(replace(f, default=512, help=chunk) if f.key == "ctx_size" else f
                      for f in flags))
        for title, flags in _COMMON_SECTIONS
    )  # fmt: skip


_LOADING = ("Loading", LOAD)
COMMANDS: Mapping[str, Sections] = MappingProxyType(
    {
        "run-model": (
            ("Prompt", PROMPT),
            ("Chat", CHAT),
            ("Sampling", SAMPLING),
            ("Prompt cache and timings", SESSION + WARMUP),
            *_COMMON_SECTIONS,
            _LOADING,
        ),
        "sweep-bench": (("Benchmark", SWEEP), *_COMMON_SECTIONS, _LOADING),
        "plan": (("Plan", PLAN), *_COMMON_SECTIONS),
        "perplexity": (("Perplexity", PERPLEXITY + WARMUP), *_perplexity_sections(), _LOADING),
        "devices": (("Devices", LOOK), ("Advice", ADVICE), ("Other", LOGS + OTHER)),
        "check-flags": (("Check", CHECK), ("Other", OTHER)),
    }
)

EXCLUSIVE: tuple[tuple[str, ...], ...] = (
    ("prompt", "file", "prompt_ids"),
    ("dsa", "no_dsa"),
    ("mmap", "no_mmap"),
    ("warmup", "no_warmup"),
    ("warmup_batch", "no_warmup"),
    ("perf", "no_perf"),
    ("conversation", "no_conversation", "prompt_ids"),
    ("system_prompt", "system_prompt_file"),
    ("chat_template", "chat_template_file"),
    ("grammar", "grammar_file", "json_schema", "json_schema_file"),
    ("grammar", "ignore_eos"),
    ("grammar_file", "ignore_eos"),
    ("json_schema", "ignore_eos"),
    ("json_schema_file", "ignore_eos"),
    ("samplers", "sampling_seq"),
    ("no_conversation", "system_prompt"),
    ("no_conversation", "system_prompt_file"),
    ("split_mode", "compare"),
    ("results", "compare"),
    ("kl_divergence", "compare"),
    ("kl_divergence_base", "compare"),
    ("kl_divergence_base", "ppl_stride"),
)

# Environment variable -> key; read before the words of the command line, which win.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        flag.env: flag.key
        for command, sections in COMMANDS.items()
        for title, flags in sections
        for flag in flags
        if command != "check-flags" and title != "Other"
    }
)


def parse_value(flag: Flag, value: Any, spelled: str) -> Any:
    """`value` parsed when it is a word; errors name the flag as typed."""
    if flag.parse is None:
        return bool(value)
    if isinstance(value, bool):
        value = "on" if value else "off"
    try:
        return flag.parse(str(value)) if isinstance(value, (str, int, float)) else value
    except UsageError as e:
        raise UsageError(f"{spelled}: {e.message}", e.hint) from None


def by_long_name(table: Iterable[Flag]) -> dict[str, Flag]:
    """Every long name, with underscores, to its flag."""
    return {n[2:].replace("-", "_"): f for f in table for n in f.names if n.startswith("--")}


def library_values(table: Iterable[Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    """`load()`'s keyword arguments as key -> parsed value; unknown names raise UsageError."""
    known = by_long_name(table)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"unknown parameter {name!r}", nearest(name, known))
        flag = known[name]
        if flag.repeats:
            words = [value] if isinstance(value, str) else list(value)
            values[flag.key] = tuple(parse_value(flag, w, name) for w in words)
        else:
            values[flag.key] = parse_value(flag, value, name)
    return values


_RENAMED = {
    "split_mode": "mode",
    "device": "devices",
    "ctx_size": "n_ctx",
    "batch_size": "n_batch",
    "gpu_layers": "n_gpu_layers",
    "ubatch_size": "n_ubatch",
    "mla_use": "mla",
    "threads": "n_threads",
}


def to_params(values: Mapping[str, Any], typed: Mapping[str, str] | None = None) -> Params:
    """Params from key -> parsed value; keys of other concerns (the prompt, say) are ignored."""
    settled = {_RENAMED.get(k, k): v for k, v in values.items() if v is not None}
    if "override_kv" in settled:
        settled["override_kv"] = MappingProxyType(dict(settled["override_kv"]))

    if "devices" not in settled and not settled.get("vram"):
        settled["devices"] = default_devices()
    if most := settled.get("max_gpu"):
        settled |= {key: settled[key][:most] for key in ("devices", "vram") if key in settled}
    if "sampling_seq" in settled:
        settled["samplers"] = settled.pop("sampling_seq")

    def group(cls: type) -> dict[str, Any]:
        return {f.name: settled[f.name] for f in fields(cls) if f.name in settled}

    return Params(
        model=ModelParams(**group(ModelParams)),
        split=SplitParams(**group(SplitParams)),
        context=ContextParams(**group(ContextParams)),
        sampling=SamplingParams(**group(SamplingParams)),
        strict=bool(settled.get("strict", False)),
        typed=MappingProxyType(dict(typed or {})),
    )

"""Flags after all defaults are settled: frozen dataclasses, no click, no array library.

`flags.py` turns words into values; this module turns values into the four parameter groups that
the plan, the ranks and the sampler read. What depends on the file (context size, split mode after
the guard) is settled in `prepare.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

SplitMode = Literal["none", "layer", "graph", "auto"]
ExpertSplit = Literal["width", "layer", "id"]
CacheType = Literal["f32", "f16", "bf16", "q8_0"]
KvValue = int | float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParams:
    """What is read, and how; the five placement flags that graph mode can't take live here too."""

    override_kv: Mapping[str, KvValue] = field(default_factory=lambda: MappingProxyType({}))
    n_cpu_moe: int = 0
    cpu_moe: bool = False
    run_time_repack: bool = False
    merge_up_gate_experts: bool = False
    override_tensor: tuple[str, ...] = ()
    check_tensors: bool = False
    no_mmap: bool = False  # weights copied into memory instead of mapped
    mlock: bool = False  # their pages kept from being swapped out


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitParams:
    """Who computes what. `mode` None = layer with several devices, none with one."""

    mode: SplitMode | None = None
    devices: tuple[str, ...] = ("cpu",)
    vram: tuple[int, ...] = ()  # bytes of devices that needn't exist; plan only
    margin: int = 1 << 30  # bytes of each device that stay free
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    n_gpu_layers: int | None = None  # None = all
    expert_split: ExpertSplit = "width"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParams:
    """Sizes and precision of a run. `n_ctx` 0 = the smaller of the training context and what fits.

    n_batch and n_ubatch are clipped as llama.cpp does: ubatch to batch, both to the context.
    """

    n_ctx: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    mla: int = 3
    flash_attn: bool = True
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"  # where V has a cache of its own (attention_forms)
    attention_max_batch: int = 256  # MiB of scores where they are held whole; 0 = no bound
    graph_attn_precision: Literal["f16", "f32"] = "f16"
    graph_reduce_type: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    comm: Literal["auto", "p2p", "nccl", "host"] = "auto"  # the way of sums between GPUs
    dsa: bool = False  # asked for by name; sparse attention is on wherever the file has an indexer
    no_dsa: bool = False
    dsa_top_k: int | None = None  # None = the file's
    indexer_cache_type_k: CacheType = "f16"
    n_threads: int | None = None


# The sampler chain in llama.cpp's order; `sampling_stages.STAGES` has a function for each.
SAMPLERS = (
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampler chain; temp <= 0 is greedy. `seed` None = a fresh one, printed with the run.

    -1 as a count of last tokens means all of them. mirostat 1 and 2 stand in for the whole chain
    but temperature, as in llama.cpp.
    """

    seed: int | None = None
    samplers: tuple[str, ...] = SAMPLERS
    temp: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exp: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breaker: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_lr: float = 0.1
    mirostat_ent: float = 5.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    ignore_eos: bool = False
    grammar: str | None = None  # GBNF
    json_schema: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """All four groups, and how each given flag was spelled (`typed`: key -> word)."""

    model: ModelParams = ModelParams()
    split: SplitParams = SplitParams()
    context: ContextParams = ContextParams()
    sampling: SamplingParams = SamplingParams()
    strict: bool = False
    typed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def spelled(self, key: str) -> str:
        """The flag as the user typed it, else its long name."""
        return self.typed.get(key, "--" + key.replace("_", "-"))

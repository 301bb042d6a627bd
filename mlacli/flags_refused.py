"""Flags that llama.cpp or ik_llama.cpp know and mlacli does not run: refused by name.

`values` says how many words each takes, so that a whole foreign command line can still be walked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mlacli.errors import UsageError


@dataclass(frozen=True, slots=True)
class Refused:
    """Names of one flag, how many values it takes, and what to do instead."""

    names: tuple[str, ...]
    values: int
    hint: str

    def error(self, word: str) -> UsageError:
        return UsageError(f"{word} is not supported", self.hint)


_SERVER = "mlacli has no server"
_CHAT = "chat is not there yet; give the whole prompt with -p or -f"
_FORMAT = "output can't be constrained; leave it out"
_DRAFT = "there is no speculative decoding; leave it out"
_LOAD = "weights are mapped and each rank reads only its own part; leave it out"
_DOWNLOAD = "download the file and give it with -m"
_SAMPLER = "the chain is --top-k, --top-p, --min-p, --temp"
_ROPE = "set the metadata key with --override-kv"
_ALWAYS = "not needed; leave it out"
_SHIFT = "MLA models don't shift; give a larger -c"
_MLA = "use -mla 0, 1, 2 or 3 and -ub to bound the scratch memory"

REFUSED: tuple[Refused, ...] = (
    Refused(("--host", "--port", "--api-key", "--path", "--alias", "-a"), 1, _SERVER),
    Refused(("-np", "--parallel", "-to", "--timeout", "--slot-save-path"), 1, _SERVER),
    Refused(("-cb", "--cont-batching", "--metrics", "--slots", "--embedding"), 0, _SERVER),
    Refused(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hft", "--hf-token"), 1, _DOWNLOAD),
    Refused(("-mu", "--model-url"), 1, _DOWNLOAD),
    Refused(("--lora",), 1, "merge the adapter into the GGUF file first"),
    Refused(("--lora-scaled",), 2, "merge the adapter into the GGUF file first"),
    Refused(("--control-vector",), 1, "leave it out"),
    Refused(("--mmproj", "-mm", "--image"), 1, "mlacli runs text models only"),
    Refused(("-md", "--model-draft", "-cd", "--ctx-size-draft", "-devd"), 1, _DRAFT),
    Refused(("-ngld", "--gpu-layers-draft", "--draft", "--draft-max", "--draft-min"), 1, _DRAFT),
    Refused(("--draft-p-min", "--spec-type"), 1, _DRAFT),
    Refused(("-mtp", "--multi-token-prediction"), 0, _DRAFT),
    Refused(("-cnv", "--conversation", "-i", "--interactive", "-if", "--jinja", "-ins"), 0, _CHAT),
    Refused(("--interactive-first", "-mli", "--multiline-input", "--in-prefix-bos"), 0, _CHAT),
    Refused(("-sp", "-sys", "--system-prompt", "-spf", "-r", "--reverse-prompt"), 1, _CHAT),
    Refused(("--chat-template", "--chat-template-file", "--chat-template-kwargs"), 1, _CHAT),
    Refused(("--in-prefix", "--in-suffix", "-rea", "--reasoning-format"), 1, _CHAT),
    Refused(("--reasoning-budget",), 1, _CHAT),
    Refused(("-no-cnv", "--no-conversation", "-st", "--single-turn"), 0, _ALWAYS),
    Refused(("--grammar", "--grammar-file", "-j", "--json-schema"), 1, _FORMAT),
    Refused(("--samplers", "--sampling-seq", "--sampler-seq"), 1, _SAMPLER),
    Refused(("--repeat-penalty", "--repeat-last-n", "--presence-penalty"), 1, _SAMPLER),
    Refused(("--frequency-penalty", "--typical", "--tfs", "--dynatemp-range"), 1, _SAMPLER),
    Refused(("--dynatemp-exp", "--mirostat", "--mirostat-lr", "--mirostat-ent"), 1, _SAMPLER),
    Refused(("--xtc-probability", "--xtc-threshold", "--top-n-sigma"), 1, _SAMPLER),
    Refused(("--dry-multiplier", "--dry-base", "--dry-allowed-length"), 1, _SAMPLER),
    Refused(("--dry-penalty-last-n", "--dry-sequence-breaker"), 1, _SAMPLER),
    Refused(("-l", "--logit-bias"), 1, _SAMPLER),
    Refused(("--penalize-nl",), 0, _SAMPLER),
    Refused(("--no-mmap", "--mlock", "-thp", "--direct-io"), 0, _LOAD),
    Refused(("--numa",), 1, _LOAD),
    Refused(("--fit",), 0, "see what fits with `mlacli plan`, then set -c and -ts"),
    Refused(("--fit-margin", "-gfm"), 1, "use --margin"),
    Refused(("-dr", "--dry-run"), 0, "use `mlacli plan`"),
    Refused(("--max-gpu",), 1, "name the devices with -dev"),
    Refused(("--list-devices",), 0, "leave it out"),
    Refused(("--rpc",), 1, "ranks run on the devices of -dev"),
    Refused(("-no-fa", "--no-flash-attn"), 0, "use -fa off"),
    Refused(("-amb", "--attention-max-batch"), 1, _MLA),
    Refused(("-smf16",), 0, "use -grt f16"),
    Refused(("-smf32",), 0, "use -grt f32"),
    Refused(("-khad", "--k-cache-hadamard", "-vhad"), 0, "leave it out, or use -ctk f16"),
    Refused(("-dsa", "--dsa"), 0, "no architecture with a sparse indexer runs yet; leave it out"),
    Refused(("-dsatk", "--dsa-top-k", "-ictk"), 1, "the sparse indexer does not run yet"),
    Refused(("--rope-scaling", "--rope-scale", "--rope-freq-base"), 1, _ROPE),
    Refused(("--rope-freq-scale", "--yarn-orig-ctx", "--yarn-ext-factor"), 1, _ROPE),
    Refused(("--yarn-attn-factor", "--yarn-beta-fast", "--yarn-beta-slow"), 1, _ROPE),
    Refused(("--context-shift", "--keep"), 1, _SHIFT),
    Refused(("--no-context-shift",), 0, "not needed: MLA models never shift"),
    Refused(("-mqkv", "--merge-qkv", "-fmoe", "--fused-moe"), 0, _ALWAYS),
    Refused(("-no-fmoe", "--no-fused-moe", "-no-fug", "-no-mmad", "-ger"), 0, _ALWAYS),
    Refused(("-smgs", "-sas", "--scheduler-async", "-gr", "-no-gr", "-rcache"), 0, _ALWAYS),
    Refused(("-no-ooae", "--no-warmup", "--minilog", "--verbose-prompt"), 0, _ALWAYS),
    Refused(("-ser", "-mea", "--max-extra-alloc", "-cuda", "-op"), 1, _ALWAYS),
    Refused(("-tb", "--threads-batch"), 1, "-t sets the threads of prefill and decode"),
    Refused(("-lv", "--verbosity", "--log-file", "-ptc"), 1, "use -v; redirect stderr to a file"),
    Refused(("-bf", "--binary-file"), 1, "use -f"),
    Refused(("--prompt-cache",), 1, "sessions can't be saved; leave it out"),
    Refused(("--sweep-stride",), 1, "every row is measured; leave it out"),
    Refused(("--sweep-memory",), 0, "leave it out"),
)

BY_NAME: Mapping[str, Refused] = MappingProxyType({n: r for r in REFUSED for n in r.names})

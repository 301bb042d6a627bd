"""What the flag table says about one flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlacli.flag_values import Parse

_ENV_NAMES = {
    "batch_size": "batch",
    "ubatch_size": "ubatch",
    "gpu_layers": "n_gpu_layers",
    "predict": "n_predict",
    "temp": "temperature",
    "verbosity": "log_verbosity",
    "reasoning_format": "think",
    "log_jsonl": "log_jsonl_file",  # LLAMA_ARG_LOG_JSONL is a switch there
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. `parse` None = a switch; `key` is its first long name with underscores."""

    names: tuple[str, ...]
    parse: Parse | None
    help: str
    metavar: str = ""
    default: Any = None
    optional: str | None = None  # the value meant when the next word isn't one (-fa)
    repeats: bool = False

    @property
    def key(self) -> str:
        return next(n for n in self.names if n.startswith("--"))[2:].replace("-", "_")

    @property
    def env(self) -> str:
        """Its environment variable, named as in llama.cpp where that has one."""
        return "LLAMA_ARG_" + _ENV_NAMES.get(self.key, self.key).upper()

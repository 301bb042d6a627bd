"""mlacli runs MLA-attention GGUF models with head-wise tensor parallelism.

`load` and `Engine` are resolved on first use, so that importing the package (and `--help`)
costs neither numpy nor cupy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"
__all__ = ["Engine", "__version__", "load"]

if TYPE_CHECKING:
    from mlacli.engine import Engine, load


def __getattr__(name: str) -> Any:
    if name in ("Engine", "load"):
        from mlacli import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Draws S_PP and S_TG over N_KV for print: one panel each, one line per mode or file.

The only file that knows matplotlib, and only when something is drawn.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlacli.errors import MlacliError, UsageError
from mlacli.sweep_compare import Point

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, told apart with any colour vision; the yellow is too faint on paper.
# Marker and dash differ too, so that a grey copy is still readable.
_STYLES = (
    ("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
    ("#000000", "v", "-"), ("#56B4E9", "P", "--"), ("#E69F00", "X", "-."),
)  # fmt: skip
_PAPER = {
    "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "svg.fonttype": "none", "pdf.fonttype": 42,
    "svg.hashsalt": "mlacli",
}  # fmt: skip


def check_plot(path: str | Path) -> None:
    """Refuses before anything is measured what would fail after."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"--plot: can't draw {path.name}", "name it " + ", ".join(f"*{f}" for f in FORMATS)
        )
    if not path.absolute().parent.is_dir():
        raise MlacliError(f"--plot: there is no folder {path.parent}", "create it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise MlacliError(
            "--plot needs matplotlib, which is not installed", "pip install 'mlacli[plot]'"
        )


def draw(series: Mapping[str, Sequence[Point]], path: str | Path) -> None:
    """One file with both panels; failed rows are gaps."""
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    deepest = max((p.n_kv for points in series.values() for p in points), default=0)
    tick = 2 ** math.ceil(math.log2(max(4, deepest) / 6))  # depths are powers of two
    with matplotlib.rc_context(_PAPER):
        figure = Figure(figsize=(7.0, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, (label, points) in enumerate(series.items()):
            colour, marker, dash = _STYLES[i % len(_STYLES)]
            look: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "linestyle": dash,
                "label": label,
            }
            look |= {"markeredgecolor": "white", "markeredgewidth": 0.5}
            shown = sorted(points, key=lambda p: p.n_kv)
            depths = [p.n_kv for p in shown]
            every = max(1, len(shown) // 16)  # no more markers than can be told apart
            left.plot(depths, [_gap(p.speed_pp) for p in shown], markevery=every, **look)
            right.plot(depths, [_gap(p.speed_tg) for p in shown], markevery=every, **look)
        for axes, title in ((left, "Prefill (S_PP)"), (right, "Decode (S_TG)")):
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("N_KV, tokens in the cache")
            axes.set_ylabel("tokens per second")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MultipleLocator(tick))
            axes.margins(x=0.03)
            axes.grid(True, linewidth=0.4, color="#d0d0d0")
            axes.set_axisbelow(True)
        if len(series) > 1:
            figure.legend(
                *left.get_legend_handles_labels(), loc="outside lower center",
                ncols=min(4, len(series)), frameon=False, handlelength=3.5,
            )  # fmt: skip
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, dpi=300, metadata=metadata)
        except OSError as e:
            raise MlacliError(f"can't write {path}: {e.strerror}", "check --plot") from e


def _gap(speed: float | None) -> float:
    return math.nan if speed is None else speed

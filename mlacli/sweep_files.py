"""Reads sweep-bench results back: our own tables, CSV and JSON lines, and ik_llama.cpp's."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from itertools import dropwhile
from pathlib import Path
from typing import Any

from mlacli.errors import MlacliError
from mlacli.sweep_compare import Point

_HINT = "give a file that sweep-bench printed, as md, csv or jsonl"
_TABLE = {"N_KV": "n_kv", "S_PP t/s": "speed_pp", "S_TG t/s": "speed_tg", "MODE": "split_mode"}


def read_series(path: str | Path) -> dict[str, list[Point]]:
    """Label -> points of one file; a file of several modes has one label each."""
    path = Path(path)
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        lines = list(dropwhile(lambda line: not line.startswith(("{", "|", "n_kv_max,")), lines))
    except (OSError, UnicodeDecodeError) as e:
        raise MlacliError(f"can't read the results {path}: {e}", _HINT) from e
    try:
        rows = list(_rows(lines))
        by_mode: dict[str, list[Point]] = {}
        for row in rows:
            point = Point(int(row["n_kv"]), _speed(row["speed_pp"]), _speed(row["speed_tg"]))
            by_mode.setdefault(str(row.get("split_mode") or ""), []).append(point)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as e:
        raise MlacliError(f"{path} is no result of sweep-bench", _HINT) from e
    if not by_mode:
        raise MlacliError(f"{path} has no rows", _HINT)
    if len(by_mode) == 1:
        return {path.stem: next(iter(by_mode.values()))}
    return {f"{path.stem} {mode}".strip(): points for mode, points in by_mode.items()}


def _rows(lines: list[str]) -> Iterable[Mapping[str, Any]]:
    if lines and lines[0].startswith("{"):
        objects = (json.loads(line) for line in lines)
        return (row for row in objects if "compare" not in row)
    if lines and lines[0].startswith("|"):
        return _table_rows(lines)
    return csv.DictReader(lines)


def _table_rows(lines: list[str]) -> Iterable[Mapping[str, Any]]:
    """The rows of the first table; what may follow it compares modes."""
    names = [_TABLE.get(name, name) for name in _cells(lines[0])]
    for line in lines[2:]:
        cells = _cells(line)
        if not line.startswith("|") or len(cells) != len(names) or cells[0] == "N_KV":
            return
        yield dict(zip(names, cells, strict=True))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _speed(value: Any) -> float | None:
    """None for a failed row: null, empty or nan."""
    number = float(value) if value not in (None, "") else math.nan
    return None if math.isnan(number) else number

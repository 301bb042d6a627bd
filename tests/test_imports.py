"""The import and file rules of the design, read from the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlacli"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
IDS = [str(p.relative_to(PACKAGE)) for p in FILES]
ARRAYS = {"numpy", "cupy", "gguf"}

# Layers from the top; a file imports from its own layer and those below. What is in none of them
# (errors, params, compat, loading, parallel, ...) all may import, and it sees no more than ops.
LAYERS = (
    ("cli", "__main__"),
    ("prepare", "engine", "sweep", "perplexity"),
    ("models",),
    ("ops", "composed_ops", "latent_cache", "backends"),
)
PURE_DATA = "mlacli.models.tensor_table"  # the words of the plan
NO_ARRAYS = (
    "parallel/plan",
    "parallel/shards.py",
    "models/",
    "params.py",
    "flag",
    "dialects/",
    "compat.py",
    "errors.py",
    "cli/",
)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        yield child
        yield from run_time_nodes(child)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports when it runs, inside functions too."""
    found: set[str] = set()
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def layer(part: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way(path):
    part = inside(path).partition("/")[0].removesuffix(".py")
    own = layer(part)
    if own is None:
        own = 1 if part == "__init__" else layer("ops")
    for name in imports(path):
        if name.startswith("mlacli.") and not name.startswith(PURE_DATA):
            other = layer(name.split(".")[1])
            assert other is None or other >= own, f"{part} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_data_files_import_no_array_library(path):
    if inside(path).startswith(NO_ARRAYS):
        assert not tops(path) & ARRAYS


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_libraries_stay_where_they_belong(path):
    name, used = inside(path), tops(path)
    if not name.startswith("cli/"):
        assert "click" not in used
    if name != "cli/console.py":
        assert "rich" not in used
    if not name.startswith("backends/cuda_"):
        assert "cupy" not in used


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_file_names_and_lengths(path):
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_print_below_cli_and_no_bare_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or inside(path).startswith("cli/"), "print below cli"


def test_the_data_modules_load_without_an_array_library():
    """The rules above see direct imports; this one sees what a fresh process really loads."""
    names = ["errors", "params", "flags", "flags_foreign", "dialects", "cli"]
    names += ["compat"] if (PACKAGE / "compat.py").exists() else []
    code = (
        f"import sys, {', '.join('mlacli.' + n for n in names)}\n"
        "print([m for m in ('numpy', 'gguf', 'cupy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

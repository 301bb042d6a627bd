"""The scripts of examples/ as modules, which find each other as in their own folder."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """examples/`name`.py, without its main()."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    module = importlib.import_module(name)
    assert Path(module.__file__ or "").parent == FOLDER, f"another module {name} is in the way"
    return module

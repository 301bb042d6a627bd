"""examples/FLAGS.md is what the tables say."""

import os
from pathlib import Path

from golden.flag_reference import reference

from mlacli import dialects
from mlacli.flags import COMMANDS

FILE = Path(__file__).parents[2] / "examples" / "FLAGS.md"


def test_the_reference_is_in_step_with_the_tables():
    if os.environ.get("UPDATE_GOLDEN"):
        FILE.write_text(reference())
    assert FILE.read_text() == reference(), "set UPDATE_GOLDEN=1 and run this test"


def test_every_flag_and_every_option_is_in_it():
    text = FILE.read_text()
    ours = {n for s in COMMANDS.values() for _, flags in s for flag in flags for n in flag.names}
    theirs = {n for name in dialects.NAMES for n in dialects.dialect(name).by_name}
    missing = sorted(n for n in ours | theirs if f"`{n}`" not in text)
    assert not missing, missing


def test_the_readme_links_to_it():
    assert "(examples/FLAGS.md)" in (FILE.parents[1] / "README.md").read_text()

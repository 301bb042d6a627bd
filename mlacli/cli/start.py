"""What every command that runs a model does first: prepare it and say on stderr what will run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.cli.words import CommandLine
from mlacli.flags import to_params

if TYPE_CHECKING:
    from mlacli.prepare import Prepared

_SLOW = 1.0  # predicted tokens a second under which a run is announced as slow


def prepared_model(line: CommandLine) -> Prepared:
    """The model of `-m` (else the bundled one), checked and planned; no weight is read."""
    from mlacli.parallel.plan_report import plan_as_dict, plan_rows, shard_rows
    from mlacli.prepare import prepare

    prepared = prepare(line["model"], to_params(line.values, line.typed))
    if line["model"] is None:
        console.log(f"no -m given: running the bundled model {prepared.path.name}")
    console.findings(f for f in prepared.findings if f.level != "note")  # notes: in the rows below
    console.event("plan", **plan_as_dict(prepared.plan))
    console.table(*plan_rows(prepared.plan), to_stderr=True, turn=True)
    if line["verbose"] or line["verbosity"] >= console.TRACE:
        console.table(*shard_rows(prepared.plan), to_stderr=True)
    console.effective(prepared.effective)
    if prepared.predicted_tps is not None and prepared.predicted_tps < _SLOW:
        console.warning(f"this will be slow: about {prepared.predicted_tps:.2g} tokens a second")
    return prepared

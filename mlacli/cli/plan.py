"""plan: prints the shard plan and memory per device from a file's header; needs no device."""

from __future__ import annotations

import json

from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.words import CommandLine
from mlacli.flags import to_params


def run(line: CommandLine) -> None:
    from mlacli.parallel.plan_report import plan_as_dict, plan_rows, shard_rows
    from mlacli.prepare import prepare

    params = to_params(line.values, line.typed)
    prepared = prepare(line["model"], params, refuse_oversize=False)
    console.findings(f for f in prepared.findings if f.level != "note")
    console.event("plan", **plan_as_dict(prepared.plan))
    if line["json"]:
        console.result(json.dumps(plan_as_dict(prepared.plan), indent=2))
        prepared.check_memory()
        return
    console.table(*plan_rows(prepared.plan), turn=True)
    if line["verbose"] or line["verbosity"] >= console.TRACE:
        console.result("")
        console.table(*shard_rows(prepared.plan))
    console.effective(prepared.effective)
    prepared.check_memory()


command = FlagCommand(
    "plan",
    run,
    "Prints which part of the model each device would hold and how many bytes that takes, from the "
    "file's header alone.",
)

"""Flags that are no business of the library: logs, answers, those of devices and check-flags."""

from __future__ import annotations

from mlacli.flag_entry import Flag
from mlacli.flag_values import choice, devices, integer, sizes, text

LOGS: tuple[Flag, ...] = (
    Flag(
        ("-lv", "--verbosity", "--log-verbosity"),
        integer(0),
        "what stderr gets: 0 nothing but the error that ends the run, 1 errors, 2 and warnings, "
        "3 and what runs, 4 the same as -v",
        "N",
        3,
    ),
    Flag(("--log-file",), text, "write what stderr gets to a file too, without colours", "FILE"),
    Flag(
        ("--log-jsonl",),
        text,
        "write warnings, configuration, plan and timings to a file, one JSON object a line",
        "FILE",
    ),
)

OTHER: tuple[Flag, ...] = (
    Flag(("-h", "--help", "--usage"), None, "this text"),
    Flag(("--version",), None, "version"),
    Flag(("--list-devices",), None, "print the devices of this machine"),
)

LOOK: tuple[Flag, ...] = (
    Flag(("-dev", "--device"), devices, "GPUs to look at; all by default", "LIST", ()),
    Flag(("--json",), None, "print one JSON object"),
    Flag(("--no-measure",), None, "list them without measuring"),
)

CHECK: tuple[Flag, ...] = (
    Flag(("--file",), text, "read the command line from a shell script, - for stdin", "SCRIPT"),
    Flag(("--json",), None, "print one JSON object"),
    Flag(("--arch",), text, "architecture to judge for, with no look at the model", "NAME"),
    Flag(("--vram",), sizes, "plan for devices that needn't exist, e.g. 80G,80G", "SIZES", ()),
    Flag(
        ("--dialect",),
        choice("llama_cpp", "ik_llama_cpp", llama="llama_cpp", ik="ik_llama_cpp"),
        "whose options those are that are not mlacli's: llama_cpp | ik_llama_cpp; by the program "
        "and the options themselves when not given",
        "NAME",
    ),
)

"""Renders one chat template in a process of its own: JSON on stdin, JSON on stdout.

Run as a script by `chat_template.py`, with limits on memory and time, because a template out of a
model file is a stranger's program. Imports nothing of mlacli. jinja2's sandbox keeps it from
attributes and calls that lead out; names, filters and options are those of transformers.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

MEMORY, SECONDS = 1 << 30, 2  # address space; processor time
LONGEST = 16 << 20  # characters of a rendered text


def render(template: str, variables: dict[str, Any]) -> str:
    """The text that the template makes of `variables`."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}`, by which training marks answers: its body, as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        """A namespace whose names can't reach into the interpreter."""

        def __init__(*args: Any, **given: Any) -> None:
            own, *rest = args
            values = dict(*rest, **given)
            if any(str(name).startswith("_") for name in values):
                raise SecurityError("names of a namespace can't begin with _")
            Namespace.__init__(own, values)

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError("names of a namespace can't begin with _")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def plain_dict(*args: Any, **given: Any) -> dict[Any, Any]:
        return dict(*args, **given)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    functions: tuple[Callable[..., Any], ...] = (raise_exception, strftime_now)
    environment.globals.update({f.__name__: f for f in functions})
    environment.globals.update(dict=plain_dict, namespace=PlainNamespace)
    pieces, n = [], 0
    for piece in environment.from_string(template).generate(**variables):
        pieces.append(piece)
        n += len(piece)
        if n > LONGEST:
            raise MemoryError
    return "".join(pieces)


def main() -> None:
    """Answers {"text": ...} or {"error": ...}, and dies of its limits otherwise."""
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"text": render(asked["template"], asked["variables"])}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply"}
    except Exception as e:
        line = getattr(e, "lineno", None)
        where = f"line {line}: " if line else ""
        answer = {"error": where + (str(e) or type(e).__name__)}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

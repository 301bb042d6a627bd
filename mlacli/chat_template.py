"""Chat messages to the text a model was trained on, by the jinja template of its file or another.

Rendering happens in a process of its own (`template_worker.py`) with bounds on time and memory, so
that a hostile template is an error. Knows no tokenizer but its special tokens' texts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlacli.errors import MlacliError, UsageError
from mlacli.flag_values import close

KEY = "tokenizer.chat_template"
_WALL_SECONDS = 20.0  # beside the processor time that the worker itself bounds: a busy machine
_LONGEST = 1 << 20  # characters of a template; the longest known have some 20,000
_ALIASES = {"chatglm4": "glm4", "mistral-v7-tekken": "mistral-v7"}  # llama.cpp's names
_WORKER = Path(__file__).with_name("template_worker.py")

Message = Mapping[str, str]


class TemplateError(MlacliError):
    """A chat template that can't be rendered."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's text and the variables that every rendering gets."""

    source: str
    origin: str  # for messages: "the file's", "built-in kimi-k2", a path
    variables: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def render(self, messages: Sequence[Message], *, answer_next: bool = True) -> str:
        """The conversation as text; with `answer_next` up to where the model goes on."""
        if len(self.source) > _LONGEST:
            raise self._error(f"it has {len(self.source)} characters, more than {_LONGEST}")
        variables = {
            "messages": [dict(m) for m in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": answer_next,
            **self.variables,
        }
        asked = json.dumps({"template": self.source, "variables": variables})
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(_WORKER)],
                input=asked, capture_output=True, text=True, timeout=_WALL_SECONDS, check=False,
                start_new_session=True,  # Ctrl-C is ours
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise self._error("it takes too long") from None
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            why = "it takes too long" if done.returncode in (-24, -9) else "its process died"
            raise self._error(why) from None
        if "error" in answer:
            raise self._error(answer["error"])
        text: str = answer["text"]
        return text

    def _error(self, why: str) -> TemplateError:
        return TemplateError(
            f"the chat template ({self.origin}) can't be rendered: {first_line(why)}",
            "give another with --chat-template",
        )


def first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), text)


def built_in_names() -> tuple[str, ...]:
    """What --chat-template takes besides a text."""
    found = (entry.name for entry in files("mlacli.templates").iterdir())
    return tuple(sorted(n.removesuffix(".jinja") for n in found if n.endswith(".jinja")))


def built_in(name: str) -> str:
    """The text of a built-in template."""
    return files("mlacli.templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")


def chosen_template(
    metadata: Mapping[str, Any], given: str | None, path: str | None, variables: Mapping[str, Any]
) -> ChatTemplate | None:
    """The template of --chat-template or --chat-template-file, else the file's; None: none."""
    if path is not None:
        try:
            return ChatTemplate(Path(path).read_text(encoding="utf-8"), path, variables)
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else "it is no UTF-8"
            raise MlacliError(f"can't read {path}: {why}", "check --chat-template-file") from e
    if given is not None:
        if any(mark in given for mark in ("{{", "{%", "{#")):
            return ChatTemplate(given, "--chat-template", variables)
        names, name = built_in_names(), _ALIASES.get(given, given)
        if name not in names:
            raise UsageError(
                f"--chat-template: no template is called {given!r}",
                close(given, names) or "built in are " + ", ".join(names),
            )
        return ChatTemplate(built_in(name), f"built-in {name}", variables)
    source = metadata.get(KEY)
    return ChatTemplate(source, "the file's", variables) if isinstance(source, str) else None

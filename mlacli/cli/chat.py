"""A conversation by a chat template: turns in, answers out, thoughts apart.

Every turn renders the whole conversation; what the cache already holds of it is not computed again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlacli.chat_template import ChatTemplate, Message, chosen_template
from mlacli.cli import console
from mlacli.cli.answer import Answer, Answerer, CtrlC
from mlacli.cli.line_input import LineInput
from mlacli.cli.prompts import read_text_file, unescaped
from mlacli.cli.words import CommandLine
from mlacli.errors import UsageError
from mlacli.reasoning import ThoughtSplitter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlacli.loading.tokenizer import Tokenizer

_HELP = """\
/clear  forget the conversation     /regen  answer the last turn again
/exit   end, as Ctrl-D does         Ctrl-C  stops an answer; at the prompt, the program"""


def template_of(
    line: CommandLine, metadata: Mapping[str, Any], tokenizer: Tokenizer
) -> ChatTemplate | None:
    """The template that a chat of this line uses, with the variables it gets; None: none."""
    variables: dict[str, Any] = {
        name: "" if token is None else tokenizer.piece(token).decode("utf-8", "replace")
        for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    }
    if line["reasoning"] != "auto":
        thinks = line["reasoning"] == "on"
        variables |= {"enable_thinking": thinks, "thinking": thinks}
    variables |= dict(line["chat_template_kwargs"])
    given, path = line["chat_template"], line["chat_template_file"]
    return chosen_template(metadata, given, path, variables)


class Chat:
    """The messages so far, and how they become tokens."""

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, system: str | None, n_ctx: int
    ) -> None:
        self.template, self.tokenizer, self.n_ctx = template, tokenizer, n_ctx
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        template.render([*self.messages, {"role": "user", "content": "Hello"}])  # fails early

    def ids(self) -> tuple[list[int], str]:
        """Token ids of the conversation up to where the model answers, and the text."""
        text = self.template.render(self.messages)
        ids = self.tokenizer.encode(text, add_special=False, parse_special=True)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids, text

    def clear(self) -> None:
        self.messages = list(self.opening)

    def forget_answer(self) -> bool:
        """Back to before the last answer; False when there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages) and self.messages[-1]["role"] == "user"


def system_prompt(line: CommandLine) -> str | None:
    """The text of -sys or -spf."""
    if line["system_prompt_file"] is not None:
        return read_text_file(line["system_prompt_file"], line.typed["system_prompt_file"])
    given = line["system_prompt"]
    return None if given is None else unescaped(line, given, "the system prompt")


def talk(line: CommandLine, chat: Chat, answerer: Answerer, first: str | None) -> None:
    """Turns until the input ends; `first` is the first of them where the line gave it."""
    keyboard = LineInput("> ", multiline=line["multiline_input"], simple=line["simple_io"])
    if keyboard.is_terminal:
        console.gap()
        console.log("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends the chat")
    turn = first
    if turn is not None and keyboard.is_terminal:
        console.result(f"> {turn}")
    while turn is not None or (turn := keyboard.read()) is not None:
        if _is_turn(turn, chat):
            if turn.strip() == "/regen":  # the same numbers would draw the same answer
                answerer.sampler.seed = (answerer.sampler.seed + 1) & 0xFFFFFFFF
            _answer(line, chat, answerer, keyboard.is_terminal)
            if line["single_turn"]:
                return
        elif turn.strip() in ("/exit", "/quit"):
            return
        turn = None


def _is_turn(text: str, chat: Chat) -> bool:
    """Whether the model is to answer now; commands are done here, the turn is added."""
    word = text.strip()
    if word == "/clear":
        chat.clear()
        console.log("the conversation begins anew")
    elif word == "/regen":
        if chat.forget_answer():
            return True
        console.log("there is no turn to answer again")
    elif word == "/help":
        console.log(_HELP)
    elif re.fullmatch(r"/[a-z]+", word) and word not in ("/exit", "/quit"):
        console.log(f"no command {word}; /help lists them")
    elif word and word not in ("/exit", "/quit"):
        chat.messages.append({"role": "user", "content": text})
        return True
    return False


def _answer(line: CommandLine, chat: Chat, answerer: Answerer, spaced: bool) -> None:
    ids, text = chat.ids()
    if len(ids) > chat.n_ctx:
        chat.messages.pop()
        console.warning(
            f"the conversation has {len(ids)} tokens, the context {chat.n_ctx}: the turn is left "
            "out",
            "/clear, or start with a larger -c",
        )
        return
    form = line["reasoning_format"]
    splitter = None if form == "none" else ThoughtSplitter(text)
    with CtrlC() as ctrl_c, console.TokenStream(thoughts=thought_style(form, line)) as out:
        answer = answerer.run(ids, out, splitter=splitter, reuse=True, ctrl_c=ctrl_c)
    chat.messages.append(_message(answer))
    if spaced:
        console.result("")
    if answer.ended == "full":
        console.note(f"stopped: the context of {chat.n_ctx} tokens is full", "/clear")


def _message(answer: Answer) -> Message:
    message = {"role": "assistant", "content": answer.text}
    return message | ({"reasoning_content": answer.thought} if answer.thought else {})


def thought_style(form: str, line: CommandLine) -> console.Thoughts:
    """Where thoughts go: auto dims them on a terminal that has styles, else splits them off."""
    if form in ("hidden", "none"):
        return "hidden"
    styled = console.has_styles(sys.stdout) and not line["simple_io"]
    return "dimmed" if form == "auto" and styled else "stderr"


def refuse_outside(line: CommandLine, keys: Sequence[str], where: str) -> None:
    """UsageError for flags that do nothing where this run goes."""
    for key in keys:
        if key in line.typed:
            raise UsageError(f"{line.typed[key]} does nothing in {where}", "leave it out")

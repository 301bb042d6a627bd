"""run-model: a prompt in, its continuation out; or a chat.

stdout gets the text alone (ids for a file without tokenizer), stderr everything else.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.cli.answer import Answerer, CtrlC, Decoder, IdDecoder
from mlacli.cli.chat import Chat, refuse_outside, system_prompt, talk, template_of
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.line_input import LineInput
from mlacli.cli.prompts import (
    Prompt,
    check_prompt,
    last_of,
    prompt_ids,
    read_prompt,
    settled_texts,
    takes_turns,
    unescaped,
)
from mlacli.cli.start import open_engines, prepared_model
from mlacli.cli.words import CommandLine
from mlacli.errors import UsageError

if TYPE_CHECKING:
    from mlacli.chat_template import ChatTemplate
    from mlacli.engine import Engine
    from mlacli.loading.tokenizer import Tokenizer
    from mlacli.prepare import Prepared

_OF_CHAT = (
    "system_prompt", "system_prompt_file", "single_turn", "chat_template", "chat_template_file",
    "chat_template_kwargs", "reasoning", "reasoning_format",
)  # fmt: skip
_OF_TURNS = ("multiline_input", "simple_io")
_OF_INTERACTIVE = ("in_prefix", "in_suffix")


def run(line: CommandLine) -> None:
    prompt = read_prompt(line)  # before the heavy imports: a wrong line should fail at once
    interactive = takes_turns(line)
    if prompt is None and interactive and not line["conversation"]:
        prompt = ""
    _check_flags(line, prompt, interactive)
    texts = settled_texts(line)
    if prompt is None:
        _refuse_without_template(line)
    from mlacli.sampling import Sampler

    prepared = prepared_model(line, **texts)
    tokenizer = prepared.tokenizer()
    sampler = Sampler.for_tokenizer(prepared.params.sampling, tokenizer)
    chat, ids = None, [0]
    if prompt is None or line["conversation"]:
        chat = _chat(line, prepared, tokenizer)
    else:
        ids = _completion_ids(line, prompt, prepared, tokenizer)
        check_prompt(ids, prepared.hparams.n_vocab, prepared.plan.n_ctx)
    for message in tokenizer.warnings if tokenizer else ():
        console.warning(message)
    if prepared.params.sampling.temp > 0:
        console.log(f"seed: {sampler.seed}")
    if any(rank.kind == "cuda" for rank in prepared.plan.ranks) and sampler.on_host:
        console.note(f"tokens are chosen on the host, by {', '.join(sampler.on_host)}")
    with ExitStack() as stack:
        (engine,) = open_engines(stack, [prepared], warm=not line["no_warmup"])
        if (problem := engine.page_lock.problem) is not None:
            hint = "raise the limit, ulimit -l, or leave --mlock out"
            console.warning(f"not all weights could be locked in memory: {problem}", hint)
        stops = [unescaped(line, text, "-r") for text in line["reverse_prompt"]]
        answerer = Answerer(engine, tokenizer, sampler, line["predict"], stops)
        try:
            if chat is not None:
                _keep_prompt(line, engine, answerer, None)
                talk(line, chat, answerer, prompt if isinstance(prompt, str) else None)
            else:
                assert prompt is not None
                console.gap()
                complete(line, answerer, prompt, ids)
            if line["prompt_cache_all"] and not line["prompt_cache_ro"]:
                engine.save_session(line["prompt_cache"])
        except KeyboardInterrupt:
            if answerer.total is not None:
                report(line, answerer)
            raise
        report(line, answerer)


def _check_flags(line: CommandLine, prompt: Prompt | None, interactive: bool) -> None:
    """Refuses flags that would do nothing, and modes that exclude each other."""
    chatting = prompt is None or line["conversation"]
    if chatting and line["no_conversation"]:
        raise UsageError("no prompt", "give one with -p TEXT, -f FILE, a pipe or --prompt-ids")
    if chatting and interactive:
        raise UsageError("-i takes turns in a completion, -cnv in a chat", "give one of them")
    if not chatting:
        hint = "a prompt without -cnv is continued as it is: add -cnv, or leave it out"
        for key in _OF_CHAT:
            if key in line.typed:
                raise UsageError(f"{line.typed[key]} belongs to a chat", hint)
    if not interactive:
        refuse_outside(line, _OF_INTERACTIVE, "a run without -i")
    if not interactive and not chatting:
        refuse_outside(line, _OF_TURNS, "a run without turns")
    if line["prompt_cache"] is None:
        for key in ("prompt_cache_all", "prompt_cache_ro"):
            if line[key]:
                raise UsageError(f"{line.typed[key]} without --prompt-cache", "name the file")
    if isinstance(prompt, tuple) and interactive:
        raise UsageError("-i needs a prompt of text", "give it with -p")


def _refuse_without_template(line: CommandLine) -> None:
    """UsageError before anything is planned, where there is neither prompt nor template."""
    from mlacli.chat_template import KEY
    from mlacli.loading.gguf_file import GgufFile
    from mlacli.prepare import bundled_model

    if line["chat_template"] is not None or line["chat_template_file"] is not None:
        return
    file = GgufFile.open(line["model"] or bundled_model(), dict(line["override_kv"] or ()))
    try:
        if KEY not in file.metadata:
            which = "the file" if line["model"] else "the bundled model"
            hint = "give a prompt with -p TEXT, -f FILE or a pipe, or a --chat-template"
            what = "no chat template" if line["conversation"] else "no prompt"
            raise UsageError(f"{what}, and {which} has no chat template", hint)
    finally:
        file.close()


def _chat(line: CommandLine, prepared: Prepared, tokenizer: Tokenizer | None) -> Chat:
    if tokenizer is None:
        raise UsageError("the file has no tokenizer", "a chat needs one: use --prompt-ids")
    template: ChatTemplate | None = template_of(line, prepared.gguf.metadata, tokenizer)
    if template is None:
        raise UsageError("the file has no chat template", "name one with --chat-template")
    return Chat(template, tokenizer, system_prompt(line), prepared.plan.n_ctx)


def _completion_ids(
    line: CommandLine, prompt: Prompt, prepared: Prepared, tokenizer: Tokenizer | None
) -> list[int]:
    """The prompt's ids; an empty prompt with a prompt cache goes on where that one ends."""
    path = line["prompt_cache"]
    if prompt == "" and path is not None and _has_content(path):
        from mlacli import session_file

        if ids := session_file.tokens(path, prepared):
            return ids
    if prompt == "" and line["interactive_first"] and tokenizer and not tokenizer.add_bos:
        return []  # what is typed first is the prompt
    return prompt_ids(prompt, tokenizer)


def _keep_prompt(
    line: CommandLine, engine: Engine, answerer: Answerer, ids: list[int] | None
) -> int:
    """Takes what the prompt cache has of `ids` (None: all), and has them saved; how many it had."""
    path, taken = line["prompt_cache"], 0
    if path is None:
        return 0
    if _has_content(path):
        from mlacli import session_file

        wanted = session_file.tokens(path, engine.prepared) if ids is None else ids
        taken = engine.load_session(path, wanted)
        console.log(f"prompt cache: {taken} of {len(wanted)} tokens taken from {path}")
    if not line["prompt_cache_ro"] and (ids is None or taken < len(ids)):
        answerer.after_prompt = lambda: engine.save_session(path)
    return taken


def _has_content(path: str) -> bool:
    return Path(path).exists() and Path(path).stat().st_size > 0


def complete(line: CommandLine, answerer: Answerer, prompt: Prompt, ids: list[int]) -> None:
    """The prompt and its continuation to stdout; with -i turn by turn."""
    tokenizer = answerer.tokenizer
    taken = _keep_prompt(line, answerer.engine, answerer, ids)
    interactive = takes_turns(line)
    shown = ids if last_of(line, "display_prompt", "no_display_prompt") else []
    with console.TokenStream() as out:
        decoder: Decoder = tokenizer.stream() if tokenizer else IdDecoder()
        if shown and isinstance(prompt, str) and prompt:
            out.write(prompt)
        else:
            out.write("".join(decoder.push(i) for i in shown))
        if not interactive:
            answerer.run(ids, out, decoder=decoder, reuse=taken > 0)
            return
        take_turns(line, answerer, ids, out)


def take_turns(
    line: CommandLine, answerer: Answerer, ids: list[int], out: console.TokenStream
) -> None:
    """-i: after an answer, or where -r is met, what is typed is appended and continued."""
    tokenizer = answerer.tokenizer
    if tokenizer is None:
        raise UsageError("the file has no tokenizer", "-i needs one")
    keyboard = LineInput("", multiline=line["multiline_input"], simple=line["simple_io"])
    before, after = (unescaped(line, line[k], k) for k in _OF_INTERACTIVE)
    listen = line["interactive_first"]
    while True:
        if not listen:
            with CtrlC() as ctrl_c:
                answer = answerer.run(ids, out, reuse=True, ctrl_c=ctrl_c)
            ids = ids + answer.ids
            if answer.ended == "full":
                return
            if answer.ended == "end" and answerer.stop_texts:
                out.write(answerer.stop_texts[0])
                ids += tokenizer.encode(answerer.stop_texts[0], add_special=False)
        listen = False
        out.write(before)
        text = keyboard.read()
        if keyboard.is_terminal:
            out.forget()  # typing ended the line
        if text is None:
            return
        out.write(after)
        ids = ids + tokenizer.encode(f"{before}{text}\n{after}", add_special=False)
        n_ctx = answerer.engine.n_ctx
        if len(ids) > n_ctx:
            console.note(f"stopped: the context of {n_ctx} tokens is full")
            return


def report(line: CommandLine, answerer: Answerer) -> None:
    """What is said after the text."""
    engine = answerer.engine
    console.gap()
    if line["verbose"]:
        console.attention(engine.attention_forms)
    if engine.context_full:
        console.note(f"stopped: the context of {engine.n_ctx} tokens is full")
    if line["no_perf"]:
        return
    from mlacli.devices import find_devices
    from mlacli.parallel.plan_report import beside_lines, memory_rows
    from mlacli.params import SplitParams

    plan = engine.prepared.plan
    gpus = tuple({rank.device: None for rank in plan.ranks if rank.kind == "cuda"})
    console.timings(answerer.total or engine.timings, engine.peak_memory())
    console.table(*memory_rows(plan, find_devices(SplitParams(devices=gpus))), to_stderr=True)
    for text in beside_lines(engine.memory_beside()):
        console.log(text)


command = FlagCommand(
    "run-model",
    run,
    "Continues a prompt, or chats where none is given and the file has a chat template. The text "
    "goes to stdout; the plan, warnings, the effective configuration and timings go to stderr.",
)

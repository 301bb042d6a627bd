"""Chats and turns: by the bundled model through pipes and a terminal, and flags that decide."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

CHAT = ["--chat-template", "chatml", "--temp", "0"]
BASE = [sys.executable, "-m", "mlacli", "run-model"]


def piped(text, *words, **environ):
    """(exit code, stdout, stderr) of run-model with `text` on its stdin."""
    done = subprocess.run(
        [*BASE, *words], input=text, capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | environ,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


class Terminal:
    """run-model on a pseudo-terminal: what it shows, and keys for it."""

    def __init__(self, *words, **environ):
        pid, self.fd = pty.fork()
        if pid == 0:  # pragma: no cover
            os.environ.update({"TERM": "xterm", "MLACLI_HISTORY": "", **environ})
            os.environ.pop("NO_COLOR", None)
            os.execv(sys.executable, [*BASE, *words])
        self.pid, self.seen, self.code = pid, "", None
        self.until("Ctrl-D ends the chat")

    def until(self, text, seconds=40):
        """All that came since the last call, up to `text`."""
        end = time.monotonic() + seconds
        found = ""
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:
                    assert text in self.seen, f"it ended without {text!r}: {self.seen!r}"
        at = self.seen.index(text) + len(text)
        found, self.seen = self.seen[:at], self.seen[at:]
        return found

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def end(self):
        """The exit code, everything shown until then in `seen`."""
        stop = time.monotonic() + 30
        while time.monotonic() < stop:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    break
                self.seen += data.decode("utf-8", "replace")
        else:
            os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return self.code


def test_a_pipe_with_cnv_is_one_turn_a_line():
    code, out, err = piped("Tell me a story.\n\nAnother one!\n", "-cnv", *CHAT, "-n", "8")
    assert code == 0 and "total time" in err
    assert len(out.splitlines()) == 2, "two turns, two answers, and nothing else"
    again = piped("Tell me a story.\n", "-cnv", *CHAT, "-n", "8")[1]
    assert out.splitlines()[0] == again.strip("\n")


def test_the_conversation_is_what_the_template_makes_of_all_turns():
    """The second answer is that of a completion of the rendered text."""
    _, out, _ = piped("One\nTwo\n", "-cnv", *CHAT, "-n", "6", "-sys", r"Be\nbrief")
    first, second = out.splitlines()
    text = (
        "<|im_start|>system\nBe\nbrief<|im_end|>\n<|im_start|>user\nOne<|im_end|>\n"
        f"<|im_start|>assistant\n{first}<|im_end|>\n<|im_start|>user\nTwo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = ["-p", text, "--no-escape", "--no-display-prompt", "--temp", "0", "-n", "6"]
    assert piped("", *plain)[1].rstrip("\n") == second


def test_a_first_turn_by_p_and_a_single_turn():
    _, out, _ = piped("ignored\n", "-cnv", "-p", "One", "-st", *CHAT, "-n", "6")
    assert out == piped("One\n", "-cnv", *CHAT, "-n", "6")[1]


def test_a_piped_text_is_a_prompt_without_cnv():
    code, out, _ = piped("One day, Lily\n", "-n", "4", "--temp", "0")
    assert code == 0 and out.startswith("One day, Lily") and out.count("\n") == 1
    assert out == piped("", "-p", "One day, Lily", "-n", "4", "--temp", "0")[1]


def test_commands_of_a_chat():
    say = "One\n/regen\n/clear\nOne\n/nonsense\n/regen\n/exit\nnever\n"
    code, out, err = piped(say, "-cnv", *CHAT, "-n", "5")
    assert code == 0
    assert len(set(out.splitlines())) == 1 and len(out.splitlines()) == 4
    assert "begins anew" in err and "no command /nonsense" in err
    assert "no turn to answer" in piped("/regen\n", "-cnv", *CHAT)[2]


def test_another_answer_is_another_draw():
    words = ["-cnv", "--chat-template", "chatml", "-s", "3", "-n", "12"]
    first, second = piped("One\n/regen\n", *words)[1].splitlines()
    assert first != second
    assert second == piped("One\n", *words, "-s", "4")[1].strip("\n"), "the next seed's"


def test_a_turn_of_many_lines():
    joined = piped("One\\\ntwo\n", "-cnv", *CHAT, "-n", "5")[1]
    assert joined == piped("One\ntwo\\\n", "-cnv", "-mli", *CHAT, "-n", "5")[1]
    assert len(joined.splitlines()) == 1
    assert len(piped("One\ntwo\n", "-cnv", *CHAT, "-n", "5")[1].splitlines()) == 2


def test_a_conversation_that_is_too_long_says_so_and_goes_on():
    long = "Once upon a time there was a fox. " * 40
    code, out, err = piped(f"One\n{long}\nOne\n", "-cnv", *CHAT, "-n", "5", "-c", "256")
    assert code == 0 and "the turn is left out" in err
    assert len(out.splitlines()) == 2


def test_a_reverse_prompt_ends_an_answer():
    whole = piped("", "-p", "Once upon", "-n", "30", "--temp", "0")[1]
    stop = whole.split()[9]
    _, out, _ = piped("", "-p", "Once upon", "-n", "30", "--temp", "0", "-r", stop)
    assert whole.startswith(out.rstrip("\n")) and stop in out
    assert len(out) < len(whole) and out.index(stop) + len(stop) + 8 > len(out)


def test_turns_in_a_completion():
    words = ["-i", "-n", "4", "--temp", "0", "--in-prefix", " [", "--in-suffix", "]"]
    code, out, _ = piped("more\n", "-p", "Once", *words)
    assert code == 0 and out.startswith("Once") and " [" in out and "]" in out
    assert len(out) > len(piped("", "-p", "Once", *words)[1])
    first = piped("Once\n", "-if", "-n", "4", "--temp", "0")[1]
    assert first == piped("", "-p", "Once\n", "-n", "4", "--temp", "0", "--no-display-prompt")[1]


def test_thoughts_go_where_reasoning_format_says():
    """The template opens a thought; the bundled model never closes it, so all of it is one."""
    opened = "{{ bos_token }}{{ messages[-1].content }}<think>"
    words = ["-cnv", "--chat-template", opened, "--temp", "0", "-n", "6"]
    raw = piped("One\n", *words, "--reasoning-format", "none")
    assert len(raw[1]) > 5
    split = piped("One\n", *words)
    assert split[1].strip() == "" and raw[1].strip() in split[2]
    hidden = piped("One\n", *words, "--reasoning-format", "hidden")
    assert hidden[1].strip() == "" and raw[1].strip() not in hidden[2]


def test_reasoning_words_become_variables():
    shows = "{{ raise_exception(enable_thinking ~ ' ' ~ thinking ~ ' ' ~ depth) }}"
    words = ["-cnv", "--chat-template", shows, "--chat-template-kwargs", '{"depth": 3}']
    assert "False False 3" in piped("", *words, "-rea", "off")[2]
    assert "True True 3" in piped("", *words, "-rea", "on")[2]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["-cnv"], 2, "no chat template, and the bundled model has no chat template"),
        (["-no-cnv"], 2, "no prompt"),
        ([], 2, "no prompt, and the bundled model has no chat template"),
        (["-cnv", "-no-cnv"], 2, "exclude each other"),
        (["-cnv", "-i", *CHAT], 2, "-i takes turns in a completion, -cnv in a chat"),
        (["-p", "x", "-sys", "y"], 2, "-sys belongs to a chat (a prompt without -cnv"),
        (["-p", "x", "--in-prefix", "y"], 2, "--in-prefix does nothing in a run without -i"),
        (["-p", "x", "-mli"], 2, "-mli does nothing in a run without turns"),
        (["-p", "x", "--prompt-cache-ro"], 2, "--prompt-cache-ro without --prompt-cache"),
        (["--prompt-ids", "1", "-i"], 2, "-i needs a prompt of text"),
        (["-cnv", "--chat-template", "chatlm"], 2, "did you mean chatml?"),
        (["-cnv", "--chat-template", "{% for %}"], 1, "line 1"),
        (["-cnv", "--chat-template-file", "/nowhere"], 1, "can't read /nowhere"),
        (["-cnv", *CHAT, "-spf", "/nowhere"], 1, "can't read the file /nowhere"),
        (["-p", "x", "--grammar-file", "/nowhere"], 1, "can't read the file /nowhere"),
        (["-p", "x", "--grammar", "root ::= nowhere"], 2, "the grammar can't be read"),
    ],
)
def test_what_can_not_be_is_refused_before_a_weight_is_read(words, code, text):
    done = subprocess.run(
        [*BASE, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert text in done.stderr.splitlines()[-1] and "load time" not in done.stderr


def test_a_model_with_a_template_chats_without_being_asked(mlacli, fake_model, monkeypatch):
    """The fake engine answers " world" to any prompt; the terminal is a pipe of turns."""
    from mlacli.cli import chat, prompts, run_model

    fake_model.metadata = {"tokenizer.chat_template": "{{ messages[-1].content }}"}
    monkeypatch.setattr(prompts, "stdin_is_given", lambda: False)
    monkeypatch.setattr(run_model, "_refuse_without_template", lambda line: None)
    turns = iter(["Hi", "and bye", None])
    monkeypatch.setattr(chat.LineInput, "read", lambda self: next(turns))
    done = mlacli("run-model")
    assert (done.code, done.out) == (0, " world\n world\n")
    generated = [c for c in fake_model.calls if c[0] == "generate"]
    assert [bytes(c[1][1:]) for c in generated] == [b"Hi", b"and bye"]
    assert generated[0][1][0] == 0, "BOS, which the template doesn't write, is added"


def test_a_terminal_chat_with_line_editing(tmp_path):
    typed = tmp_path / "history"
    screen = Terminal("-cnv", *CHAT, "-n", "12", MLACLI_HISTORY=str(typed))
    screen.until("> ")
    screen.type("Hello\n")
    answer = screen.until("\r\n> ")
    assert re.search(r"Hello\r\n\S.*\S\r\n\r\n> $", answer, re.DOTALL)
    screen.type("\x1b[A\x1b[D\x7fp\n")  # up, left, rubout: "Helpo"
    screen.until("\r\n\r\n> ")
    assert typed.read_text().splitlines()[-2:] == ["Hello", "Helpo"]
    screen.type("\x04")
    assert screen.end() == 0 and "eval time" in screen.seen


def test_ctrl_c_stops_an_answer_and_then_the_program():
    screen = Terminal("-cnv", *CHAT, "--ignore-eos", "-c", "1024")
    screen.until("> ")
    screen.type("Hello\n")
    screen.until("Hello\r\n")
    time.sleep(1.0)
    os.kill(screen.pid, signal.SIGINT)
    stopped = screen.until("\r\n\r\n> ")
    assert 3 < len(stopped.split()) < 600, "it was in the middle of the answer"
    screen.type("And?\n")
    screen.until("And?\r\n")
    time.sleep(0.3)
    os.kill(screen.pid, signal.SIGINT)
    screen.until("\r\n\r\n> ")
    time.sleep(0.5)  # a signal between readline's prompt and its wait is seen with the next key
    os.kill(screen.pid, signal.SIGINT)
    assert screen.end() == 130
    assert "eval time" in screen.seen and "Error" not in screen.seen
    assert "Traceback" not in screen.seen


def test_history_is_kept_for_the_next_chat(tmp_path):
    path = tmp_path / "state" / "history"
    for keys, shown in (("Hello there\n", "Hello there"), ("\x1b[A\n", "Hello there")):
        screen = Terminal("-cnv", *CHAT, "-n", "2", MLACLI_HISTORY=str(path))
        screen.until("> ")
        screen.type(keys)
        assert shown in screen.until("\r\n\r\n> ")
        screen.type("\x04")
        assert screen.end() == 0
    assert "Hello there" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0, "what one typed is one's own"


def test_thoughts_are_dimmed_on_a_terminal():
    opened = "{{ bos_token }}{{ messages[-1].content }}<think>"
    words = ["-cnv", "--chat-template", opened, "--temp", "0", "-n", "6"]
    screen = Terminal(*words)
    screen.until("> ")
    screen.type("Hello\n")
    shown = screen.until("> ")
    assert "\x1b[2m" in shown and "\x1b[22m" in shown
    screen.type("/exit\n")
    assert screen.end() == 0


def test_a_file_with_a_template_chats_on_a_terminal():
    own = "tokenizer.chat_template=str:{% for m in messages %}{{ m.content }} {% endfor %}"
    screen = Terminal("--override-kv", own, "--temp", "0", "-n", "6")
    screen.until("> ")
    screen.type("Once upon a time\n")
    assert len(screen.until("\r\n\r\n> ")) > 20
    screen.type("\x04")
    assert screen.end() == 0


def test_a_hostile_template_in_a_file_is_an_error_before_weights_load():
    for text, why in (
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "takes too long"),
    ):  # fmt: skip
        began = time.monotonic()
        done = subprocess.run(
            [*BASE, "-cnv", "--override-kv", f"tokenizer.chat_template=str:{text}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == "" and time.monotonic() - began < 60
        assert why in done.stderr.splitlines()[-1] and "the file's" in done.stderr
        assert "seed" not in done.stderr


def test_a_prompt_cache_serves_the_next_chat(tmp_path):
    words = ["-cnv", *CHAT, "-n", "4", "--prompt-cache", str(tmp_path / "cache.gguf")]
    words += ["-sys", "You tell stories about animals that live in the old forest. " * 3]
    first = piped("One\n", *words)
    again = piped("One\n", *words)
    assert again[1] == first[1]
    tokens = [
        int(re.search(r"prompt eval time.*/ +(\d+) tokens", e)[1]) for _, _, e in (first, again)
    ]
    assert tokens[1] == 1 < tokens[0]
    other = piped("Two\n", *words)[2]
    assert 1 < int(re.search(r"prompt eval time.*/ +(\d+) tokens", other)[1]) < tokens[0]


def test_ctrl_c_ends_a_long_prompt_between_two_ubatches():
    import io

    import mlacli
    from mlacli.cli.answer import Answerer, CtrlC
    from mlacli.cli.console import TokenStream
    from mlacli.sampling import Sampler

    with mlacli.load(temp=0, ubatch_size=32) as engine:
        answerer = Answerer(engine, engine.tokenizer, Sampler(engine.params.sampling), 4)
        ids = list(range(100, 400))
        with CtrlC() as ctrl_c, TokenStream(io.StringIO()) as out:
            ctrl_c.hit = True
            answer = answerer.run(ids, out, ctrl_c=ctrl_c)
        assert (answer.ended, answer.ids, engine.n_kv) == ("ctrl-c", [], 32)
        answer = answerer.run(ids, TokenStream(io.StringIO()), reuse=True)
        assert len(answer.ids) == 4 and engine.timings.n_prompt == 300 - 32
        assert answer.ids == list(engine.generate_ids(ids, 4))[: len(answer.ids)]


def test_tags_of_thoughts_count_where_they_are_control_tokens(fake_model):
    import io
    from types import SimpleNamespace

    from mlacli.cli.answer import Answerer
    from mlacli.cli.console import TokenStream
    from mlacli.reasoning import ThoughtSplitter

    tokenizer = fake_model.tokenizer
    tokenizer.piece = lambda i: {2: b"<think>", 3: b"</think>"}.get(i, bytes([i]))
    tokenizer.is_hidden = lambda i: i < 4
    tokenizer.stream = lambda: SimpleNamespace(push=lambda i: chr(i) if i > 3 else "", flush=str)
    fake_model.answer = [2, *b"hm", 3, *b"yes", 1]
    engine = fake_model.engine_class(fake_model, fake_model.prepare(None, fake_params()))
    sampler = SimpleNamespace(params=SimpleNamespace(ignore_eos=False))
    out = io.StringIO()
    answer = Answerer(engine, tokenizer, sampler, -1).run(
        [5], TokenStream(out), splitter=ThoughtSplitter()
    )
    assert (answer.thought, answer.text, out.getvalue()) == ("hm", "yes", "yes")


def fake_params():
    from mlacli.params import Params

    return Params()

"""One answer after another from an engine to stdout: streaming, stop texts, Ctrl-C, totals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

from mlacli.cli import console
from mlacli.reasoning import TAGS, ThoughtSplitter
from mlacli.timings import Timings

if TYPE_CHECKING:
    from mlacli.engine import Engine
    from mlacli.loading.tokenizer import Tokenizer
    from mlacli.sampling import Sampler

Ending = Literal["end", "stop text", "length", "full", "ctrl-c"]
_TAG_TEXTS = {tag.encode(): tag for tags in TAGS for tag in tags}


class Decoder(Protocol):
    """Ids to text, piece by piece."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class IdDecoder:
    """Ids as decimal numbers with spaces between: the output of a file without tokenizer."""

    def __init__(self) -> None:
        self._space = ""

    def push(self, token_id: int) -> str:
        piece, self._space = f"{self._space}{token_id}", " "
        return piece

    def flush(self) -> str:
        return ""


class Stopped(Exception):
    """Ctrl-C, seen between two ubatches of a prompt."""


class CtrlC:
    """While it is on, the first Ctrl-C only sets `hit`; the next one raises KeyboardInterrupt.

    An exception in the middle of a step would leave ranks waiting for each other.
    """

    def __init__(self) -> None:
        self.hit = False

    def __enter__(self) -> Self:
        self.hit = False
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True


@dataclass(slots=True)
class Answer:
    """What was generated: ids without the token that ended it, and the text in two parts."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    thought: str = ""
    ended: Ending = "length"


class Answerer:
    """Runs an engine's generations one by one; `total` counts them all."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        sampler: Sampler,
        n_predict: int,
        stop_texts: Sequence[str] = (),
    ) -> None:
        self.engine, self.tokenizer, self.sampler = engine, tokenizer, sampler
        self.n_predict, self.stop_texts = n_predict, [t for t in stop_texts if t]
        self.total: Timings | None = None  # None: no token was made yet
        self.after_prompt: Callable[[], None] | None = None  # called once, the prompt in the cache
        self._tail = ""

    def run(
        self, ids: Sequence[int], out: console.TokenStream, *, decoder: Decoder | None = None,
        splitter: ThoughtSplitter | None = None, reuse: bool = False, ctrl_c: CtrlC | None = None,
    ) -> Answer:  # fmt: skip
        """Streams the answer to `ids` to `out`; with `ctrl_c` that ends it early."""
        answer, self._tail = Answer(), ""
        decoder = decoder or (self.tokenizer.stream() if self.tokenizer else IdDecoder())
        eog_ids = self.tokenizer.eog_ids if self.tokenizer else frozenset()
        made = False
        with console.StatusLine() as status:
            self.engine.on_ubatch = lambda done, n: _on_ubatch(status, ctrl_c, done, n)
            more = {"reuse": True} if reuse else {}
            generated = self.engine.generate_ids(ids, self.n_predict, self.sampler, **more)
            try:
                for token_id in generated:
                    status.clear()
                    if not made:
                        self._prompt_is_done()
                    made = True
                    if token_id in eog_ids and not self.sampler.params.ignore_eos:
                        answer.ended = "end"
                        continue
                    answer.ids.append(token_id)
                    if token_id not in eog_ids:
                        self._show(self._piece(token_id, decoder, splitter), answer, out, splitter)
                    if any(text in self._tail for text in self.stop_texts):
                        answer.ended = "stop text"
                        break
                    if ctrl_c is not None and ctrl_c.hit:
                        answer.ended = "ctrl-c"
                        break
                if not made:
                    self._prompt_is_done()
            except Stopped:
                answer.ended = "ctrl-c"
            finally:
                self.engine.on_ubatch = None
                if isinstance(generated, Generator):
                    generated.close()  # takes back what was drawn ahead
                if made or answer.ended == "ctrl-c":
                    now = self.engine.timings
                    self.total = now if self.total is None else self.total + now
        self._show(decoder.flush(), answer, out, splitter)
        if splitter is not None:
            for kind, piece in splitter.flush():
                _put(kind, piece, answer, out)
        if self.engine.context_full and answer.ended == "length":
            answer.ended = "full"
        return answer

    def _prompt_is_done(self) -> None:
        if self.after_prompt is not None:
            self.after_prompt()
            self.after_prompt = None

    def _piece(self, token_id: int, decoder: Decoder, splitter: ThoughtSplitter | None) -> str:
        """The token's text; a thought's tags count even where they are control tokens."""
        if splitter is not None and self.tokenizer and self.tokenizer.is_hidden(token_id):
            return _TAG_TEXTS.get(self.tokenizer.piece(token_id), "")
        return decoder.push(token_id)

    def _show(
        self, piece: str, answer: Answer, out: console.TokenStream, splitter: ThoughtSplitter | None
    ) -> None:
        if self.stop_texts:
            longest = max(map(len, self.stop_texts))
            self._tail = self._tail[-longest:] + piece
        if splitter is None:
            _put("answer", piece, answer, out)
            return
        for kind, part in splitter.push(piece):
            _put(kind, part, answer, out)


def _put(kind: str, piece: str, answer: Answer, out: console.TokenStream) -> None:
    if kind == "thought":
        answer.thought += piece
        out.thought(piece)
    else:
        answer.text += piece
        out.write(piece)


def _on_ubatch(status: console.StatusLine, ctrl_c: CtrlC | None, done: int, n: int) -> None:
    if done < n:
        status.show(f"prompt: {done} of {n} tokens")
    if ctrl_c is not None and ctrl_c.hit:
        raise Stopped

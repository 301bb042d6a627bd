"""Damaged files through the real command line: a valid run, or one clean `Error:` line and exit 1.

200 seeds run always, 2,500 by hand (`-m slow`). Each case has a time limit and an address space of
its own, so that a hang or a blow-up of memory fails it.
"""

import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from kit.mutate import mutant, take_apart
from kit.toy_gguf import Toy, write_toy

from mlacli.cli import run

_ALLOWED_GROWTH = 5 << 28  # bytes of address space; the plan leaves 1 GiB of it free
_SECONDS = 20

_WORDS = [chr(c) for c in range(97, 117)]
_TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*_WORDS, "ab", "abc", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [1] * 22 + [3, 3],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.bos_token_id": 22,
    "tokenizer.ggml.eos_token_id": 23,
    "tokenizer.ggml.add_bos_token": True,
}
_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_log_multiplier": 0.1,
}
TINY = Toy(
    layers=2, d=32, heads=2, q=32, r=32, k=16, p=16, v=16, F=32, f=32, experts=4, vocab=24,
    n_ctx=256, metadata=_TOKENIZER,
)  # fmt: skip
BASES = {
    "text": TINY,
    "groups, yarn": replace(TINY, groups=2, groups_used=1, metadata={**_TOKENIZER, **_YARN}),
    "kv_b": replace(TINY, layout="kv_b", style="ik", qtypes={"": "Q8_0"}, metadata={}),
    "lite": replace(TINY, q=0, sigmoid=False, biased=(), tied=True, merged=True, metadata={}),
    "folded, MTP": replace(TINY, layout="folded", mtp=1, qtypes={"ffn_down_exps": "Q4_0"}),
}
GOLDEN = Path(__file__).parent / "golden" / "models"
GOLDENS = ("glm_dsa", "mistral4")  # architectures with parts that no toy has
COMMANDS = (
    ("plan",),
    ("run-model", "--prompt-ids", "1,2", "-n", "1"),
    ("run-model", "--prompt-ids", "1,2", "-n", "1", "-dev", "cpu,cpu,cpu", "-sm", "graph"),
    ("run-model", "--prompt-ids", "1,2", "-n", "1", "-dev", "cpu,cpu", "--check-tensors"),
    ("run-model", "-p", "abc a", "-n", "1", "--temp", "0"),
    ("plan", "-v", "--vram", "8G,8G,8G", "-sm", "graph", "--expert-split", "id"),
)


class Hang(BaseException):
    """Not caught as one of ours."""


@contextmanager
def limits() -> Iterator[None]:
    """Raises Hang when time is up; memory ends at the process's size now plus a little."""
    status = Path("/proc/self/status")
    size = next(x for x in status.read_text().splitlines() if x.startswith("VmSize"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + _ALLOWED_GROWTH, hard))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def clean(
    path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], usage: bool = False
) -> str:
    """The error line of a run (empty: it went well), after a look at everything it left behind.

    `usage`: exit 2 is as good as 1.
    """
    capsys.readouterr()
    with limits(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        code = run([*words, "-m", str(path)])
    out, err = capsys.readouterr()
    assert not warned, str(warned[0])
    assert "internal error" not in err and "Traceback" not in err, err
    for stream in (out, err):
        assert all(c.isprintable() or c == "\n" for c in stream), stream
    assert max(map(len, (out + err).splitlines()), default=0) < 2000, "a line of a whole screen"
    lines = [line for line in err.splitlines() if line.startswith("Error:")]
    if code == 0:
        assert not lines
        return ""
    assert lines == err.splitlines()[-1:], err
    # The prompt may not fit the vocabulary that the file claims; that is the prompt's fault.
    usage = usage or "is not in the vocabulary" in lines[0] or "has no tokenizer (" in lines[0]
    usage = usage or "prompt is empty" in lines[0]
    assert code == 1 or (usage and code == 2), err
    return lines[0]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("bases")
    toys = {
        name: write_toy(folder / f"{i}.gguf", toy).read_bytes()
        for i, (name, toy) in enumerate(BASES.items())
    }
    return toys | {name: (GOLDEN / f"{name}.gguf").read_bytes() for name in GOLDENS}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", [*BASES, *GOLDENS])
def test_the_bases_are_sound(bases, name, words, tmp_path, capsys) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(take_apart(bases[name]).bytes())
    error = clean(path, words, capsys)
    assert error == "" or ("-p" in words and "has no tokenizer" in error)


def check_seed(seed: int, bases: dict[str, bytes], tmp_path: Path, capsys) -> str:
    name = list(bases)[seed % len(bases)]
    what, raw = mutant(bases[name], seed)
    path = tmp_path / "mutant.gguf"
    path.write_bytes(raw)
    run_words = COMMANDS[1 + seed // len(bases) % 4]
    try:
        planned = clean(path, COMMANDS[0 if seed % 3 else 5], capsys)
        ran = clean(path, run_words, capsys)
    except BaseException as e:
        e.add_note(f"seed {seed}, {name}: {what}")
        raise
    assert ran or not planned or seed % 3 == 0, f"seed {seed}: {what}: planned: {planned}, but ran"
    return ran


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_damaged_files(first: int, bases, tmp_path, capsys) -> None:
    errors = [check_seed(seed, bases, tmp_path, capsys) for seed in range(first, first + 20)]
    assert sum(map(bool, errors)) > 5  # mutations that harm nothing would test nothing


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_part_of_a_split_set(seed: int, tmp_path, capsys) -> None:
    first = write_toy(tmp_path / "s.gguf", TINY, split_max_tensors=12)
    parts = sorted(tmp_path.glob("s-0*.gguf"))
    assert len(parts) == 3
    path = parts[seed % 3]
    what, raw = mutant(path.read_bytes(), seed)
    path.write_bytes(raw)
    for words in (COMMANDS[0], COMMANDS[2]):
        try:
            clean(first, words, capsys)
        except BaseException as e:
            e.add_note(f"{path.name}: {what}")
            raise


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"expert_used_count": 5}, "expert_used_count 5 is not within 1..4 experts"),
        ({"expert_used_count": 0}, "expert_used_count 0 is not within 1..4 experts"),
        ({"rope.dimension_count": 32}, "rope.dimension_count 32 reaches the key length 32"),
        ({"rope.dimension_count": 4000}, "rope.dimension_count 4000 reaches the key length 32"),
        ({"rope.freq_base": -10000.0}, "rope base -10000.0"),
        ({"rope.scaling.factor": -4.0}, "scaling factor -4.0"),
        ({"rope.freq_base": float("inf")}, "deepseek2.rope.freq_base is inf"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon is 0.0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan, not a number"),
        ({"block_count": 2_000_000_000}, "block_count is 2000000000"),
        ({"embedding_length": 2_000_000_000}, "the metadata says [24, 2000000000]"),
        ({"attention.head_count": 2_000_000_000}, "attn_q_b.weight has shape [64, 32]"),
        ({"expert_count": 2_000_000_000}, "ffn_gate_inp.weight has shape [4, 32]"),
        ({"tokenizer.ggml.tokens": [*_WORDS, *"0123456789"]}, "tokenizer has 30 tokens"),
        ({"general.architecture": "a\nError: b\x1b[0m"}, "architecture 'a\\nError: b\\x1b[0m'"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_what_is_impossible_is_named(keys, named: str, tmp_path, capsys) -> None:
    metadata = {**_TOKENIZER, "tokenizer.ggml.token_type": [1] * 30, **keys}
    path = write_toy(tmp_path / "x.gguf", replace(TINY, metadata=metadata))
    assert named in clean(path, COMMANDS[1], capsys)


@pytest.mark.parametrize(
    "words",
    [
        ("-c", "2000000000"), ("-c", "1"), ("-c", "9" * 40), ("-ub", "2000000000"),
        ("-b", "1", "-ub", "9" * 30), ("-c", "256", "-ub", "9" * 30, "-b", "9" * 30),
        ("-dev", ",".join(["cpu"] * 64), "-sm", "graph"), ("--margin", "9" * 30),
        ("-dev", ",".join(["cpu"] * 64), "-sm", "layer"),
        ("-t", "9" * 30), ("-mg", "9" * 30), ("-ngl", "9" * 30), ("-ts", "1e308,1e308"),
        ("-dev", "cpu,cpu", "-sm", "graph", "-ts", "1e308,1e-308"),
        ("-dev", "cpu,cpu", "-sm", "graph", "-ts", "1e308,1e308"),
        ("-dev", "cpu,cpu", "-sm", "layer", "-ts", "1e-320,1e308"),
        ("--temp", "1e-300"), ("--temp", "1e300"), ("--top-k", "9" * 30), ("--seed", "9" * 30),
        ("--prompt-ids", "9" * 30), ("--prompt-ids", ",".join(["1"] * 5000)), ("-n", "9" * 30),
    ],
    ids=lambda words: " ".join(words)[:40],
)  # fmt: skip
def test_absurd_sizes_run_or_are_refused(words, bases, tmp_path, capsys) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(bases["text"])
    for command in COMMANDS[:2]:
        clean(path, (*command, *words), capsys, usage=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(200, 2700, 100))
def test_many_damaged_files(first: int, bases, tmp_path, capsys) -> None:
    for seed in range(first, first + 100):
        check_seed(seed, bases, tmp_path, capsys)

"""perplexity: scores a text as llama-perplexity does, alone, against a base file, or by mode."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mlacli.cli import console
from mlacli.cli.flag_command import FlagCommand
from mlacli.cli.prompts import read_text_file
from mlacli.cli.start import open_engines, prepared_model, prepared_modes
from mlacli.cli.words import CommandLine
from mlacli.errors import MlacliError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlacli.engine import Engine
    from mlacli.kl_divergence import Divergence
    from mlacli.perplexity import Chunks, Compared
    from mlacli.prepare import Prepared

_CTX_MIN = 4
_ENOUGH = 100  # scored tokens from which statistics are shown
_HEAD = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)


def run(line: CommandLine) -> None:
    if line["chunks"] == 0:
        raise UsageError("--chunks 0 scores nothing", "leave it out for all chunks")
    if line["kl_divergence"]:
        against_base(line)
        return
    n_ctx = line["ctx_size"]
    if n_ctx < _CTX_MIN:
        raise UsageError(f"perplexity needs chunks of at least {_CTX_MIN} tokens", "give -c 512")
    if line["file"] is None:
        raise UsageError("no text to score", "give one with -f FILE")
    if line["compare"]:
        by_mode(line, n_ctx)
    else:
        alone(line, n_ctx)


def alone(line: CommandLine, n_ctx: int) -> None:
    """The perplexity of one run; writes a base file where asked for."""
    from mlacli.kld_file import BaseWriter
    from mlacli.perplexity import NOTHING, check_logits_memory, perplexity

    prepared = prepared_model(line, ctx_size=_settled(line, n_ctx))
    check_logits_memory(prepared.plan, prepared.hparams.n_vocab)
    chunks = _chunks(line, prepared, n_ctx)
    with ExitStack() as stack:
        (engine,) = open_engines(stack, [prepared], warm=not line["no_warmup"])
        writer = None
        if line["kl_divergence_base"]:
            tokens = chunks.tokens[: chunks.n_chunks * n_ctx].reshape(-1, n_ctx)
            writer = stack.enter_context(
                BaseWriter(line["kl_divergence_base"], tokens, prepared.hparams.n_vocab)
            )
        start, final = time.perf_counter(), NOTHING
        with console.TokenStream() as out:
            for i, final in enumerate(perplexity(engine, chunks, writer), 1):
                if i == 1:
                    _announce(chunks, time.perf_counter() - start)
                out.write(f"[{i}]{final.value:.4f},")
        error = final.error
        if math.isnan(error):
            console.warning("the standard deviation of log(prob) is not positive: no error given")
        shown = "" if math.isnan(error) else f" +/- {error:.5f}"
        console.result(f"Final estimate: PPL = {final.value:.4f}{shown}")
        _report(engine, chunks, time.perf_counter() - start)
    if writer is not None:
        console.log(f"log-probabilities written to {line['kl_divergence_base']}")


def against_base(line: CommandLine) -> None:
    """KL divergence to a base file, on its tokens; a text of -f must be the same."""
    from mlacli.kld_file import BaseFile
    from mlacli.perplexity import (
        base_chunks,
        check_logits_memory,
        check_same_text,
        kl_divergence,
    )

    if line["kl_divergence_base"] is None:
        raise UsageError("--kl-divergence needs a base", "give --kl-divergence-base FILE")
    base = BaseFile(line["kl_divergence_base"])
    asked = line.values.get("ctx_size", base.n_ctx)
    if asked < base.n_ctx:
        raise UsageError(
            f"{base.path} was computed with {base.n_ctx} tokens a chunk, more than -c {asked}",
            f"use -c {base.n_ctx}, or leave -c out",
        )
    prepared = prepared_model(line, ctx_size=base.n_ctx)
    check_logits_memory(prepared.plan, prepared.hparams.n_vocab)
    tokenizer = prepared.tokenizer()
    bos = tokenizer.bos_id if tokenizer is not None and tokenizer.add_bos else None
    chunks = base_chunks(base, prepared.hparams.n_vocab, bos, line["chunks"])
    if line["file"] is not None:
        check_same_text(base, _tokens(line, prepared))
    with ExitStack() as stack:
        (engine,) = open_engines(stack, [prepared], warm=not line["no_warmup"])
        start, counted = time.perf_counter(), None
        console.result(_HEAD)
        with console.StatusLine() as status:
            for i, counted in enumerate(kl_divergence(engine, base, chunks), 1):
                status.clear()
                console.result(chunk_line(i, counted))
                status.show(f"chunk {i} of {chunks.n_chunks} done")
        assert counted is not None, "a base file has a chunk"
        if counted.count < _ENOUGH:
            console.note(f"no statistics: {counted.count} tokens were scored, {_ENOUGH} are needed")
        else:
            console.result("\n" + "\n".join(statistics(counted)))
        _report(engine, chunks, time.perf_counter() - start)


def by_mode(line: CommandLine, n_ctx: int) -> None:
    """The same text in several split modes, all against the first."""
    from mlacli.perplexity import check_logits_memory, compare

    modes = prepared_modes(line, line["compare"], ctx_size=_settled(line, n_ctx))
    for mode in modes:
        check_logits_memory(mode.plan, mode.hparams.n_vocab)
    chunks = _chunks(line, modes[0], n_ctx)
    with ExitStack() as stack:
        engines = open_engines(stack, modes, warm=not line["no_warmup"])
        start = time.perf_counter()
        found: list[Compared] = []
        with console.StatusLine() as status:
            for after in compare(engines, chunks):
                found = after
                status.show(f"{found[0].ppl.count} tokens scored")
        console.table(*compared_rows(found), turn=True)
        _report(engines[0], chunks, time.perf_counter() - start)


def _settled(line: CommandLine, n_ctx: int) -> int:
    """The context to allocate: llama.cpp adds half a stride."""
    return n_ctx + int(line["ppl_stride"]) // 2


def _chunks(line: CommandLine, prepared: Prepared, n_ctx: int) -> Chunks:
    """The text of -f in chunks; under a stride the whole (rounded) context is a window."""
    from mlacli.perplexity import cut

    tokens = _tokens(line, prepared)
    tokenizer = prepared.tokenizer()
    assert tokenizer is not None, "without one there are no tokens"
    stride = line["ppl_stride"]
    if stride > n_ctx:
        raise UsageError(
            f"--ppl-stride {stride} is larger than -c {n_ctx}", "give a smaller --ppl-stride"
        )
    window = prepared.plan.n_ctx if stride else n_ctx
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    return cut(tokens, window, bos, line["chunks"], stride)


def _tokens(line: CommandLine, prepared: Prepared) -> list[int]:
    """The text of -f as llama-perplexity cuts it: BOS added, names of control tokens are text."""
    tokenizer = prepared.tokenizer()
    if tokenizer is None:
        raise UsageError(
            f"{prepared.path.name} has no tokenizer, so no text can be scored",
            "use a file with one, or --kl-divergence with a base file, which holds tokens",
        )
    tokens = tokenizer.encode(
        read_text_file(line["file"], "-f", "the text file"), parse_special=False
    )
    for message in tokenizer.warnings:
        console.warning(message)
    n_vocab = prepared.hparams.n_vocab
    if (top := max(tokens, default=0)) >= n_vocab:
        raise MlacliError(f"the tokenizer gives token {top}, the model has {n_vocab}")
    return tokens


def _announce(chunks: Chunks, seconds: float) -> None:
    left = seconds * chunks.n_chunks
    console.log(f"{chunks.n_chunks} chunks of {chunks.n_ctx} tokens, about {left:.0f} s")


def _report(engine: Engine, chunks: Chunks, seconds: float) -> None:
    n = chunks.n_chunks * chunks.n_ctx
    console.log(f"scored  {seconds:10.3f} s {n:7d} tokens {n / seconds:9.2f} t/s")
    console.log(f"memory  {engine.peak_memory() / 2**20:10.1f} MiB peak")


def chunk_line(i: int, d: Divergence) -> str:
    """What is known after chunk `i`, in llama-perplexity's columns."""
    ppl, ratio, kld = d.log_ppl.exp(), d.log_ratio, d.mean_kld
    rms, top = d.rms_p_diff, d.same_top
    return (
        f"{i:4d}    {ppl.value:9.4f} ± {ppl.error:9.4f}    {ratio.value:10.5f} ± "
        f"{ratio.error:10.5f}    {kld.value:10.5f} ± {kld.error:10.5f}    {100 * rms.value:6.3f} ± "
        f"{100 * rms.error:6.3f} %    {100 * top.value:6.3f} ± {100 * top.error:6.3f} %"
    )


def statistics(d: Divergence) -> Iterator[str]:
    """The three blocks of llama-perplexity."""
    from mlacli.kl_divergence import percentile

    yield "====== Perplexity statistics ======"
    ratio = d.log_ratio
    for name, e in (
        ("Mean PPL(Q)                   ", d.log_ppl.exp()),
        ("Mean PPL(base)                ", d.log_ppl_base.exp()),
        ("", None),
        ("Mean ln(PPL(Q)/PPL(base))     ", ratio),
        ("Mean PPL(Q)/PPL(base)         ", ratio.exp()),
        ("Mean PPL(Q)-PPL(base)         ", d.ppl_difference),
    ):
        if e is None:
            yield f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * d.correlation:6.2f}%"
        else:
            yield f"{name}: {e.value:10.6f} ± {e.error:10.6f}"
    yield "\n====== KL divergence statistics ======"
    yield f"Mean    KLD: {d.mean_kld.value:10.6f} ± {d.mean_kld.error:10.6f}"
    kld = d.kld
    for name, percent in (
        ("Maximum", 100), ("99.9%  ", 99.9), ("99.0%  ", 99), ("95.0%  ", 95), ("90.0%  ", 90),
        ("Median ", 50), ("10.0%  ", 10), (" 5.0%  ", 5), (" 1.0%  ", 1), (" 0.1%  ", 0.1),
        ("Minimum", 0),
    ):  # fmt: skip
        yield f"{name} KLD: {percentile(kld, percent):10.6f}"
    yield "\n====== Token probability statistics ======"
    yield f"Mean    Δp: {100 * d.mean_p_diff.value:6.3f} ± {100 * d.mean_p_diff.error:5.3f} %"
    p_diff = d.p_diff
    for name, percent in (
        ("Maximum", 100), ("99.9%  ", 99.9), ("99.0%  ", 99), ("95.0%  ", 95), ("90.0%  ", 90),
        ("75.0%  ", 75), ("Median ", 50), ("25.0%  ", 25), ("10.0%  ", 10), (" 5.0%  ", 5),
        (" 1.0%  ", 1), (" 0.1%  ", 0.1), ("Minimum", 0),
    ):  # fmt: skip
        yield f"{name} Δp: {100 * percentile(p_diff, percent):6.3f}%"
    yield f"RMS Δp    : {100 * d.rms_p_diff.value:6.3f} ± {100 * d.rms_p_diff.error:5.3f} %"
    yield f"Same top p: {100 * d.same_top.value:6.3f} ± {100 * d.same_top.error:5.3f} %"


def compared_rows(found: list[Compared]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, one row per mode); all but PPL are against the first mode."""
    from mlacli.perplexity import BEYOND_ROUNDING

    columns = (
        "mode", "PPL", "error", "mean KLD", "max KLD", "same top", "max logit diff",
        "first layer that differs", f"by more than {BEYOND_ROUNDING:g}",
    )  # fmt: skip
    rows = []
    for i, one in enumerate(found):
        d = one.divergence
        row = [one.mode, f"{one.ppl.value:.4f}", f"{one.ppl.error:.4f}"]
        row += [f"{d.mean_kld.value:.3e}", f"{d.kld.max():.3e}"]
        row += [f"{100 * d.same_top.value:.3f}%", f"{one.max_logit_diff:.3e}"]
        row += [_layer(one, 0.0), _layer(one, BEYOND_ROUNDING)]
        rows.append(tuple(row if i else [*row[:3], *["-"] * 6]))
    return columns, rows


def _layer(one: Compared, above: float) -> str:
    layer = one.first_layer(above)
    return "none" if layer is None else f"{layer} ({one.layers[layer]:.1e})"


command = FlagCommand(
    "perplexity",
    run,
    "Scores a text as llama-perplexity does: the second half of every chunk of -c tokens counts. "
    "Base files of log-probabilities are llama.cpp's own, both ways.",
)

"""Writes a GGUF file of a published model's exact shapes with random weights, for measurements.

Speed, memory and load times depend on shapes and types, not on what the weights say, so such a
file stands in for a download of many gigabytes. Values are spread as in a fresh network, so that
activations stay finite; the text they produce is noise. Memory stays under 200 MB at any size.
`mlacli sweep-bench --synthetic PRESET` measures the same models without a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from mlacli.loading.presets import PRESETS, QUANTS, Preset
from mlacli.loading.synthetic import SyntheticFile


def write_synth(
    path: Path, model: Preset, quant: str = "q4_k_m", vocab_from: Path | None = None, seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:  # fmt: skip
    """`path`, now a GGUF of `model`; `progress` is told bytes written and bytes in all.

    `vocab_from` is a GGUF whose tokenizer is copied, filled up to the model's vocabulary.
    """
    writer = gguf.GGUFWriter(path, model.arch)
    if vocab_from is None:
        writer.add_tokenizer_model("none")
    else:
        model = _copy_tokenizer(writer, vocab_from, model)
    writer.add_name(f"synthetic {path.stem}")
    for key, value in model.metadata().items():
        _add(writer, key, value)
    file = SyntheticFile(model, quant, seed)
    for info in file.tensors.values():
        kind = T(info.qtype.id)
        writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), info.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as out:
        done = 0
        for info in file.tensors.values():
            _pad(out)
            for piece in file.pieces(info):
                out.write(piece.data)
            done += info.nbytes
            if progress is not None:
                progress(done, file.size)
        _pad(out)
    return path


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: V.BOOL, int: V.UINT32, float: V.FLOAT32, str: V.STRING}
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _copy_tokenizer(writer: gguf.GGUFWriter, path: Path, model: Preset) -> Preset:
    """`model` with room for all tokens of the file; unused ids get control tokens."""
    fields = gguf.GGUFReader(str(path)).fields
    found = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    tokens = found["tokenizer.ggml.tokens"]
    model = replace(model, vocab=max(model.vocab, len(tokens)))
    spare = range(len(tokens), model.vocab)
    found["tokenizer.ggml.tokens"] = tokens + [f"<|unused {i}|>" for i in spare]
    if "tokenizer.ggml.token_type" in found:
        found["tokenizer.ggml.token_type"] += [3] * len(spare)
    for key, value in found.items():
        _add(writer, key, value)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quant", choices=QUANTS, default="q4_k_m")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--vocab-gguf", type=Path, help="copy the tokenizer of this file")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model = PRESETS[args.preset]
    if args.layers:
        model = replace(model, layers=args.layers)

    def progress(done: int, total: int) -> None:
        print(f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", flush=True)

    write_synth(args.out, model, args.quant, args.vocab_gguf, args.seed, progress)
    print()


if __name__ == "__main__":
    main()

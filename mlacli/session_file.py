"""--prompt-cache: the tokens and cache rows of a text in a file that any mode and rank count reads.

A GGUF file: token ids in the metadata, and for each layer the parts of its cache [n, width] in the
type of the cache that wrote them, whole, as all ranks with heads hold them. Written beside the
old file and renamed, so that a run that ends early leaves that one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlacli.errors import GgufError, MlacliError
from mlacli.loading.gguf_file import GgufFile
from mlacli.loading.quant_types import BF16, F16, F32, Q8_0, QType
from mlacli.loading.weights import from_float32, to_float32

if TYPE_CHECKING:
    from mlacli.latent_cache import LatentCache
    from mlacli.ops import Ops
    from mlacli.prepare import Prepared

_ARCH, _KEY = "mlacli-session", "mlacli.session"
_TYPES: Mapping[str, QType] = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
_DELETE = "delete the file, or give another name"
Holder = tuple["Ops", "LatentCache"]


def save(path: str, prepared: Prepared, holders: Mapping[int, Holder], ids: Sequence[int]) -> None:
    """Writes rows 0..len(ids)-1 of every layer; `holders`: one rank's ops and cache per layer."""
    import gguf

    temporary = f"{path}.part"
    try:
        Path(temporary).touch()
        writer = gguf.GGUFWriter(temporary, _ARCH)
        writer.add_string(f"{_KEY}.model", fingerprint(prepared))
        writer.add_array(f"{_KEY}.tokens", [int(i) for i in ids])
        for layer, (ops, cache) in sorted(holders.items()):
            for name, rows, _, cache_type in _parts(prepared, cache, layer):
                raw = _packed(ops.read_rows(rows, len(ids)), _TYPES[cache_type])
                kind = gguf.GGMLQuantizationType(_TYPES[cache_type].id)
                writer.add_tensor(f"{layer}.{name}", raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as e:
        Path(temporary).unlink(missing_ok=True)
        raise MlacliError(f"can't write {path}: {e.strerror}", "check --prompt-cache") from e


def load(
    path: str, prepared: Prepared, ranks: Sequence[Holder], wanted: Sequence[int]
) -> list[int]:
    """The ids at the start of `wanted` whose rows are in the file, and now in every rank's cache.

    MlacliError when the file is another model's or lacks what this cache keeps.
    """
    file = GgufFile.open(path)
    try:
        _check(file, path, prepared)
        ids = list(_tokens(file))
        n = next((i for i, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1]),
                 min(len(ids), len(wanted), prepared.plan.n_ctx))  # fmt: skip
        n = min(n, prepared.plan.n_ctx)
        for ops, cache in ranks if n else ():
            for layer in cache.rows:
                for name, rows, width, _ in _parts(prepared, cache, layer):
                    ops.write_rows(rows, _read(file, path, layer, name, width, n, len(ids)))
        return ids[:n]
    finally:
        file.close()


def tokens(path: str, prepared: Prepared) -> list[int]:
    """All token ids of a file of this model."""
    file = GgufFile.open(path)
    try:
        _check(file, path, prepared)
        return list(_tokens(file))
    finally:
        file.close()


def fingerprint(prepared: Prepared) -> str:
    """What rows depend on: the model's tensors (a sample of each), overrides, sparse attention."""
    told = hashlib.sha256()
    for name, info in sorted(prepared.gguf.tensors.items()):
        told.update(f"{name} {info.shape} {info.qtype.name} ".encode())
        data = prepared.gguf.data(info)
        told.update(data[: 1 << 8])
        told.update(data[-(1 << 8) :])
    sparse = getattr(prepared.hparams, "sparse", None)
    told.update(repr(sorted(prepared.params.model.override_kv.items())).encode())
    told.update(repr(None if sparse is None else sparse.top_k).encode())
    return told.hexdigest()


def _parts(prepared: Prepared, cache: LatentCache, layer: int) -> list[tuple[str, Any, int, str]]:
    """(name, rows, width, cache type) of what the cache keeps of a layer."""
    held = cache.rows[layer]
    found: list[tuple[str, Any, int, str]] = [
        (p.name, getattr(held, p.name), p.width, p.cache_type) for p in prepared.plan.cache
    ]  # fmt: skip
    if layer in cache.index_rows:
        width = prepared.hparams.sparse.width
        cache_type = prepared.params.context.indexer_cache_type_k
        found.append(("index", cache.index_rows[layer], width, cache_type))
    return found


def _packed(values: Any, qtype: QType) -> Any:
    """Rows as the file holds them; a started block is filled with zeros."""
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % qtype.block)))
    raw = from_float32(np.ascontiguousarray(values, np.float32), qtype)
    cells = {"F32": np.float32, "F16": np.float16}.get(qtype.name)
    return raw if cells is None else raw.view(cells)


def _read(
    file: GgufFile, path: str, layer: int, name: str, width: int, n: int, n_saved: int
) -> Any:
    """Rows 0..n-1 as float32 [n, width]."""
    info = file.tensors.get(f"{layer}.{name}")
    if info is None and name == "columns":  # the same values, transposed
        info = file.tensors.get(f"{layer}.rows")
    if info is None:
        raise MlacliError(
            f"{path} holds no {name} of layer {layer}, which this cache keeps",
            "it was saved with another -mla: use that, or another file",
        )
    if len(info.shape) != 2 or info.shape[0] != n_saved or info.shape[1] < width:
        raise GgufError(f"{path}: {info.name} has shape {list(info.shape)}", _DELETE)
    raw = np.frombuffer(file.data(info), np.uint8).reshape(n_saved, info.row_bytes)[:n]
    return np.array(to_float32(np.ascontiguousarray(raw), info.qtype)[:, :width])


def _check(file: GgufFile, path: str, prepared: Prepared) -> None:
    if file.metadata.text("general.architecture") != _ARCH:
        raise MlacliError(f"{path} is no prompt cache", "check --prompt-cache")
    if file.metadata.get(f"{_KEY}.model") != fingerprint(prepared):
        raise MlacliError(f"{path} was saved with another model or other settings of it", _DELETE)


def _tokens(file: GgufFile) -> Sequence[int]:
    found = file.metadata.get(f"{_KEY}.tokens")
    if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
        raise GgufError(f"{file.path.name} holds no tokens", _DELETE)
    return found

"""The reader against gguf.GGUFReader, and against every kind of broken file."""

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from kit.toy_gguf import Toy, header_only, write_toy

from mlacli.errors import GgufError, MlacliError, UnsupportedFeature
from mlacli.loading import gguf_file
from mlacli.loading.gguf_file import GgufFile, Metadata

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "models").glob("*.gguf"))
SMALL = Toy(
    layers=1,
    dense=1,
    d=32,
    heads=1,
    q=0,
    r=32,
    k=16,
    p=16,
    v=32,
    F=32,
    experts=0,
    vocab=8,
    metadata={
        "tokenizer.ggml.tokens": ["a", "bé", "", "d"],
        "tokenizer.ggml.scores": [0.5, -1.0, 2.0, 0.0],
        "general.flag": True,
        "general.below": -7,
    },
)


def own_value(field):
    """What GGUFReader knows of a field, in plain Python types."""
    kinds = field.types
    if kinds[-1] == GGUFValueType.STRING:
        words = [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
        return words if kinds[0] == GGUFValueType.ARRAY else words[0]
    values = [field.parts[i].tolist()[0] for i in field.data]
    return values if kinds[0] == GGUFValueType.ARRAY else values[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("gguf") / "small.gguf", SMALL)


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def entry(name, ne, type_id=0, offset=0, n_dims=None):
    dims = struct.pack(f"<{len(ne)}Q", *ne)
    n_dims = len(ne) if n_dims is None else n_dims
    return string(name) + struct.pack("<I", n_dims) + dims + struct.pack("<IQ", type_id, offset)


def raw_file(
    path, pairs=(), entries=(), version=3, n_tensors=None, n_pairs=None, data=4096, magic=b"GGUF"
):
    """A file spelled out byte by byte; the counts can lie."""
    n_tensors = len(entries) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(pairs) + b"".join(entries)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


def refusal(path, kind=GgufError):
    """The error that opening `path` raises; it must come fast."""
    start = time.process_time()
    with pytest.raises(kind) as caught:
        GgufFile.open(path)
    assert time.process_time() - start < 1.0
    assert caught.value.hint
    return caught.value.message


# --- what it reads ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_files_equal_gguf_reader(path):
    """Every key, every tensor entry and every tensor byte is what gguf.GGUFReader reads."""
    theirs = GGUFReader(str(path))
    ours = GgufFile.open(path)
    expected = {k: own_value(f) for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert dict(ours.metadata) == expected
    assert {k: type(v) for k, v in ours.metadata.items()} == {
        k: type(v) for k, v in expected.items()
    }
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert info.shape == tuple(int(n) for n in reversed(t.shape))
        assert info.qtype.id == t.tensor_type.value
        assert info.nbytes == t.n_bytes and info.offset == t.data_offset
        assert bytes(ours.data(info)) == t.data.tobytes()
    assert ours.size == path.stat().st_size


def test_every_scalar_type(tmp_path):
    """Each of GGUF's value types decodes to its Python value."""
    kinds = {
        0: ("B", 200), 1: ("b", -100), 2: ("H", 60000), 3: ("h", -30000), 4: ("I", 4_000_000_000),
        5: ("i", -2_000_000_000), 6: ("f", 0.5), 7: ("?", True), 10: ("Q", 2**63),
        11: ("q", -(2**62)), 12: ("d", 1e300),
    }  # fmt: skip
    pairs = [pair(f"key{k}", k, struct.pack("<" + c, x)) for k, (c, x) in kinds.items()]
    for k, (c, x) in kinds.items():
        array = struct.pack("<IQ", k, 2) + struct.pack("<2" + c, x, x)
        pairs.append(pair(f"array{k}", 9, array))
    pairs.append(pair("text", 8, string("grüße")))
    pairs.append(pair("empty", 9, struct.pack("<IQ", 8, 0)))
    meta = GgufFile.open(raw_file(tmp_path / "a.gguf", pairs)).metadata
    for k, (_, x) in kinds.items():
        assert meta[f"key{k}"] == x and type(meta[f"key{k}"]) is type(x)
        assert meta[f"array{k}"] == [x, x]
    assert meta["text"] == "grüße" and meta["empty"] == []


def test_bytes_that_are_no_utf8_are_kept_readable(tmp_path):
    """A damaged string doesn't make the model unreadable."""
    pairs = [pair("text", 8, struct.pack("<Q", 3) + b"a\xffb")]
    meta = GgufFile.open(raw_file(tmp_path / "a.gguf", pairs)).metadata
    assert meta["text"] == "a�b"


def test_version_2_is_read(tmp_path):
    meta = GgufFile.open(
        raw_file(tmp_path / "a.gguf", [pair("n", 4, struct.pack("<I", 5))], version=2)
    ).metadata
    assert meta["n"] == 5


def test_arrays_are_lazy(small, monkeypatch):
    """Opening decodes no array, and a second access decodes nothing."""
    decoded = []
    value = Metadata._value
    monkeypatch.setattr(
        Metadata, "_value", staticmethod(lambda c, k, key: decoded.append(key) or value(c, k, key))
    )
    file = GgufFile.open(small)
    assert "tokenizer.ggml.tokens" in file.metadata
    assert not any(key.startswith("tokenizer") for key in decoded)
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "bé", "", "d"]
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "bé", "", "d"]
    assert decoded.count("tokenizer.ggml.tokens") == 1


def test_values_may_be_read_in_any_order(small):
    """Decoding one value doesn't disturb where the others are found."""
    file = GgufFile.open(small)
    forwards = [file.metadata[key] for key in file.metadata]
    again = GgufFile.open(small)
    backwards = [again.metadata[key] for key in reversed(list(again.metadata))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("alignment", [8, 64, 256, 4096])
def test_other_alignments(tmp_path, alignment):
    """general.alignment moves the start of the weights."""
    path = write_toy(tmp_path / "a.gguf", Toy(alignment=alignment, r=40, k=24, p=8))
    file = GgufFile.open(path)
    for t in GGUFReader(str(path)).tensors:
        info = file.tensors[t.name]
        assert info.offset % alignment == 0
        assert bytes(file.data(info)) == t.data.tobytes()


def test_nothing_of_a_400_gb_file_is_touched(tmp_path):
    """Opening DeepSeek-V3 maps 400 GB and reads the header only, in well under a second."""
    path = header_only(tmp_path / "v3.gguf", "v3")
    assert path.stat().st_size > 400e9
    before = time.process_time()
    file = GgufFile.open(path)
    assert time.process_time() - before < 1.0
    assert len(file.tensors) == 61 * 10 + 3 * 3 + 58 * 8 + 3
    resident = Path("/proc/self/smaps")
    if resident.exists():
        after_name = resident.read_text().split(str(path))[1]
        rss = next(x for x in after_name.splitlines() if x.startswith("Rss:"))
        assert int(rss.split()[1]) < 4096, "kB of the map that are in memory"
    file.close()


def test_close_while_a_weight_still_points_into_the_map(small):
    """close() doesn't fail, and what was read stays readable."""
    file = GgufFile.open(small)
    raw = np.frombuffer(file.data(file.tensors["output_norm.weight"]), np.float32)
    file.close()
    assert np.isfinite(raw).all()


def test_override_kv(small):
    """Overrides replace a value and add new keys; the file's other keys stay."""
    pairs = {"deepseek2.context_length": 9, "deepseek2.new": "x"}
    meta = GgufFile.open(small, pairs).metadata
    assert meta["deepseek2.context_length"] == 9
    assert meta["deepseek2.new"] == "x" and "deepseek2.new" in list(meta)
    assert meta["deepseek2.block_count"] == 1
    assert len(meta) == len(GgufFile.open(small).metadata) + 1


# --- typed access ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "not a number"),
        (float("inf"), "not a number"),
        ("12", "not a number"),
        (True, "not a number"),
        ([1, 2], "not a number"),
        (1.5, "not an integer"),
        (-1, "not an integer of at least 0"),
    ],
)
def test_integer_refuses(small, value, message):
    """A metadata value of the wrong kind is named with its key."""
    meta = GgufFile.open(small, {"n": value}).metadata
    with pytest.raises(GgufError, match=f"metadata key n is .*{message}"):
        meta.integer("n")


def test_missing_number_and_wrong_text(small):
    meta = GgufFile.open(small, {"n": 3}).metadata
    with pytest.raises(GgufError, match="metadata key absent is missing"):
        meta.number("absent")
    with pytest.raises(GgufError, match="metadata key n is 3, not a string"):
        meta.text("n")
    assert meta.integer("absent", 4) == 4 and meta.text("absent", "x") == "x"


# --- split files -----------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """Three parts of one model, and the same model whole."""
    whole = write_toy(tmp_path / "whole.gguf")
    first = write_toy(tmp_path / "split.gguf", split_max_tensors=14)
    found = sorted(tmp_path.glob("split-*.gguf"))
    assert found[0] == first and len(found) == 3
    return whole, found


def patch(path, key, code, value):
    """Overwrites a scalar of the header in place."""
    raw = bytearray(path.read_bytes())
    at = raw.index(string(key)) + len(string(key)) + 4
    struct.pack_into("<" + code, raw, at, value)
    path.write_bytes(raw)


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_split_set_opens_by_any_part(parts, opened):
    """All tensors, metadata and bytes of the whole file, whichever part is named."""
    whole, found = parts
    file, expected = GgufFile.open(found[opened]), GgufFile.open(whole)
    assert file.path == found[0]
    assert file.tensors.keys() == expected.tensors.keys()
    assert {info.part for info in file.tensors.values()} == {0, 1, 2}
    for name, info in file.tensors.items():
        assert bytes(file.data(info)) == bytes(expected.data(expected.tensors[name]))
    own = {k: v for k, v in file.metadata.items() if not k.startswith("split.")}
    assert own == dict(expected.metadata)
    assert file.size == sum(path.stat().st_size for path in found)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_part_is_named(parts, missing):
    _, found = parts
    found[missing].unlink()
    assert found[missing].name in refusal(found[2 if missing == 0 else 0])


def test_parts_in_each_others_place(parts):
    """Parts 2 and 3 swapped: refused, with the number the part claims."""
    _, found = parts
    spare = found[1].with_name("spare")
    found[1].rename(spare)
    found[2].rename(found[1])
    spare.rename(found[2])
    assert "00002-of-00003.gguf says it is part 3" in refusal(found[0])


def test_part_of_another_model(parts, tmp_path):
    """A part whose tensors the set already has, or doesn't expect, is refused."""
    _, found = parts
    other = tmp_path / "other"
    other.mkdir()
    write_toy(other / "split.gguf", Toy(d=32, used=1), split_max_tensors=13)
    strange = min(other.glob("*-00002-of-*.gguf"))
    strange.replace(found[1])
    message = refusal(found[0])
    assert "appears twice" in message or "metadata says" in message


def test_first_part_that_is_another(parts):
    """A first part that says it is the second."""
    _, found = parts
    patch(found[0], "split.no", "H", 1)
    assert "00001-of-00003.gguf says it is part 2" in refusal(found[0])


def test_wrong_total(parts):
    _, found = parts
    patch(found[0], "split.tensors.count", "i", 99)
    assert "metadata says 99" in refusal(found[0])


@pytest.mark.parametrize("name", ["model.gguf", "split-00001-of-00004.gguf"])
def test_split_file_under_another_name(parts, name):
    """The first of three parts can't find the others when its name doesn't say three."""
    _, found = parts
    renamed = found[0].rename(found[0].with_name(name))
    assert "is one of 3 parts" in refusal(renamed)


def test_truncated_part_is_named(parts):
    _, found = parts
    raw = found[1].read_bytes()
    found[1].write_bytes(raw[: len(raw) // 2])
    assert found[1].name in refusal(found[0])


# --- broken files ----------------------------------------------------------------------------


def test_truncation_anywhere(small, tmp_path):
    """Cut at 200 places, through the header and the weights: GgufError that names an offset."""
    raw = small.read_bytes()
    file = GgufFile.open(small)
    data = min(info.offset for info in file.tensors.values())
    end = max(info.offset + info.nbytes for info in file.tensors.values())
    assert data > 800 and file.metadata["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0, 0.0]
    sizes = {*range(4, 64), *range(64, data, data // 100), *range(data - 8, end, end // 40)}
    cut = tmp_path / "cut.gguf"
    for size in sorted(sizes):
        cut.write_bytes(raw[:size])
        message = refusal(cut)
        assert "offset" in message, (size, message)
    assert len(sizes) >= 200
    cut.write_bytes(raw[:end])  # without the padding after the last tensor: complete
    assert GgufFile.open(cut).tensors.keys() == file.tensors.keys()


def test_damaged_bytes_anywhere(small, tmp_path):
    """A header with one byte changed opens or raises MlacliError, and nothing else."""
    raw = small.read_bytes()
    data = min(info.offset for info in GgufFile.open(small).tensors.values())
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for at in rng.choice(data, 250, replace=False):
        changed = bytearray(raw)
        changed[at] ^= int(rng.integers(1, 256))
        damaged.write_bytes(changed)
        try:
            dict(GgufFile.open(damaged).metadata)
        except MlacliError:
            refused += 1
    assert refused > 50


def test_wrong_magic(tmp_path):
    assert "not a GGUF file" in refusal(raw_file(tmp_path / "a.gguf", magic=b"GGML"))


@pytest.mark.parametrize("raw", [b"G", b"GGU", b"PK\3\4" + bytes(100)])
def test_not_gguf(tmp_path, raw):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    assert "not a GGUF file" in refusal(path)


@pytest.mark.parametrize("version", [0, 1, 4])
def test_other_versions(tmp_path, version):
    assert f"version {version}" in refusal(raw_file(tmp_path / "a.gguf", version=version))


def test_big_endian(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "big-endian" in refusal(path)


def test_empty_missing_and_directory(tmp_path):
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert "empty" in refusal(empty)
    assert "no file" in refusal(tmp_path / "absent.gguf")
    assert "can't open" in refusal(tmp_path)


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("pairs", "counts"),
    [
        ((), {"n_tensors": HUGE}),
        ((), {"n_pairs": HUGE}),
        ((struct.pack("<Q", HUGE),), {}),
        ((pair("k", 8, struct.pack("<Q", HUGE)),), {}),
        ((pair("k", 9, struct.pack("<IQ", 8, HUGE)),), {}),
        ((pair("k", 9, struct.pack("<IQ", 4, HUGE)),), {}),
        ((pair("k", 9, struct.pack("<IQQ", 8, 1, 2**64 - 8)),), {}),
        ((pair("k", 9, struct.pack("<IQ", 9, 1)),), {}),
        ((pair("k", 13, b""),), {}),
    ],
    ids=["tensors", "pairs", "key", "string", "strings", "numbers", "wrap", "nested",
         "kind"],
)  # fmt: skip
def test_impossible_counts(tmp_path, pairs, counts):
    """2^62 of anything, and value types that don't exist, end in an error at once."""
    message = refusal(raw_file(tmp_path / "a.gguf", pairs, **counts))
    assert "offset" in message or "unknown value type" in message or "dimensions" in message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a", [32]), entry("a", [32])], "tensor a appears twice"),
        ([entry("a", [])], "tensor a has 0 dimensions"),
        ([entry("a", [1, 1, 1, 1, 1])], "tensor a has 5 dimensions"),
        ([entry("a", [HUGE, HUGE])], "inside tensor a"),
        ([entry("a", [32], offset=HUGE)], "inside tensor a"),
        ([entry("a", [32], offset=4)], "tensor a lies at offset 4"),
        ([entry("a", [0])], "tensor a has shape"),
        ([entry("a", [48], type_id=8)], "don't fill blocks of 32"),
    ],
)
def test_broken_tensor_entries(tmp_path, entries, message):
    assert message in refusal(raw_file(tmp_path / "a.gguf", entries=entries))


def test_duplicate_key(tmp_path):
    twice = [pair("k", 4, struct.pack("<I", 1))] * 2
    assert "key k appears twice" in refusal(raw_file(tmp_path / "a.gguf", twice))


@pytest.mark.parametrize("alignment", [0, 2**31])
def test_impossible_alignment(tmp_path, alignment):
    pairs = [pair("general.alignment", 4, struct.pack("<I", alignment))]
    path = raw_file(tmp_path / "a.gguf", pairs, [entry("a", [32])])
    assert "alignment" in refusal(path) or "inside tensor a" in refusal(path)


@pytest.mark.parametrize(
    ("type_id", "named"),
    [(137, "IQ2_K of ik_llama.cpp"), (212, "Q4_K_R4 of ik_llama.cpp"), (4, "id 4"), (999, "999")],
)
def test_unknown_tensor_type(tmp_path, type_id, named):
    """The tensor is named, an ik_llama.cpp type by its name, and the remedy says what to use."""
    path = raw_file(tmp_path / "a.gguf", entries=[entry("blk.7.x", [256], type_id)])
    with pytest.raises(UnsupportedFeature, match=r"tensor blk\.7\.x has type") as caught:
        GgufFile.open(path)
    assert named in caught.value.message and "Q8_0" in caught.value.hint


def test_part_names():
    """The names that gguf-split gives; anything else is a file of its own."""
    first = gguf_file._first_part(Path("a/m-00002-of-00003.gguf"))
    assert first == Path("a/m-00001-of-00003.gguf")
    assert gguf_file._first_part(Path("m-2-of-3.gguf")) == Path("m-2-of-3.gguf")

"""Grammars and JSON schemas over the bundled model's vocabulary, and DRY's breakers in it."""

import json
import re

import numpy as np
import pytest

from mlacli.dry_breakers import dry_breakers
from mlacli.errors import MlacliError, UsageError
from mlacli.grammar import TokenGrammar
from mlacli.loading.gguf_file import GgufFile
from mlacli.loading.tokenizer import Tokenizer
from mlacli.params import SamplingParams
from mlacli.prepare import bundled_model
from mlacli.sampling import Sampler


@pytest.fixture(scope="module")
def tokenizer():
    file = GgufFile.open(bundled_model())
    yield Tokenizer.from_metadata(file.metadata)
    file.close()


def written(tokenizer, n_max=200, seed=0, **given):
    """What a sampler writes on random logits, and whether it came to an end by itself."""
    sampler = Sampler.for_tokenizer(
        SamplingParams(seed=seed, temp=1.0, top_k=0, **given), tokenizer
    )
    random, ids = np.random.default_rng(seed), []
    for position in range(n_max):
        logits = random.normal(size=tokenizer.n_vocab).astype(np.float32)
        ids.append(sampler.next(logits, position))
        if ids[-1] in tokenizer.eog_ids:
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


@pytest.mark.parametrize("seed", range(5))
def test_output_follows_a_gbnf_grammar(tokenizer, seed):
    grammar = 'root ::= "yes" | "no" | number "." \nnumber ::= [1-9] [0-9]{2,4}'
    text, ended = written(tokenizer, seed=seed, grammar=grammar)
    assert ended and re.fullmatch(r"yes|no|[1-9][0-9]{2,4}\.", text)


@pytest.mark.parametrize("seed", range(3))
def test_output_follows_a_json_schema(tokenizer, seed):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150},
                       "kind": {"enum": ["cat", "dog"]}},
        "required": ["age", "kind"],
        "additionalProperties": False,
    }  # fmt: skip
    text, ended = written(tokenizer, 400, seed, json_schema=json.dumps(schema))
    if ended:  # random blanks may go on for long
        found = json.loads(text)
        assert found["kind"] in ("cat", "dog") and 0 <= found["age"] <= 150
    assert text.lstrip().startswith("{")


def test_a_grammar_starts_over_with_each_text(tokenizer):
    grammar = TokenGrammar(tokenizer, 'root ::= "ab"', None)
    start = grammar.allowed()
    assert {bytes(tokenizer.piece(i)) for i in np.flatnonzero(start)} <= {b"a", b"ab"}
    grammar.accept(int(np.flatnonzero(start)[0]))
    assert (grammar.allowed() != start).any()
    grammar.begin()
    assert (grammar.allowed() == start).all()


@pytest.mark.parametrize(
    "given",
    [{"grammar": 'root ::= "open'}, {"grammar": "root ::= nowhere"}, {"grammar": "!!"},
     {"json_schema": "{"}, {"json_schema": '{"type": "banana"}'}],
)  # fmt: skip
def test_what_is_no_grammar_is_a_usage_error(tokenizer, given):
    with pytest.raises(UsageError) as e:
        Sampler.for_tokenizer(SamplingParams(**given), tokenizer)
    assert e.value.hint and "\n" not in e.value.message


def test_a_grammar_needs_a_tokenizer():
    with pytest.raises(MlacliError, match="tokenizer"):
        Sampler.for_tokenizer(SamplingParams(grammar='root ::= "a"'), None)


def test_breakers_are_every_way_in_which_a_text_begins_in_a_token(tokenizer):
    found = dry_breakers(tokenizer, (".", "", "the end"))
    for token_id in range(tokenizer.n_vocab):
        piece, tails = tokenizer.piece(token_id), found.get(token_id, ())
        assert (() in tails) == (b"." in piece or b"the end" in piece)
        for n in range(1, len(b"the end")):
            rest = tokenizer.encode("the end"[n:], add_special=False, parse_special=False)
            begins = piece.endswith(b"the end"[:n]) and b"the end" not in piece
            assert (tuple(rest) in tails) == begins or begins is False
    assert any(tails != ((),) for tails in found.values())
    assert dry_breakers(tokenizer, ("",)) == {}

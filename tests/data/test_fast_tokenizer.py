import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.schema import TokenizerConfig
from castalia.data.fast_tokenizer import Encode, fast_encoder, reference_encoder
from castalia.data.tokenizer import load_tokenizer, train_bpe

pytest.importorskip("fastokens", reason="needs fastokens")


@pytest.fixture(scope="module")
def engines(fixtures: Path) -> list[Encode]:
    """The fast one and its reference for the 20B tokenizer."""
    tokenizer = load_tokenizer(TokenizerConfig(path=str(fixtures / "tokenizer" / "20B_tokenizer.json")))
    encode, _ = fast_encoder(tokenizer, [])
    assert encode is not None
    return [encode, reference_encoder(tokenizer)]


PIECES = st.one_of(
    st.text(max_size=8),
    st.integers(1, 40).map(" ".__mul__),
    st.sampled_from(
        ["<|endoftext|>", "<|padding|>", "<|end", "\r\n", "\u00a0", "it's", "e\u0301", "\x00", "def f(x):\n"]
    ),
)


@settings(max_examples=200)
@given(texts=st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=5))
def test_equal_ids_for_any_text(engines: list[Encode], texts: list[str]) -> None:
    found, expected = (encode(texts) for encode in engines)
    assert all(map(np.array_equal, found, expected))


def test_an_engine_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(["some words and some more words"], 280)
    assert fast_encoder(tokenizer, ["some words"])[0] is not None
    other = train_bpe(["an altogether different text"], 280).engine.to_str()
    monkeypatch.setattr("fastokens.Tokenizer", OtherVocabulary(other))
    assert fast_encoder(tokenizer, ["some words"]) == (None, "tokenizers, as fastokens gives other ids")


class OtherVocabulary:
    def __init__(self, json: str):
        import fastokens

        self.wrong = fastokens.Tokenizer.from_json_str(json)

    def from_json_str(self, json: str):
        return self.wrong


def test_where_no_engine_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    unigram = train_bpe(["a"], 280)
    unigram.engine = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)]))
    for tokenizer, why in [
        (load_tokenizer(TokenizerConfig(kind="bytes")), "own engine"),
        (unigram, "fastokens cannot read this tokenizer"),
    ]:
        encode, words = fast_encoder(tokenizer, ["some words"])
        assert encode is None and why in words
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert "pip install fastokens" in fast_encoder(train_bpe(["a"], 280), [])[1]

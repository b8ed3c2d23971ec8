import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.schema import TokenizerConfig
from castalia.data.tokenizer import RustTokenizer, load_tokenizer, train_bpe
from castalia.generate.text_stream import TextStream


def pieces(tokenizer, ids, stop=(), prompt=()):
    """All pieces, the last one from `finish`, until a stop string."""
    text = TextStream(tokenizer, list(prompt), stop)
    out = []
    for token in ids:
        out.append(text.push(token))
        if text.stopped:
            return out
    return [*out, text.finish()]


def test_characters_come_whole(tokenizer):
    given_out = pieces(tokenizer, "aé🙂".encode())
    assert given_out == ["a", "", "é", "", "", "", "🙂", ""]


def test_an_incomplete_character_at_the_end_is_not_lost(tokenizer):
    assert "".join(pieces(tokenizer, "x🙂".encode()[:-1])) == "x\ufffd"


@given(st.text(max_size=60), st.text(max_size=20))
def test_all_text_comes_out(tokenizer, text, prompt):
    assert "".join(pieces(tokenizer, text.encode(), prompt=prompt.encode())) == text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two. three", ["two"], "one. "),
        ("one. two. three", ["four", "three", "two"], "one. "),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no end\nhere", ["\n"], "no end"),
        ("one tw", ["two"], "one tw"),
        ("🙂🙃", ["🙃"], "🙂"),
    ],
)
def test_stop_strings(tokenizer, text, stop, expected):
    assert "".join(pieces(tokenizer, text.encode(), stop)) == expected


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_never_show(tokenizer, text, stop):
    ends = [at for at in map(text.find, stop) if at >= 0]
    shown = "".join(pieces(tokenizer, text.encode(), stop))
    assert not any(s in shown for s in stop)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown) and len(shown) >= min(ends) - 4


def with_turn(make):
    """A tokenizer with the special token <turn>, which `decode` leaves out."""
    engine = make().engine
    engine.add_special_tokens(["<turn>"])
    return RustTokenizer(engine)


@pytest.mark.parametrize(
    "make", [lambda: byte_level(300), lambda: byte_fallback()], ids=["byte-level", "byte fallback"]
)
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the cat<turn>the cat", "<turn>", "the cat"),
        ("the 猫<turn>the", "<turn>", "the 猫"),
        ("the 🙂<turn>\nthe", "<turn>\n", "the 🙂"),
        ("the cat cat<turn>the", "cat<turn>", "the cat "),
        ("the<turn> cat<turn>the", "cat<turn>", "the "),
        ("the<turn>cat the", "e c", "thecat the"),  # the text between has a token that is not shown
        ("the cat<tur", "<turn>", "the cat<tur"),
    ],
)
def test_stop_strings_may_spell_special_tokens(make, text, stop, expected):
    tokenizer = with_turn(make)
    (ids,) = tokenizer.encode_batch([text], bare=True)
    assert "".join(pieces(tokenizer, ids, [stop])).strip() == expected.strip()


def test_tokenizers_that_join_words():
    """SentencePiece drops the space in front of the first word that it decodes."""

    class Words:
        vocab_size, eod_id, end_ids, byte_ids, special_texts = 3, None, frozenset(), frozenset(), {}

        def decode(self, ids):
            return "".join(f" {'abc'[i]}" for i in ids)[1:]

    assert pieces(Words(), [1, 2], prompt=[0]) == [" b", " c", ""]


TEXTS = ["the cat sat on the mat", "猫はマットの上に座った 🙂🙃", "Käse ￿ \ufffd"] * 20
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(size):
    return train_bpe(TEXTS, size)


def byte_fallback():
    """Llama's: words with a mark for the space in front, and bytes for all else."""
    pieces = ["<s>", "</s>", *BYTE_PIECES, "▁", "▁the", "▁cat", "c", "猫", "<x>"]
    model = tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    engine = tokenizers.Tokenizer(model)
    names = tokenizers.decoders
    parts = [names.Replace("▁", " "), names.ByteFallback(), names.Fuse(), names.Strip(" ", 1, 0)]
    engine.decoder = names.Sequence(parts)
    engine.add_special_tokens(["<s>", "</s>"])
    engine.add_tokens(["<x>"])
    return RustTokenizer(engine)


def word_pieces():
    pieces = ["[UNK]", "cat", "##s", "the", "##猫", ".", ",", "n't", "do"]
    model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    engine = tokenizers.Tokenizer(model)
    engine.decoder = tokenizers.decoders.WordPiece()
    return RustTokenizer(engine)


def sentence_pieces(folder, added):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "m"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "m.model").rename(folder / "tokenizer.model")
    if added:
        (folder / "added_tokens.json").write_text('{"<x>": 301, "<y>": 302}')
    return load_tokenizer(TokenizerConfig(path=str(folder)))


KINDS = {
    "bytes": lambda folder: load_tokenizer(TokenizerConfig(kind="bytes")),
    "characters": lambda folder: load_tokenizer(TokenizerConfig(kind="char")),
    "byte-level, no merges": lambda folder: byte_level(257),
    "byte-level": lambda folder: byte_level(300),
    "byte fallback": lambda folder: byte_fallback(),
    "WordPiece": lambda folder: word_pieces(),
    "SentencePiece": lambda folder: sentence_pieces(folder, added=False),
    "SentencePiece with added tokens": lambda folder: sentence_pieces(folder, added=True),
}
PARTS = st.sampled_from(["猫", "🙂", "the cat", " ", "é", "\ufffd", "a", "마", "👩‍👩‍👧", "<x>"])


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("kind"))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(kind, data):
    """Of texts, of their tokens cut and put together anyhow, and of tokens at random, in one stream."""
    some = st.one_of(
        st.lists(PARTS, max_size=6).map("".join).map(kind.encode),
        st.lists(st.integers(0, kind.vocab_size - 1), max_size=12),
        st.sampled_from([[b] for b in sorted(kind.byte_ids)[0xE0:0xF0]]) if kind.byte_ids else st.just([]),
    )
    ids = data.draw(st.lists(some, max_size=6).map(lambda parts: sum(parts, [])))
    cut = data.draw(st.integers(0, len(ids)))
    whole = kind.decode(ids)
    assert "".join(pieces(kind, ids)) == whole
    before = kind.decode(ids[:cut])
    if whole.startswith(before) and not before.endswith("\ufffd"):
        assert before + "".join(pieces(kind, ids[cut:], prompt=ids[:cut])) == whole


@settings(max_examples=50, deadline=None)
@given(text=st.lists(PARTS, max_size=40).map("".join))
def test_certain_text_is_not_held_back(text):
    kind, shown = byte_level(257), ""
    stream = TextStream(kind, [], ())
    for number, token in enumerate(ids := kind.encode(text), start=1):
        shown += stream.push(token)
        assert len(kind.decode(ids[:number])) - len(shown) <= 1
    assert shown + stream.finish() == kind.decode(ids)

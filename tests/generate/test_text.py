import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.generate.text import TextStream


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


def test_tokenizers_that_join_words():
    """SentencePiece drops the space in front of the first word that it decodes."""

    class Words:
        vocab_size, eod_id = 3, None

        def decode(self, ids):
            return "".join(f" {'abc'[i]}" for i in ids)[1:]

    assert pieces(Words(), [1, 2], prompt=[0]) == [" b", " c", ""]

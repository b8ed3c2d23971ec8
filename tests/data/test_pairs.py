from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castalia.config.schema import Source
from castalia.data.indexed import Writer
from castalia.data.pairs import open_pairs
from castalia.errors import DataError


def corpus(prefix: Path, items: list[list[int]], labels: list[list[int]] | None = None) -> Source:
    for name, content in ((prefix, items), (Path(f"{prefix}_label"), labels)):
        if content is not None:
            with Writer(name, "i4") as writer:
                for item in content:
                    writer.add(item)
    return Source(path=str(prefix), labels=f"{prefix}_label" if labels is not None else None)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=8),
    st.sampled_from(["unpacked", "pack_until_overflow"]),
    st.integers(0, 99),
)
def test_both_sides_hold_the_same_pairs(tmp_path_factory, lengths: list[tuple[int, int]], packing, seed: int) -> None:
    """Preferred texts are 10, 20, ... repeated, rejected ones 1 more, so that each token tells its pair."""
    folder = tmp_path_factory.mktemp("x")
    pos = corpus(folder / "pos", [[10 * (i + 1)] * a for i, (a, _) in enumerate(lengths)])
    neg = corpus(folder / "neg", [[10 * (i + 1) + 1] * b for i, (_, b) in enumerate(lengths)])
    pairs = open_pairs(pos, neg, 12, seq_length=15, seed=seed, packing=packing)
    assert len(pairs) == 11
    for position in range(len(pairs)):
        pair = pairs[position]
        assert all(side.shape == (16,) and side.dtype == np.int64 for side in pair)
        # The last piece is one foreign token, which a full sample has no room for.
        own = [list(dict.fromkeys(side[side > 0].tolist()))[:-1] for side in (pair.pos, pair.neg)]
        mates = [token + 1 for token in own[0]]
        shared = min(len(mates), len(own[1]))
        assert mates[:shared] == own[1][:shared] and abs(len(mates) - len(own[1])) <= 1
        if packing == "pack_until_overflow":
            longer = [max(lengths[token // 10 - 1]) for token in own[0]]
            assert sum(longer) <= 16
        for text, label in ((pair.pos, pair.pos_label), (pair.neg, pair.neg_label)):
            assert np.array_equal(label, np.where(text > 0, text, -100))


def test_a_pair_needs_an_answer_on_both_sides(tmp_path: Path) -> None:
    texts, masked = [[1, 2], [3, 4], [5, 6]], [-100, -100]
    pos = corpus(tmp_path / "pos", texts, [[-100, 2], masked, [-100, 6]])
    neg = corpus(tmp_path / "neg", [[1, 7], [3, 8], [5, 9]], [[-100, 7], [-100, 8], masked])
    pairs = open_pairs(pos, neg, 4, seq_length=4, seed=1)
    assert {int(pairs[i].pos[0]) for i in range(len(pairs))} == {1}
    assert pairs[0].neg_label[:2].tolist() == [-100, 7]


def test_pairs_that_do_not_match(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pos, neg = corpus(tmp_path / "pos", [[1], [2]]), corpus(tmp_path / "neg", [[1]])
    with pytest.raises(DataError, match="holds 2 texts and .* 1: each preferred text needs"):
        open_pairs(pos, neg, 4, seq_length=4, seed=1)
    open_pairs(pos, corpus(tmp_path / "other", [[1], [3]]), 4, seq_length=4, seed=1)
    assert "1 of 2 pairs have equal sides" in caplog.text
    long = corpus(tmp_path / "long", [[1] * 9])
    with pytest.raises(DataError, match="no document can be trained on"):
        open_pairs(long, corpus(tmp_path / "short", [[2]]), 4, seq_length=4, seed=1, allow_chopped=False)

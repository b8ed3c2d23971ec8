import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.load import load_config
from castalia.config.schema import RunConfig, Source, Text
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.pairs import open_pairs, open_samples
from castalia.errors import ConfigError, DataError


def corpus(prefix: Path, items: list[list[float]], dtype: str = "i4") -> str:
    with DatasetWriter(prefix, dtype) as writer:
        for item in items:
            writer.add(item)
    return str(prefix)


def text(prefix: Path, items: list[list[int]], labels: list[list[int]] | None = None) -> Text:
    return Text(path=corpus(prefix, items), labels=labels and corpus(Path(f"{prefix}_label"), labels))


def run(pos: Text, neg: Text | None = None, *, rewards: str | None = None, seq_length: int = 4, **others) -> RunConfig:
    """A config of 3 steps of 4 pairs, or of judged texts."""
    source = Source(**pos.model_dump(), rejected=neg, rewards=rewards)
    values = {
        "train": {"objective": "dpo" if neg else "kto", "steps": 3, "batch_size": 4},
        "data": {"train": [source.model_dump()], "packing": "unpacked", "seq_length": seq_length} | others,
    }
    return load_config([values])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=2, max_size=8), st.integers(1, 99))
def test_both_sides_hold_the_same_pairs(tmp_path_factory, lengths: list[tuple[int, int]], seed: int) -> None:
    """Preferred texts are 10, 20, ... repeated, rejected ones 1 more, so that each token tells its pair."""
    folder = tmp_path_factory.mktemp("x")
    pos = text(folder / "pos", [[10 * (i + 1)] * a for i, (a, _) in enumerate(lengths)])
    neg = text(folder / "neg", [[10 * (i + 1) + 1] * b for i, (_, b) in enumerate(lengths)])
    config = run(pos, neg, seq_length=15).model_copy(update={"seed": seed})
    pairs = open_pairs(config)
    seen = set()
    for step in range(3):
        batch = pairs.batch(step)
        assert batch.tokens.shape == (8, 15) and batch.tokens.dtype == np.int64
        for chosen, rejected in zip(batch.tokens[0::2], batch.tokens[1::2], strict=True):
            pair = int(chosen[0]) // 10
            seen.add(pair)
            for side, tokens, length in zip((0, 1), (chosen, rejected), lengths[pair - 1], strict=True):
                # its own tokens and nothing of the next text; the last token is only predicted
                assert np.array_equal(tokens[:length], [10 * pair + side] * length) and not tokens[length:].any()
        assert np.array_equal(batch.labels != -100, np.arange(1, 16) < (batch.tokens > 0).sum(1, keepdims=True))
        part = pairs.batch(step, [1, 3])
        assert np.array_equal(part.tokens, batch.tokens[[2, 3, 6, 7]])
    assert len(seen) >= min(len(lengths), 4) and pairs.fingerprint == open_pairs(config).fingerprint


def test_a_pair_needs_an_answer_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts, masked = [[1, 2], [3, 4], [5, 6]], [-100, -100]
    pos = text(tmp_path / "pos", texts, [[-100, 2], masked, [-100, 6]])
    neg = text(tmp_path / "neg", [[1, 7], [3, 8], [5, 9]], [[-100, 7], [-100, 8], masked])
    batch = open_pairs(run(pos, neg)).batch(0)
    assert set(batch.tokens[:, 0].tolist()) == {1}
    assert batch.labels[:2].tolist() == [[2, -100, -100, -100], [7, -100, -100, -100]]
    assert caplog.text.count("of 3 documents 1 are left out") == 2  # labels that lie beyond the context count, too


def test_pairs_that_do_not_match(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pos, neg = text(tmp_path / "pos", [[1, 1], [2, 2]]), text(tmp_path / "neg", [[1, 1]])
    with pytest.raises(DataError, match="holds 2 texts and .* 1: each preferred text needs"):
        open_pairs(run(pos, neg))
    open_pairs(run(pos, text(tmp_path / "other", [[1, 1], [3, 3]])))
    assert "1 of 2 pairs of" in caplog.text and "have equal sides" in caplog.text
    long, short = text(tmp_path / "long", [[1] * 9]), text(tmp_path / "short", [[2] * 3])
    with pytest.raises(DataError, match="no document can be trained on"):
        open_pairs(run(long, short, allow_chopped=False))
    open_pairs(run(long, short))
    assert "1 are cut there" in caplog.text


def test_references_are_summed_where_labels_count(tmp_path: Path) -> None:
    """Number t of the stored ones belongs to token t + 1."""
    pos = text(tmp_path / "pos", [[1, 2, 3]], [[-100, 2, 3]])
    neg = text(tmp_path / "neg", [[1, 4, 5, 6]], [[-100, -100, 5, 6]])
    stored = {
        side: corpus(tmp_path / f"{side}_ref", [values], "float32")
        for side, values in (("pos", [-1.0, -2.0, 9.0]), ("neg", [-4.0, -8.0, -16.0, 9.0]))
    }
    pairs = open_pairs(run(*(t.model_copy(update={"references": stored[s]}) for s, t in (("pos", pos), ("neg", neg)))))
    batch = pairs.batch(0)
    assert batch.references is not None and batch.references[:2].tolist() == [-3.0, -24.0]
    wrong = pos.model_copy(update={"references": stored["neg"]})
    with pytest.raises(DataError, match="as many references as tokens"):
        open_pairs(run(wrong, neg))


def test_judged_texts(tmp_path: Path) -> None:
    texts = text(tmp_path / "x", [[1, 2], [3, 4]], [[-100, 2], [-100, 4]])
    rewards = corpus(tmp_path / "rewards", [[1], [-1]])
    batch = open_samples(run(texts, rewards=rewards)).batch(0)
    assert batch.rewards is not None and set(batch.rewards.tolist()) == {1.0, -1.0}
    assert np.array_equal(batch.rewards > 0, batch.tokens[:, 0] == 1)
    assert not batch.tokens[:, 2:].any()
    with pytest.raises(DataError, match="hold 1 items for the 2 documents"):
        open_samples(run(texts, rewards=corpus(tmp_path / "few", [[1]])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.packing=packed"], "data.packing=packed puts several into one sample; set data.packing=unpacked"),
        (['data.train=["a"]'], "needs `rejected` in every source"),
        (["train.objective=kto"], "needs `rewards` in every source"),
        (["train.objective=kto", "train.micro_batch_size=1"], "set train.micro_batch_size to 2 or more"),
        (["parallel.pp=2"], "set parallel.pp=1"),
        (["parallel.cp=2"], "set parallel.cp=1"),
        (["data.path=a"], "a single data.path has neither pairs nor rewards"),
        (['finetune.add_tokens=["<x>"]'], "a reference model, which knows no token of finetune.add_tokens"),
        (["neox_exact=true"], "neox_exact covers train.objective=causal alone"),
    ],
)
def test_what_preference_tuning_cannot_do_is_refused_by_name(changes: list[str], message: str) -> None:
    source = json.dumps([{"path": "a", "rejected": "b"}])
    words = ["train.objective=dpo", f"data.train={source}", "data.packing=unpacked", "train.batch_size=4", *changes]
    with pytest.raises(ConfigError, match=message):
        load_config([], words)

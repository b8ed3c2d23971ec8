from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from castalia.config.schema import TokenizerConfig
from castalia.data.config_corpora import batch_at
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import ConfigError, DataError
from castalia.loading import build_model
from castalia.series.members import find_series
from castalia.series.memorise import Panel, judge_panel, memorised, panel_of, panel_of_corpus, panel_of_run

LEARNT = ("train.steps=200", "checkpoint.every=100", "optimizer.lr=0.01", "data.split=100,0,0")
PROMPT, LENGTH = 5, 12


@pytest.fixture(scope="module")
def learnt(trained, tmp_path_factory):
    """A run that reads the same eight sequences again and again, until it knows some of them by heart."""
    prefix = tmp_path_factory.mktemp("few") / "few"
    draw = np.random.default_rng(3)
    with DatasetWriter(prefix, "uint16") as writer:
        for _ in range(8):
            writer.add(draw.integers(97, 117, 17).tolist())
    return trained(*LEARNT, f"data.path={prefix}", "schedule.style=constant")


def decoded(model, prompt: list[int], count: int, vocabulary: int) -> list[int]:
    """Plain greedy decoding: the whole text through the model for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :vocabulary].argmax()))
    return ids[len(prompt) :]


def test_one_pass_tells_what_greedy_decoding_gives(learnt):
    member = find_series([learnt])[-1]
    checkpoint = member.open()
    assert checkpoint.config is not None
    panel = panel_of_run(checkpoint.config, [(1, 4)], PROMPT, LENGTH)
    model = build_model(checkpoint)
    with torch.no_grad():
        rows = judge_panel(model, panel, 257)
        for row, tokens in zip(rows, panel.tokens.tolist(), strict=True):
            expected = tokens[PROMPT:]
            greedy = decoded(model, tokens[:PROMPT], len(expected), 257)
            assert row["extractable"] == (greedy == expected)
            right = next((n for n, pair in enumerate(zip(greedy, expected, strict=True)) if pair[0] != pair[1]), 7)
            assert row["reproduced"] == pytest.approx(right / 7)
            logits = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
            nll = -sum(float(logits[at - 1, tokens[at]]) for at in range(PROMPT, LENGTH))
            assert row["nll"] == pytest.approx(nll, rel=1e-4)
    found = [row["extractable"] for row in rows]
    assert any(found) and not all(found)
    assert np.mean([row["z"] for row in rows]) == pytest.approx(0, abs=1e-6)


def test_the_sequences_of_a_step_are_those_it_trains_on(learnt):
    config = find_series([learnt])[-1].open().config
    assert config is not None
    panel = panel_of_run(config, [(3, 4)], PROMPT, LENGTH)
    assert panel.seen == (3,) * 8 + (4,) * 8
    assert (panel.tokens[:8] == batch_at(config, 3).tokens[:, :LENGTH]).all()
    with pytest.raises(ConfigError, match="need 99 tokens; sequences have 16"):
        panel_of_run(config, [(1, 1)], 9, 99)


def test_what_was_read_is_known_better_than_what_was_not(learnt, tmp_path):
    members = find_series([learnt], "0,100..")
    config = members[-1].open().config
    assert config is not None
    read = panel_of_run(config, [(1, 1)], PROMPT, LENGTH).tokens
    other = np.random.default_rng(9).integers(97, 117, read.shape)
    panel = Panel(np.concatenate([read, other]), (1,) * 8 + (None,) * 8, PROMPT)
    settings = {"device": torch.device("cpu"), "dtype": torch.float32, "vocabulary": 257}
    rows = memorised(members, panel, tmp_path / "m.csv", **settings)
    assert [row["seen"] for row in rows[:8]] == [False] * 8  # step 0
    last = [row for row in rows if row["step"] == 200]
    assert max(row["z"] for row in last[:8]) < min(row["z"] for row in last[8:])
    assert all(row["seen"] for row in last[:8]) and last[8]["seen"] is None


def test_rows_in_the_order_of_training_tell_the_step_that_saw_them(tmp_path):
    with DatasetWriter(tmp_path / "rows", "uint16") as writer:
        for number in range(12):
            writer.add([number] * 9)
    panel = panel_of_corpus(str(tmp_path / "rows"), [(2, 2)], 4, 3, 8)
    assert panel.tokens[:, 0].tolist() == [4, 5, 6, 7] and panel.seen == (2,) * 4
    assert panel_of_corpus(str(tmp_path / "rows"), None, None, 3, 8).seen == (None,) * 12
    with pytest.raises(ConfigError, match="--batch-size"):
        panel_of_corpus(str(tmp_path / "rows"), [(2, 2)], None, 3, 8)
    with pytest.raises(DataError, match="do not have 20 tokens"):
        panel_of_corpus(str(tmp_path / "rows"), None, 4, 10, 20)


def test_a_panel_of_records(learnt, tmp_path):
    file = tmp_path / "panel.jsonl"
    records = [{"tokens": list(range(20)), "step": 7}, {"text": "the light was good"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    checkpoint = find_series([learnt])[-1].open()
    tokenizer = load_tokenizer(TokenizerConfig(kind="bytes"))
    panel = panel_of(checkpoint, None, file, None, None, tokenizer, PROMPT, LENGTH)
    assert panel.tokens.tolist() == [list(range(12)), list(b"the light was good"[:12])]
    assert panel.seen == (7, None)
    file.write_text('{"text": "short"}\n')
    with pytest.raises(DataError, match="line 1: no `tokens` or `text` of at least 12 tokens"):
        panel_of(checkpoint, None, file, None, None, tokenizer, PROMPT, LENGTH)
    corpus = checkpoint.config.data.path if checkpoint.config else None
    whole = panel_of(checkpoint, corpus, None, None, None, None, PROMPT, LENGTH)
    assert len(whole.tokens) == 8 and whole.seen == tuple([1] * 8)  # rows of one length, a batch of eight
    with pytest.raises(ConfigError, match=r"--steps A..B"):
        panel_of(checkpoint, None, None, None, None, None, PROMPT, LENGTH)

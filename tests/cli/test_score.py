"""`castalia score` and `generate --best-of` beside transformers' reward models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from castalia.cli.generate import command as generate
from castalia.cli.score import command as score
from castalia.errors import CastaliaError
from castalia.language_model import load_model
from tests.cli.chat_model import LESSONS, conversation, make_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("scored") / "model")


@pytest.fixture(scope="module")
def reward(model: Path, tmp_path_factory) -> Path:
    torch.manual_seed(2)
    place = tmp_path_factory.mktemp("reward") / "model"
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    judge.score.weight.data.normal_()
    judge.save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


def rewards(reward: Path, texts: list[str]) -> list[float]:
    """By transformers, of texts that end as TRL lets them end."""
    words, judge = AutoTokenizer.from_pretrained(reward), AutoModelForSequenceClassification.from_pretrained(reward)
    with torch.no_grad():
        return [judge(**words(text, return_tensors="pt")).logits.item() for text in texts]


def scores(model: Path, tmp_path: Path, records: list[dict]) -> list[dict]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    score(str(model), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    score(str(model), tmp_path / "in.jsonl", tmp_path / "streamed.jsonl", memory="1GB")
    assert (tmp_path / "streamed.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_texts_and_conversations_get_the_rewards_of_transformers(reward, tmp_path):
    texts = list(LESSONS.values())
    found = scores(reward, tmp_path, [{"text": text, "id": n} for n, text in enumerate(texts)])
    assert [record["id"] for record in found] == [0, 1]
    assert [record["score"] for record in found] == pytest.approx(
        rewards(reward, [t + "<|im_end|>" for t in texts]), abs=1e-4
    )
    words = AutoTokenizer.from_pretrained(reward)
    whole = words.apply_chat_template(conversation(2), tokenize=False)
    (found,) = scores(reward, tmp_path, [{"messages": conversation(2)}])
    assert found["score"] == pytest.approx(rewards(reward, [whole])[0], abs=1e-4)


def test_pairs_get_two_scores_and_language_models_give_log_probabilities(reward, model, tmp_path):
    pair = {"prompt": "Who was", "chosen": " the first?", "rejected": " the ark?"}
    (found,) = scores(reward, tmp_path, [pair])
    expected = rewards(reward, [pair["prompt"] + pair[side] + "<|im_end|>" for side in ("chosen", "rejected")])
    assert [found["chosen_score"], found["rejected_score"]] == pytest.approx(expected, abs=1e-4)
    (found,) = scores(model, tmp_path, [{"messages": conversation(2)}])
    assert found["tokens"] > 5 and -20 < found["logprob"] < 0


def test_strings_that_see_no_template_are_told(model, tmp_path, capsys):
    pair = {"prompt": "Who was", "completion": " the first?"}
    for record, told in ((pair, True), ({"messages": conversation(1)}, False), ({"text": "Adam"}, False)):
        scores(model, tmp_path, [record])
        assert ("taken as one text" in capsys.readouterr().err) == told
    score(str(model), tmp_path / "in.jsonl", tmp_path / "turns.jsonl", chat_template=model)
    assert "taken as one text" not in capsys.readouterr().err


def test_the_best_of_several_is_the_one_with_the_highest_reward(reward, model, capsys):
    prompts = ["Who was", "And who"]
    generate(str(model), prompt=prompts, best_of=4, judge=str(reward), temperature=2.0, max_tokens=6, as_json=True)
    found = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    written = load_model(model).generate(prompts, num_samples=4, temperature=2.0, max_tokens=6)
    for number, prompt in enumerate(prompts):
        texts = written[4 * number : 4 * number + 4]
        assert len(set(texts)) > 1
        judged = rewards(reward, [prompt + text + "<|im_end|>" for text in texts])
        assert found[number] == texts[int(np.argmax(judged))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_of": 3}, "go together"),
        ({"best_of": 3, "judge": "x"}, "texts that differ"),
        ({"best_of": 3, "judge": "x", "temperature": 1.0, "num_samples": 2}, "--best-of excludes"),
        ({"best_of": 3, "judge": "itself", "temperature": 1.0, "max_tokens": 2}, "is no reward model"),
    ],
)
def test_mistakes_are_one_message(model, options, message):
    judge = {"judge": str(model)} if options.get("judge") == "itself" else {}
    with pytest.raises(CastaliaError, match=message):
        generate(str(model), prompt=["Who"], **options | judge)

"""`castalia eval` on answers and preferences: what training gave, and what transformers gives."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.convert import command as convert
from castalia.cli.evaluate import command
from castalia.cli.finetune import command as finetune
from castalia.cli.score import command as score
from castalia.cli.train import train
from castalia.config.load import load_config, load_run
from castalia.config.schema import TokenizerConfig
from castalia.data.chat import chat_of
from castalia.data.pairs import open_samples
from castalia.data.prepare import Recipe, prepare
from castalia.data.tokenizer import load_tokenizer
from castalia.errors import CastaliaError, ConfigError
from castalia.train import evaluation
from castalia.train.evaluation import EvaluationOptions, evaluate_checkpoint
from tests.cli.chat_model import LESSONS, SYSTEM, make_chat_model

SAID = list(LESSONS.values())


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{list(LESSONS)[number % 2]} {number}"}]


def answer(number: int, right: bool = True) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": SAID[(number + (not right)) % 2]}]


def lines(file: Path, records: list) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model; conversations, pairs and judged answers as files and as corpora."""
    place = tmp_path_factory.mktemp("judged")
    make_chat_model(place / "model")
    lines(place / "chats.jsonl", [{"messages": question(n) + answer(n)} for n in range(9)])
    pairs = [{"prompt": question(n), "chosen": answer(n, n != 3), "rejected": answer(n, n == 3)} for n in range(9)]
    lines(place / "pairs.jsonl", pairs)
    judged = [{"prompt": question(n), "completion": answer(n, n % 3 > 0), "label": n % 3 > 0} for n in range(9)]
    lines(place / "judged.jsonl", judged)
    words = TokenizerConfig(path=str(place / "model"))
    chat = chat_of(load_tokenizer(words))
    for name, kind, keys in (("chats", "answer", ("answer",)), ("pairs", "pair", ("chosen", "rejected"))):
        prepare([place / f"{name}.jsonl"], place / name, Recipe(words, keys, chat=chat, kind=kind))
    prepare(
        [place / "judged.jsonl"], place / "judged", Recipe(words, ("answer",), chat=chat, kind="judged", reward="label")
    )
    return place


def source(folder: Path, name: str, key: str = "answer", **others: object) -> dict:
    corpus = f"{folder / name}_{key}"
    return {"path": f"{corpus}_document", "labels": f"{corpus}_label_document", **others}


def trained(folder: Path, run: Path, data: dict, **keys: object) -> Path:
    """A run of a few steps on the data, which it is also judged by."""
    given = {
        "checkpoint": {"init_from": str(folder / "model"), "dir": str(run)},
        "tokenizer": {"path": str(folder / "model")},
        "data": {"train": [data], "valid": [data], "packing": "unpacked", "seq_length": 120},
        "train": {"steps": 3, "batch_size": 4, "objective": "causal", **keys},
        "eval": {"every": 3, "batches": None},
        "optimizer": {"lr": 1e-3},
        "precision": {"compute": "fp32"},
        "log": {"peak_tflops": 0.1},
    }
    return Path(train(load_config([given])))


def recorded(run: Path) -> dict[str, float]:
    """The last evaluation of the training."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {name.removeprefix("valid_"): value for name, value in last.items() if name.startswith("valid_")}


@pytest.fixture
def judge(capsys: pytest.CaptureFixture[str]):
    def call(path: Path, **options: object) -> dict:
        capsys.readouterr()
        command(str(path), ["precision.compute=fp32"], as_json=True, **options)
        return json.loads(capsys.readouterr().out)

    return call


def losses_of_transformers(model: Path, conversations: list[list[dict]], role: str | None) -> torch.Tensor:
    """Of each token of the conversations; with a `role`, of its turns alone, with what ends them."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    found = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            losses = F.cross_entropy(network(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        found.append(losses[len(asked) - 1 if role else 0 :])
    return torch.cat(found)


def test_a_run_on_answers_gives_what_its_training_gave(folder, judge, tmp_path):
    run = trained(folder, tmp_path / "run", source(folder, "chats"))
    own, of_file = judge(run), judge(run, data=str(folder / "chats.jsonl"))
    assert own["loss"] == pytest.approx(recorded(run)["loss"], rel=1e-5)
    assert of_file["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert of_file["tokens"] == own["tokens"] and of_file["records"] == 9
    both = judge(run, on="all")
    assert both["loss"] == own["loss"] and both["tokens_on_all"] > 2 * both["tokens"]


def test_answers_of_any_model_are_judged_as_transformers_computes(folder, judge):
    conversations = [question(n) + answer(n) for n in range(9)]
    found = judge(folder / "model", data=str(folder / "chats.jsonl"), on="all")
    for name, role in (("", "assistant"), ("_on_all", None)):
        losses = losses_of_transformers(folder / "model", conversations, role)
        assert found[f"tokens{name}"] == len(losses)
        assert found[f"loss{name}"] == pytest.approx(losses.mean().item(), rel=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "reward", "orpo"])
def test_a_run_on_pairs_gives_what_its_training_gave(folder, judge, tmp_path, objective):
    data = source(folder, "pairs", "chosen", rejected=source(folder, "pairs", "rejected"))
    run = trained(folder, tmp_path / "run", data, objective=objective)
    expected, found = recorded(run), judge(run)
    assert {"loss", "accuracy", "margin"} <= expected.keys()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    of_file = judge(run, data=str(folder / "pairs.jsonl"))
    assert of_file["records"] == 9 and of_file["kind"] == "pairs"
    if objective != "reward":  # which is read at the last token of a file's texts, and here where the labels end
        assert {name: of_file[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_run_on_judged_answers_gives_what_its_training_gave(folder, judge, tmp_path):
    data = source(folder, "judged", rewards=f"{folder / 'judged'}_answer_reward_document")
    run = trained(folder, tmp_path / "run", data, objective="kto")
    expected, found = recorded(run), judge(run)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 <= judge(run, data=str(folder / "judged.jsonl"))["accuracy"] <= 1


def test_pairs_are_judged_by_any_model(folder, judge):
    sums = {
        right: [
            -losses_of_transformers(folder / "model", [question(n) + answer(n, right)], "assistant").sum().item()
            for n in range(9)
        ]
        for right in (True, False)
    }
    margins = np.array([(sums[n != 3][n] - sums[n == 3][n]) for n in range(9)])
    found = judge(folder / "model", data=str(folder / "pairs.jsonl"))
    assert found["accuracy"] == pytest.approx((margins > 0).mean())
    assert found["margin"] == pytest.approx(margins.mean(), rel=1e-3)
    assert "loss" not in found


@pytest.fixture(scope="module")
def reward(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of transformers, with the tokenizer of the chat model."""
    torch.manual_seed(2)
    place = tmp_path_factory.mktemp("reward") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(place)
    return place


def rewards_of_transformers(place: Path, conversations: list[list[dict]]) -> np.ndarray:
    tokenizer, model = (kind.from_pretrained(place) for kind in (AutoTokenizer, AutoModelForSequenceClassification))
    asked = tokenizer.apply_chat_template(conversations, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model(**asked).logits[:, 0].numpy()


@pytest.mark.parametrize("form", ["messages", "strings"])
def test_a_reward_model_is_trained_where_it_is_judged(folder, reward, judge, tmp_path, form):
    """Training, score, eval and the export read the reward at the token at which transformers reads it."""
    file = folder / "pairs.jsonl"
    if form == "strings":
        records = [{"prompt": f"Who {n}?", "chosen": f" Adam was{'.' * n}", "rejected": f" Noah {n}"} for n in range(9)]
        file = lines(tmp_path / "strings.jsonl", records)
    run = tmp_path / "run"
    words = [str(file), f"data.valid={file}", f"checkpoint.dir={run}", "train.steps=1", "train.batch_size=9"]
    words += ["optimizer.lr=1e-3", "precision.compute=fp32", "log.peak_tflops=0.1"]
    finetune(str(reward), words, objective="reward", full=True)

    def of_transformers(model: Path) -> np.ndarray:
        tokenizer, network = (
            kind.from_pretrained(model) for kind in (AutoTokenizer, AutoModelForSequenceClassification)
        )
        found = []
        for record in map(json.loads, file.read_text().splitlines()):
            for side in ("chosen", "rejected"):
                said = record["prompt"] + record[side]
                text = said + "<|im_end|>" if form == "strings" else tokenizer.apply_chat_template(said, tokenize=False)
                with torch.no_grad():
                    found.append(network(**tokenizer(text, return_tensors="pt")).logits.item())
        return np.array(found).reshape(-1, 2)

    def loss(rewards: np.ndarray) -> float:
        return float(np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean())

    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    chosen = open_samples(load_run(run)).chosen
    taken = [chosen.pieces(int(at))[0].document for at in chosen.positions(0)]
    assert first["loss"] == pytest.approx(loss(of_transformers(reward)[taken]), rel=1e-5)
    convert(str(run), tmp_path / "hf", to="hf")
    expected = of_transformers(tmp_path / "hf")
    assert expected.tolist() != of_transformers(reward).tolist()
    assert recorded(run)["loss"] == pytest.approx(loss(expected), rel=1e-5)
    for place in (run, tmp_path / "hf"):
        found = judge(place, data=str(file))
        assert found["margin"] == pytest.approx((expected[:, 0] - expected[:, 1]).mean(), rel=1e-4)
    assert judge(run)["margin"] == pytest.approx(found["margin"], rel=1e-5)
    score(str(run), file, tmp_path / "scores.jsonl")
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    values = [[each["chosen_score"], each["rejected_score"]] for each in scores]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_a_reward_model_is_judged_by_pairs_as_transformers_computes(folder, reward, judge):
    sides = [
        rewards_of_transformers(reward, [question(n) + answer(n, right == (n != 3)) for n in range(9)])
        for right in (True, False)
    ]
    found = judge(reward, data=str(folder / "pairs.jsonl"))
    assert found["accuracy"] == pytest.approx((sides[0] > sides[1]).mean())
    assert found["margin"] == pytest.approx((sides[0] - sides[1]).mean(), rel=1e-3)
    assert "uniform_loss" not in found
    judged = judge(reward, data=str(folder / "judged.jsonl"))
    values = rewards_of_transformers(reward, [question(n) + answer(n, n % 3 > 0) for n in range(9)])
    wanted = np.arange(9) % 3 > 0
    assert judged["wanted"] == pytest.approx(values[wanted].mean(), rel=1e-3)
    assert judged["accuracy"] == pytest.approx((values[wanted][:, None] > values[~wanted]).mean())


def test_prompts_with_references_are_judged_by_their_references(folder, judge, tmp_path):
    records = [{"prompt": "Who was the", "reference": " first?"}, {"question": "And who", "answer": " built it?"}]
    file = lines(tmp_path / "references.jsonl", records)
    found = judge(folder / "model", data=str(file))
    assert found["records"] == 2 and found["kind"] == "answers"
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    losses = []
    for prompt, said in map(dict.values, records):
        ids = tokenizer(prompt + said + "<|im_end|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            every = F.cross_entropy(network(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        both = zip(tokenizer(prompt)["input_ids"], ids[0].tolist(), strict=False)
        alike = takewhile(lambda pair: pair[0] == pair[1], both)
        losses.append(every[len(list(alike)) - 1 :])
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"body": "x"}], {}, "body"),
        ([{"text": "x y"}], {"on": "all"}, "--on is for data with answers"),
        ([{"prompt": "a", "completion": "b"}], {"stride": 2}, "each judged by itself: --stride is for streams of text"),
        ([{"prompt": "a", "completion": "b"}, {"text": "c"}], {}, ":2: a text among records that are an answer"),
        ([{"prompt": "a", "completion": "b", "label": True}], {}, "all answers have the same label"),
        ([{"prompt": "a " * 300, "completion": "b"}], {}, "nothing is left to judge by"),
    ],
)
def test_mistakes_are_one_message(folder, judge, tmp_path, records, options, message):
    with pytest.raises(CastaliaError, match=message):
        judge(folder / "model", data=str(lines(tmp_path / "x.jsonl", records)), **options)


def test_answers_tell_a_reward_model_nothing(folder, reward, judge):
    with pytest.raises(CastaliaError, match="castalia score rates them"):
        judge(reward, data=str(folder / "chats.jsonl"))


def test_memory_for_answers_on_several_processes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, all of the model would be in memory whatever it says."""
    monkeypatch.setattr(evaluation, "world_size", lambda: 2)
    options = EvaluationOptions(data=str(folder / "chats.jsonl"), memory=10**9)
    with pytest.raises(ConfigError, match="--memory streams the model for answers on one process"):
        evaluate_checkpoint(open_checkpoint(folder / "model"), options)

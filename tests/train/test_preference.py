"""Preference tuning as a run: what it learns, that it is resumed bit for bit, and where its reference comes from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.evaluate import command as evaluate
from castalia.config.load import load_config, load_run
from castalia.data.dataset_writer import DatasetWriter
from castalia.errors import ConfigError
from castalia.examine.facts import from_tensors
from castalia.language_model import load_model
from castalia.observe.metrics import read_metrics
from castalia.train.dry_run import rehearse
from castalia.train.loop import train
from castalia.train.setup import start
from castalia.tune.replay import replay
from tests.train.conftest import MODEL

ALPHABET, EOD = 97, 256
STEPS = 6


def write(prefix: Path, items: list, dtype: str = "int32") -> str:
    with DatasetWriter(prefix, dtype) as writer:
        for item in items:
            writer.add(item)
    return str(prefix)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """40 questions with an answer that climbs the alphabet and one that stays where it is, of unequal lengths."""
    folder, draw = tmp_path_factory.mktemp("pairs"), np.random.default_rng(1)
    sides: dict[str, list] = {"pos": [], "neg": []}
    for _ in range(40):
        first = ALPHABET + int(draw.integers(10))
        for side, step in (("pos", 1), ("neg", 0)):
            answer = first + step * np.arange(1, 1 + draw.integers(3, 7))
            sides[side].append([63, first, *answer.tolist(), EOD])
    source = {}
    for side, texts in sides.items():
        labels = [[-100, -100, *text[2:]] for text in texts]
        source[side] = {"path": write(folder / side, texts), "labels": write(folder / f"{side}_label", labels)}
    rewards = write(folder / "rewards", [[1] if i % 2 else [-1] for i in range(40)])
    both = {**source["pos"], "rejected": source["neg"]}
    mixed = [sides["pos" if i % 2 else "neg"][i] for i in range(40)]
    labels = [[-100, -100, *text[2:]] for text in mixed]
    judged = {
        "path": write(folder / "mixed", mixed),
        "labels": write(folder / "mixed_label", labels),
        "rewards": rewards,
    }
    return {"dpo": both, "orpo": both, "reward": both, "kto": judged}


@pytest.fixture(scope="module")
def base(pairs, tmp_path_factory) -> Path:
    """A run of two steps on the preferred texts: a language model to begin from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    source = {name: pairs["dpo"][name] for name in ("path", "labels")}
    words = ["data.seq_length=12", "tokenizer.kind=bytes", "precision.compute=fp32", "train.steps=2"]
    words += [f"data.train={json.dumps([source])}", "data.packing=unpacked", "train.batch_size=8"]
    return train(load_config([], [*MODEL, *words, f"checkpoint.dir={folder}"]))


@pytest.fixture(scope="module")
def config(pairs, base):
    """A function: objective, folder of the run and overrides -> config of a run that begins from `base`."""

    def make(objective: str, folder: Path, *overrides: str):
        source = json.dumps([pairs[objective]])
        return load_config(
            [],
            [
                *(f"train.objective={objective}", f"data.train={source}", f"data.valid={source}"),
                *("data.packing=unpacked", "data.seq_length=12", "tokenizer.kind=bytes", "precision.compute=fp32"),
                *(f"train.steps={STEPS}", "train.batch_size=8", "train.micro_batch_size=4", "optimizer.lr=0.01"),
                *("eval.every=3", "eval.batches=1", "log.peak_tflops=0.1", f"checkpoint.init_from={base}"),
                *(f"checkpoint.dir={folder}", *overrides),
            ],
        )

    return make


def history(run: Path) -> list[dict]:
    """Metrics without what depends on the machine."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in read_metrics(run)]


def log_probability(model: torch.nn.Module, text: list[int], labels: list[int]) -> torch.Tensor:
    """Of the labels that count, in plain operations."""
    logits = model(torch.tensor([text[:-1]]))[0]
    targets = torch.tensor(labels[1:])
    each = F.log_softmax(logits, dim=-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return each[targets != -100].sum()


def test_gradients_are_those_of_the_formula(config, pairs, base, tmp_path):
    """A step's loss and gradients beside log-softmax, text by text, with autograd."""
    session = start(config("dpo", tmp_path / "run", "optimizer.clip_norm=null", "preference.beta=0.5"))
    policy, reference = load_model(base), load_model(base)
    with torch.no_grad():  # a policy that has left its reference
        for mine, theirs in zip(session.executor.model.parameters(), policy.parameters(), strict=True):
            theirs += 0.05 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
            mine.copy_(theirs)
    batch = session.batch(0)
    losses, margins = [], []
    for row in range(0, len(batch.tokens), 2):
        ratios = []
        for tokens, labels in zip(
            batch.tokens[row : row + 2].tolist(), batch.labels[row : row + 2].tolist(), strict=True
        ):
            text, shifted = [*tokens, 0], [-100, *labels]
            ratio = log_probability(policy, text, shifted) - log_probability(reference, text, shifted).detach()
            ratios.append(ratio)
        margins.append(0.5 * (ratios[0] - ratios[1]))
        losses.append(-F.logsigmoid(margins[-1]))
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters()])
    found = session.step(0, batch)
    assert found.loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    assert found.grad_norm == pytest.approx(float(norm), rel=1e-5)
    report = session.step.preference.report
    assert report["margin"] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-5)
    assert report["accuracy"] == sum(margin.item() > 0 for margin in margins) / len(margins)


@pytest.mark.parametrize(
    ("objective", "settings", "first"),
    [
        ("dpo", [], math.log(2)),
        ("dpo", ["preference.loss=ipo", "preference.beta=0.5"], 1.0),
        ("kto", ["preference.desirable_weight=3"], None),
    ],
)
def test_the_first_loss_is_that_of_the_reference(config, tmp_path, objective, settings, first):
    """Policy and reference are the same model."""
    session = start(config(objective, tmp_path / "run", *settings))
    batch = session.batch(0)
    result = session.step(0, batch)
    if first is None:  # half the weight, of as many wanted texts as the batch holds
        first = 0.5 * float(np.where(batch.rewards > 0, 3.0, 1.0).mean())
    assert result.loss == pytest.approx(first, abs=1e-6)
    assert session.step.preference.report["margin"] == pytest.approx(0.0, abs=1e-6)


def test_the_reference_is_held_in_the_compute_dtype(config, tmp_path):
    session = start(config("dpo", tmp_path / "run", "precision.compute=bf16"))
    assert {p.dtype for p in session.step.preference.reference.parameters.values()} == {torch.bfloat16}
    assert {p.dtype for p in session.executor.parameters.values()} == {torch.float32}
    assert session.step(0, session.batch(0)).loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "reward"])
def test_a_run_learns_and_is_resumed_bit_for_bit(config, tmp_path, objective):
    straight = history(train(config(objective, tmp_path / "straight")))
    train(config(objective, tmp_path / "run", "train.exit_interval=3"))
    assert history(train(load_run(tmp_path / "run", ["train.exit_interval=null"]))) == straight
    again = replay(tmp_path / "run", 5)
    assert again["loss"] == straight[4]["loss"] and len(again["sequences"]) == (8 if objective == "kto" else 16)
    assert len(straight) == STEPS and straight[-1]["loss"] < straight[0]["loss"]
    assert {"chosen_reward", "rejected_reward", "margin", "accuracy"} <= straight[-1].keys()
    assert straight[-1]["valid_margin"] > straight[0]["margin"] and straight[-1]["valid_accuracy"] > 0.6


def test_the_size_of_micro_batches_does_not_matter(config, tmp_path):
    for objective in ("dpo", "orpo", "reward"):
        found = []
        for micro in (2, 8):
            session = start(config(objective, tmp_path / "run", f"train.micro_batch_size={micro}"))
            found.append([session.step(step, session.batch(step))[:2] for step in range(2)])
        assert found[0] == [pytest.approx(step, rel=1e-4) for step in found[1]]


def test_stored_references_are_the_live_ones(config, pairs, base, tmp_path, capsys):
    live = history(train(config("dpo", tmp_path / "live")))
    source = json.loads(json.dumps(pairs["dpo"]))
    for text, name in ((source, "pos"), (source["rejected"], "neg")):
        text["references"] = str(tmp_path / name)
        evaluate(str(base), data=text["path"], log_probs=text["references"])
    assert "log-probabilities of 40 documents" in capsys.readouterr().out
    stored = [f"data.{split}={json.dumps([source])}" for split in ("train", "valid")]
    session = start(config("dpo", tmp_path / "stored", *stored))
    assert session.step.preference.reference is None
    found = history(train(config("dpo", tmp_path / "stored", *stored)))
    for ours, theirs in zip(found, live, strict=True):  # at first all rewards are 0, and rounding says which is higher
        assert {**ours, "accuracy": 0} == pytest.approx({**theirs, "accuracy": 0}, abs=2e-4)


def test_a_reference_of_ones_own_and_none_at_all(config, base, tmp_path):
    other = tmp_path / "other"
    train(config("dpo", other, "train.steps=3"))
    results = {}
    for name, words in {
        "own": [f"preference.reference={other}"],
        "free": ["preference.reference_free=true"],
        "plain": [],
    }.items():
        session = start(config("dpo", tmp_path / "run", *words))
        results[name] = session.step(0, session.batch(0)).loss
        assert (session.step.preference.reference is None) == (name == "free")
    assert len({round(loss, 6) for loss in results.values()}) == 3


def test_without_a_checkpoint_the_initial_weights_are_the_reference(config, base, tmp_path):
    scratch = config("dpo", tmp_path / "run", *MODEL, "checkpoint.init_from=null")
    first = start(scratch)
    for name, parameter in first.executor.parameters.items():
        assert torch.equal(parameter, first.step.preference.reference.parameters[name])
        assert not first.step.preference.reference.parameters[name].requires_grad
    train(scratch)
    resumed = start(load_run(tmp_path / "run"))
    for name, parameter in resumed.step.preference.reference.parameters.items():
        assert torch.equal(
            parameter,
            start(config("dpo", tmp_path / "x", *MODEL, "checkpoint.init_from=null")).executor.parameters[name],
        )
        break


def test_only_adapters_learn_and_the_reference_has_none(config, tmp_path):
    session = start(config("dpo", tmp_path / "run", "finetune.lora={}"))
    reference = session.step.preference.reference.parameters
    before = {name: parameter.clone() for name, parameter in session.executor.parameters.items()}
    assert not [name for name in reference if "lora" in name]
    assert session.step(0, session.batch(0)).loss == pytest.approx(math.log(2), abs=1e-6)
    changed = {
        name for name, parameter in session.executor.parameters.items() if not torch.equal(parameter, before[name])
    }
    assert changed and all(name.endswith((".lora_a", ".lora_b")) for name in changed)


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_plan_knows_pairs_and_the_reference(config, tmp_path, capsys, objective):
    rehearse(config(objective, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "8 pairs x 2 x 12 = 192 tokens a step" in said
    (off,) = re.findall(r"memory: .*\(([+-]\d+\.\d)%\)", said)
    assert abs(float(off)) < 10


def test_a_reward_model_judges_and_predicts_no_tokens(config, base, tmp_path):
    run = train(config("reward", tmp_path / "run"))
    model = load_model(run)
    names = [name for name, _ in model.named_parameters()]
    assert "reward.weight" in names and "head.weight" not in names
    tokens = torch.tensor([[63, 100, 101, 102], [63, 100, 100, 100]])
    rewards = model(tokens, torch.tensor([[-100, 101, 102, EOD], [-100, 100, 100, EOD]]), per_sequence=True)
    assert rewards.shape == (2,) and rewards[0] > rewards[1]
    for labels in (None, tokens):
        with pytest.raises(ConfigError, match="judges texts and predicts no tokens"):
            model(tokens, labels)
    assert "tie_embeddings" not in from_tensors(open_checkpoint(run).model, None)
    with pytest.raises(ConfigError, match="is a reward model: train it with train.objective=reward"):
        start(config("dpo", tmp_path / "other", f"checkpoint.init_from={run}"))

"""Writing and evaluating with several processes give what one process gives."""

from __future__ import annotations

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.cli.opening import overlaid
from castalia.cli.train import train
from castalia.errors import ConfigError
from castalia.generate.generation import generate
from castalia.loading import build_model, load_split
from castalia.parallel.rendezvous import world_size
from castalia.train.evaluation import EvaluationOptions, evaluate_checkpoint, load_executor

pytestmark = pytest.mark.xdist_group("pool")
PROMPTS = ["a first prompt", "x", "a longer prompt than the others"]
FAMILIES = ("neox-parallel", "gpt2-tied", "llama", "mamba", "rwkv")
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "num_samples": 2}


@pytest.fixture(scope="module")
def runs(pool, tiny, tmp_path_factory):
    """A run of two steps for each family."""
    folders = {}
    for family in FAMILIES:
        where = tmp_path_factory.mktemp(family) / "run"
        overrides = ("train.steps=2", f"checkpoint.dir={where}", "model.max_positions=48", "data.seq_length=16")
        folders[family] = pool.run(train, 1, tiny(family, *overrides, "checkpoint.every=2"))[0]
    return folders


def texts(run: str, tp: int, pp: int, sampling: dict) -> list[str]:
    checkpoint = open_checkpoint(run)
    device = torch.device("cpu")
    split = (tp, pp, torch.float32, device)
    model = build_model(checkpoint) if world_size() == 1 else load_split(checkpoint, *split)
    return generate(model, load_tokenizer_for(checkpoint), PROMPTS, max_tokens=24, seed=5, **sampling)


def loss(run: str, tp: int, pp: int, stride: int | None, data: str) -> dict:
    checkpoint = open_checkpoint(run)
    return evaluate_checkpoint(checkpoint, EvaluationOptions(data, stride=stride, tp=tp, pp=pp))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_split_models_write_the_same_texts_on_every_rank(pool, runs, family, sampling):
    (alone,) = pool.run(texts, 1, runs[family], 1, 1, sampling)
    assert len(set(alone)) == len(alone)
    for tp, pp in ((2, 1), (1, 4), (2, 2)):
        assert pool.run(texts, tp * pp, runs[family], tp, pp, sampling) == [alone] * (tp * pp)


@pytest.mark.parametrize(("world", "tp", "pp"), [(3, 1, 1), (2, 2, 1), (4, 1, 2), (8, 2, 2)])
def test_evaluation_gives_the_same_loss_on_every_rank(pool, runs, corpus, world, tp, pp):
    for family, stride in (("neox-parallel", None), ("gpt2-tied", 5), ("mamba", None), ("rwkv", 5)):
        (alone,) = pool.run(loss, 1, runs[family], 1, 1, stride, str(corpus / "text"))
        for found in pool.run(loss, world, runs[family], tp, pp, stride, str(corpus / "text")):
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6) and found["tokens"] == alone["tokens"]


def narrow(run: str, tp: int, pp: int, data: str) -> tuple[set[torch.dtype], float]:
    """Dtypes of the parameters that `eval` holds, and the loss, in bf16."""
    checkpoint = open_checkpoint(run)
    executor, _ = load_executor(checkpoint, 16, 2, torch.bfloat16, torch.device("cpu"), tp, pp)
    narrowed = overlaid(checkpoint, ["precision.compute=bf16"])
    found = evaluate_checkpoint(narrowed, EvaluationOptions(data, tp=tp, pp=pp))
    return {parameter.dtype for parameter in executor.parameters.values()}, found["loss"]


def test_ranks_hold_weights_in_the_compute_dtype(pool, runs, corpus):
    (alone,) = pool.run(narrow, 1, runs["llama"], 1, 1, str(corpus / "text"))
    for dtypes, loss in pool.run(narrow, 8, runs["llama"], 2, 2, str(corpus / "text")):
        assert dtypes == {torch.bfloat16} and loss == pytest.approx(alone[1], rel=1e-3)


def test_processes_that_have_no_part_of_the_model_are_refused(pool, runs):
    with pytest.raises(ConfigError, match="start 2"):
        pool.run(texts, 4, runs["llama"], 2, 1, {})
    with pytest.raises(ConfigError, match="parallel.tp=3 does not divide"):
        pool.run(texts, 3, runs["llama"], 3, 1, {})


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.zero=1", "parallel.pp=2"])
def test_what_is_saved_after_an_evaluation_is_what_was_trained(pool, tiny, corpus, tmp_path, layout):
    validation = (f'data.valid=[{{"path": "{corpus / "text"}"}}]', "eval.every=1", "eval.batches=1", "train.steps=2")
    pool.run(train, 1, tiny("neox-parallel", *validation, f"checkpoint.dir={tmp_path / 'one'}"))
    pool.run(train, 2, tiny("neox-parallel", *validation, f"checkpoint.dir={tmp_path / 'two'}", layout))
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.optimizer.keys() == two.optimizer.keys() == set(two.model)
    for name, state in one.optimizer.items():
        assert two.optimizer[name]["step"] == state["step"] == 2
        torch.testing.assert_close(two.optimizer[name]["exp_avg"].read(), state["exp_avg"].read(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(two.model[name].read(), one.model[name].read(), rtol=1e-4, atol=1e-4)

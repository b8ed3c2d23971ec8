"""A model that is split over processes, each of which streams its share, computes what one process computes."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.cli.train import train
from castalia.errors import ConfigError
from castalia.generate.generation import Sampling, generate
from castalia.generate.writer import Numbers, streamed_writer
from castalia.loading import build_model
from castalia.parallel.rendezvous import world_size
from castalia.plan import stream_plan
from castalia.train.evaluation import EvaluationOptions, evaluate_checkpoint

pytestmark = pytest.mark.xdist_group("pool")
PROMPTS = ["a first prompt", "x", "a longer prompt than the others"]
FAMILIES = ("neox-parallel", "gpt2-tied", "llama", "mamba", "rwkv")
MANY = [pytest.mark.slow, pytest.mark.grid]
EACH = [FAMILIES[0], *(pytest.param(family, marks=MANY) for family in FAMILIES[1:])]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "num_samples": 2}
MEMORY = 800_000_000


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
    """With one process: of the model in memory."""
    checkpoint = open_checkpoint(run)
    words = load_tokenizer_for(checkpoint)
    if world_size() == 1:
        return generate(build_model(checkpoint), words, PROMPTS, max_tokens=24, seed=5, **sampling)
    asked = Sampling(max_tokens=24, batch_size=16, **sampling)
    with nothing_stays():
        model = streamed_writer(
            checkpoint, words, PROMPTS, asked, Numbers(torch.float32, torch.device("cpu")), MEMORY, tp, pp
        )
    assert model.calls_at_once > 1 and not model.stage.plan.resident
    found = generate(model, words, PROMPTS, max_tokens=24, seed=5, **sampling)
    model.stage.reader.close()
    return found


@contextmanager
def nothing_stays():
    """Plans with no block that stays: a model as small as this one would be read once."""
    spread, stream_plan.spread = stream_plan.spread, lambda number, blocks: ()
    try:
        yield
    finally:
        stream_plan.spread = spread


def loss(run: str, tp: int, pp: int, memory: int | None, data: str, words: tuple[str, ...] = ()) -> dict:
    checkpoint = open_checkpoint(run)
    with nothing_stays():
        return evaluate_checkpoint(checkpoint, EvaluationOptions(data, stride=5, memory=memory, tp=tp, pp=pp))


@pytest.mark.parametrize("family", EACH)
@pytest.mark.parametrize("sampling", [{}, pytest.param(SAMPLED, marks=MANY)], ids=["greedy", "sampled"])
def test_streamed_shares_write_the_texts_of_the_whole_model(pool, runs, family, sampling):
    (alone,) = pool.run(texts, 1, runs[family], 1, 1, sampling)
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        assert pool.run(texts, tp * pp, runs[family], tp, pp, sampling) == [alone] * (tp * pp)


@pytest.mark.parametrize("family", EACH)
def test_losses_of_pipeline_stages_have_the_bits_of_one_process(pool, runs, corpus, family):
    data = str(corpus / "text")
    (alone,) = pool.run(loss, 1, runs[family], 1, 1, None, data)
    for pp in (2, 4):
        for found in pool.run(loss, pp, runs[family], 1, pp, MEMORY, data):
            assert found["loss"] == alone["loss"] and found["tokens"] == alone["tokens"]
    for tp, pp in ((2, 1), (2, 2)):
        every = pool.run(loss, tp * pp, runs[family], tp, pp, MEMORY, data)
        assert len({found["loss"] for found in every}) == 1
        assert every[0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_budget_too_small_is_refused_on_all_ranks_alike(pool, runs, corpus):
    with pytest.raises(ConfigError, match="the least that works here is --memory"):
        pool.run(loss, 2, runs["llama"], 2, 1, 1_000_000, str(corpus / "text"))
    with pytest.raises(ConfigError, match="start 1"):
        pool.run(loss, 2, runs["llama"], 1, 1, MEMORY, str(corpus / "text"))

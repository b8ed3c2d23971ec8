"""Several processes that share a model write what one process writes, whatever comes and goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import architecture, load_tokenizer_for
from castalia.errors import CheckpointError
from castalia.loading import build_model
from castalia.parallel.rendezvous import is_main
from castalia.plan.layout import Layout
from castalia.plan.serve_plan import serving_plan
from castalia.serve.catalogue import ModelEntry
from castalia.serve.engine import Drawn, Engine, Event, PromptScores, TextOptions, TextRow
from castalia.serve.followers import Ranks
from tests.tasks.conftest import llama, neox


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("shared")
    for make in (neox, llama):
        (place / make.__name__).mkdir()
        make(place / make.__name__)
    return place


pytestmark = pytest.mark.xdist_group("pool")
PROMPTS = ["In the beginning", "a", "And God said, Let there be light: and there was light.", "a"]


def written(folder: Path, tp: int, pp: int) -> list[tuple] | None:
    """Tokens and scores of texts that come one after another, of which one is given up; None on ranks that follow."""
    checkpoint, entry = open_checkpoint(folder), ModelEntry("model", folder, "model")
    words = load_tokenizer_for(checkpoint)
    plan = serving_plan(architecture(checkpoint), 4, 1 << 30, Layout(tp=tp, pp=pp))
    assert plan is not None
    if tp * pp == 1:
        return _events(Engine(build_model(checkpoint), words, plan), words)
    ranks = Ranks(tp, pp, torch.device("cpu"))
    if not is_main():
        ranks.follow()
        return None
    with pytest.raises(CheckpointError, match="nowhere"):  # which only the others look for
        ranks.load(ModelEntry("gone", folder / "nowhere", "gone"), checkpoint, words, plan)
    events = _events(ranks.load(entry, checkpoint, words, plan), words)
    ranks.tell("wait")
    ranks.drop(entry)
    assert _events(ranks.load(entry, checkpoint, words, plan), words) == events
    ranks.tell("end")
    return events


def _events(engine: Engine, words: Any) -> list[tuple]:
    told: list[list[Event]] = [[] for _ in PROMPTS]
    for number, (prompt, events) in enumerate(zip(PROMPTS, told, strict=True)):
        options = TextOptions(30, temperature=0.9, seed=number, top=2, prompt_top=1, bias={0: -99.0})
        row = TextRow(words.encode(prompt), options, events.append)
        engine.submit([row])
        for _ in range(4):
            engine.step()
        row.cancelled = number == 1
    while engine.busy:
        engine.step()
    assert len(told[1]) < 30 and not engine.kv_bytes
    scores = [event.scores for events in told for event in events if isinstance(event, PromptScores)]
    tokens = [(event.token, event.score) for events in told for event in events if isinstance(event, Drawn)]
    flat = [score for some in scores for score in some] + [score for _, score in tokens if score]
    return [(score.token, score.log_prob, score.rank) for score in flat]


@pytest.mark.parametrize(("name", "tp", "pp"), [("neox", 2, 1), ("llama", 1, 2), ("neox", 2, 2)])
def test_texts_and_scores_are_those_of_one_process(pool: Any, models: Path, name: str, tp: int, pp: int) -> None:
    (alone,) = pool.run(written, 1, models / name, 1, 1)
    found, *others = pool.run(written, tp * pp, models / name, tp, pp)
    assert others == [None] * (tp * pp - 1)
    assert [(token, rank) for token, _, rank in found] == [(token, rank) for token, _, rank in alone]
    assert [value for _, value, _ in found] == pytest.approx([value for _, value, _ in alone], abs=1e-5)


def test_a_share_takes_its_part_of_the_memory(models: Path) -> None:
    cfg = architecture(open_checkpoint(models / "neox"))
    whole, half = serving_plan(cfg, 4, 1 << 30), serving_plan(cfg, 4, 1 << 30, Layout(tp=2))
    staged = serving_plan(cfg, 4, 1 << 30, Layout(pp=2))
    assert whole is not None and half is not None and staged is not None
    assert half.kv_each == staged.kv_each == whole.kv_each // 2
    assert whole.weights / 2 < half.weights < 0.55 * whole.weights
    assert whole.weights / 2 < staged.weights < whole.weights

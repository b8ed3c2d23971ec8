"""Whatever writes is killed before its n-th operation on files, for every n; the same command then makes up for it.

`make test` tries a few of the attacks, drawn with a seed, `make test-slow` more, `make campaign` all of them.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from castalia.files import clean, put_in_place, workplace
from tests.attacks.scenes import ERRORS, SCENES, TINY, TRAIN, Theatre, attacks, differences, faults, snapshot

Attack = tuple[str, int, int]  # how, before which operation, of which rank
QUICK = ("train", "train RUN from an earlier step, keep_last", "convert --force", "data prepare over a corpus")


def play(theatre: Theatre, name: str, count: int) -> None:
    """So many of a scene's attacks. What is wrong after one is told with how to do it again."""
    operations = theatre.open(name)[2]
    todo = [(how, n, rank) for rank, done in enumerate(operations) for how, n in (*attacks(done), *faults(done))]
    todo = random.Random(name).sample(todo, min(count, len(todo)))
    require_nothing(operations, {attack: theatre.attack(name, *attack) for attack in todo})


def play_all(theatre: Theatre, name: str) -> None:
    """All of them. Those that leave a state are judged by it; see `Theatre.states`."""
    operations = theatre.open(name)[2]
    results: dict[Attack, list[str]] = {}
    num_states = 0
    for rank, done in enumerate(operations):
        for moments in theatre.states(name, rank):
            num_states += 1
            found = theatre.make_up(name, broken=True)
            results |= {(how, n, rank): found for how, n in moments}
        # Some ranks need ten times the time of one, which has met each error at the same places.
        errors = faults(done, in_turn=len(operations) > 1)
        results |= {(how, n, rank): theatre.attack(name, how, n, rank) for how, n in errors}
    counts = [sum(how == each for how, *_ in results) for each in ("kill", "torn", "power", *ERRORS)]
    row = [name, *counts[:3], num_states, *counts[3:], sum(map(bool, results.values()))]
    print(f"| {' | '.join(map(str, row))} |", flush=True)
    require_nothing(operations, results)


def require_nothing(operations: Sequence[Sequence[tuple[str, str]]], results: Mapping[Attack, list[str]]) -> None:
    wrong = {attack: found for attack, found in results.items() if found}
    assert not wrong, "\n".join(
        f"{how} before operation {n} of rank {rank}, {[*operations[rank], ('end', '')][n - 1]}: {'; '.join(found)}"
        for (how, n, rank), found in wrong.items()
    )


@pytest.mark.parametrize("name", QUICK)
def test_a_few_attacks(theatre: Theatre, name: str) -> None:
    play(theatre, name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENES if name not in QUICK])
def test_some_attacks(theatre: Theatre, name: str) -> None:
    play(theatre, name, 4)


def test_states_are_those_that_attacks_leave(theatre: Theatre) -> None:
    name = "data merge"  # which does the same in the same order each time

    def left() -> dict[str, str]:
        return {re.sub("[0-9a-f]{32}", "", path): digest for path, digest in snapshot(theatre.work).items()}

    drawn = random.Random(name).sample(list(attacks(theatre.open(name)[2][0])), 5)
    states = {moment: left() for moments in theatre.states(name, 0) for moment in moments}
    for how, number in drawn:
        theatre.set_up([name])
        theatre.stage.run(SCENES[name].words, theatre.work, how, number)
        assert left() == states[how, number], (how, number)


@pytest.mark.campaign
@pytest.mark.parametrize("name", SCENES)
def test_all_attacks(theatre: Theatre, name: str) -> None:
    play_all(theatre, name)


EVALUATE, INDEX = ["eval", "done"], ["data", "batch", *TINY]
TOGETHER = {
    "new runs": [TRAIN] * 2,
    "resumed runs": [["train", "stopped"]] * 2,
    "conversions": [["convert", "done", "out", "--to", "hf"]] * 2,
    "merges": [["data", "merge", "words", "words", "--output", "made"]] * 2,
    "preparations": [["data", "prepare", "texts.jsonl", "--tokenizer-kind", "bytes", "--output", "made"]] * 2,
    "index builders": [INDEX] * 4,
    "an evaluation and a run": [["train", "stopped"], EVALUATE],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_at_one_moment(theatre: Theatre, name: str) -> None:
    """One of them does it. The others are refused with a line, or come so late that they do the same again."""
    commands, begin = TOGETHER[name], ["together"]
    if not theatre.kept(begin).exists():
        theatre.set_up(())
        theatre.play([*TRAIN[:-1], "checkpoint.dir=done"])
        theatre.play([*TRAIN[:-1], "checkpoint.dir=stopped", "train.exit_interval=3"])
        shutil.rmtree(theatre.work / "cache")
        theatre.keep(begin)
    theatre.set_up(begin)
    for words in {tuple(words): words for words in commands}.values():
        theatre.play(words)
    alone = snapshot(theatre.work)
    theatre.set_up(begin)
    done = theatre.stage.together(commands, theatre.work)
    assert 0 in {each.code for each in done} <= {0, 2}, [each.said[-500:] for each in done]
    assert all(each.code == 0 or each.said.count("error: ") == 1 for each in done), [each.said for each in done]
    assert differences(alone, snapshot(theatre.work)) == []


def test_a_folder_that_is_being_replaced_is_found(tmp_path: Path) -> None:
    from castalia.files import standing

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old").rename(workplace(tmp_path / "model", "replaced") / "model")
    assert standing(tmp_path / "model").is_dir()
    clean(tmp_path)
    assert standing(tmp_path / "model") == tmp_path / "model"
    old = put_in_place(tmp_path / "new", tmp_path / "model")
    assert old is not None and standing(tmp_path / "model") == tmp_path / "model"


def test_a_conversion_killed_after_its_folder_was_renamed_is_complete(theatre: Theatre) -> None:
    """The same command says so, and does not refuse what it has made itself."""
    name, words = "convert to hf", SCENES["convert to hf"].words
    _, last, (operations,) = theatre.open(name)
    renamed = max(number for number, (kind, _) in enumerate(operations, 1) if kind in ("rename", "replace"))
    theatre.set_up([name])
    assert theatre.stage.run(words, theatre.work, "kill", renamed + 1).was_killed
    assert (theatre.work / "out").is_dir()
    done = theatre.stage.run(words, theatre.work)
    assert done.code == 0, done.said
    assert differences(last, snapshot(theatre.work)) == []


def test_a_step_whose_workplace_was_half_removed_is_complete(theatre: Theatre) -> None:
    """The other steps follow, and nothing is left of it."""
    name = "convert --all-steps"
    (operations,) = theatre.open(name)[2]
    removed = [number for number, (kind, _) in enumerate(operations, 1) if kind == "rmdir"]
    assert len(removed) == 3
    assert theatre.attack(name, "kill", removed[0]) == []


@pytest.mark.slow
def test_adapters_that_could_not_be_written_are_an_error(theatre: Theatre) -> None:
    """The run is complete by then; the same command writes what is missing."""
    name = "finetune"
    (operations,) = theatre.open(name)[2]
    number = 1 + next(n for n, (_, path) in enumerate(operations) if path.endswith(".adapter.castalia-unfinished"))
    assert theatre.attack(name, "full", number) == []

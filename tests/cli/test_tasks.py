"""`castalia eval --tasks` and `castalia lm-eval`, as a user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from castalia.tasks.task_run import metrics_of
from tests.tasks.conftest import neox


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks") / "model"
    place.mkdir()
    neox(place)
    return place


def castalia(folder: Path, *words: str, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "castalia", *words],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


KILLED = Path(__file__).parents[1] / "tasks/killed.py"
LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0")
ASK = ("eval", "model", "--tasks", "castalia_demo", "--limit", "3")


def test_a_table_and_a_file(model: Path) -> None:
    out, err = castalia(model.parent, *ASK, "--output", "results/all.json", "--samples")
    assert "castalia_demo_last_word" in out and "bits_per_byte" in out and err == ""
    assert [path.name for path in (model.parent / "results").iterdir()] == ["all.json"]  # nothing is left beside it
    results = json.loads((model.parent / "results/all.json").read_text())
    assert results["castalia"]["checkpoint"] == "model" and results["castalia"]["precision"] == "fp32"
    assert len(results["samples"]["castalia_demo_last_word"]) == 3
    assert {"results", "configs", "versions", "n-shot"} <= results.keys()


@pytest.mark.parametrize("first", ["model", "tasks.yml"])  # the second says where the checkpoint is
def test_the_original_s_own_keys_act(model: Path, first: str) -> None:
    """As in GPT-NeoX: `evaluate.py` asks the tasks of its configs and writes PREFIX_eval_results_DATE.json."""
    (model.parent / "tasks.yml").write_text(
        '{"load": "model", "eval_tasks": ["castalia_demo_last_word"], "eval_results_prefix": "kept/first"}'
    )
    out, _ = castalia(model.parent, "eval", *dict.fromkeys((first, "tasks.yml")), "--limit", "2")
    (file,) = (model.parent / "kept").glob("first_eval_results_??-??-????-??-??-??.json")
    results = json.loads(file.read_text())
    assert [*results["results"]] == ["castalia_demo_last_word"] and "castalia_demo_last_word" in out
    assert results["config"]["limit"] == 2
    file.unlink()


@pytest.fixture(scope="module")
def alone(model: Path) -> dict:
    return json.loads(castalia(model.parent, *ASK, "--json")[0])


@pytest.mark.parametrize("layout", [["--nproc", "2"], ["--tp", "2"], ["--pp", "2"]], ids=" ".join)
@pytest.mark.slow
def test_several_processes(model: Path, alone: dict, layout: list[str]) -> None:
    split = json.loads(castalia(model.parent, *ASK, *layout, "--json")[0])
    assert alone["castalia"] == split["castalia"]
    assert metrics_of(split) == pytest.approx(metrics_of(alone), rel=1e-3)


@pytest.mark.parametrize(("launcher", "kept"), [((), 15), (LAUNCHER, 16)], ids=["alone", "two"])
@pytest.mark.slow
def test_a_killed_command_goes_on(model: Path, launcher: tuple[str, ...], kept: int) -> None:
    """Answers survive SIGKILL; of two processes those of whole rounds, 4 of each."""
    words = ("eval", "model", "--tasks", "castalia_demo_second_half", "--limit", "10", "--output", "killed/all.json")

    def run(most: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *launcher, str(KILLED), str(most), *words],
            cwd=model.parent, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
        )  # fmt: skip

    def asked(done: subprocess.CompletedProcess[str]) -> int:
        return sum(map(int, re.findall(r"asked for (\d+)", done.stderr)))

    died = run(15 if not launcher else 10)
    assert died.returncode != 0 and asked(died) == 40 and not (model.parent / "killed/all.json").exists()
    done = run(0)
    assert done.returncode == 0 and asked(done) == 40 - kept, done.stderr
    found = json.loads((model.parent / "killed/all.json").read_text())["results"]
    castalia(model.parent, *words[:-1], "whole.json")
    assert found == json.loads((model.parent / "whole.json").read_text())["results"]
    assert [path.name for path in (model.parent / "killed").iterdir()] == ["all.json"]
    (model.parent / "killed/all.json").unlink()


@pytest.mark.slow  # lm-eval lists all its tasks first
def test_lm_eval_itself(model: Path, alone: dict) -> None:
    out, _ = castalia(
        model.parent, "lm-eval", "run", "--model", "castalia", "--model_args", "path=model", "--limit", "3",
        "--tasks", "castalia_demo_verses",
    )  # fmt: skip
    assert f"{alone['results']['castalia_demo_verses']['bits_per_byte,none']:.4f}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "castalia_demo", "--chat"], "has no chat template"),
        (["--limit", "3"], "--limit belongs to --tasks"),
        (["--log-probs", "out", "--data", "text", "--json"], "--json does not act on --log-probs"),
    ],
)
def test_what_cannot_be_asked(model: Path, words: list[str], message: str) -> None:
    _, err = castalia(model.parent, "eval", "model", *words, code=2)
    assert message in err and err.count("error: ") == 1

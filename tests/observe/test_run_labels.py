"""Labels of runs name what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from castalia.errors import DataError
from castalia.observe.run_labels import labels, runs_below


def write(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    words = "\n".join(f"{section}: {values}" for section, values in settings.items())
    (folder / "config.yml").write_text(f"{words}\ncheckpoint: {{dir: {folder}}}\n")
    return folder


def test_labels_say_what_differs_and_nothing_else(tmp_path):
    runs = [write(tmp_path / str(n), optimizer=f"{{lr: {rate}}}", seed=7) for n, rate in enumerate((1e-3, 0.01))]
    assert labels(runs) == ["0: optimizer.lr 0.001", "1: optimizer.lr 0.01"]
    assert labels(runs[:1]) == ["0"]


def test_many_differences_are_counted(tmp_path):
    train = ["{steps: 5, batch_size: 2, micro_batch_size: 1}", "{steps: 6, batch_size: 8, micro_batch_size: 4}"]
    rates = ["{lr: 0.1}", "{lr: 0.2}"]
    runs = [write(tmp_path / str(n), seed=n + 1, train=train[n], optimizer=rates[n]) for n in range(2)]
    assert labels(runs)[0] == "0: optimizer.lr 0.1, train.steps 5, train.batch_size 2, 2 more"


def test_copies_of_one_tokenizer_are_no_difference(tmp_path):
    runs = [write(tmp_path / name, tokenizer="{path: tokenizer}") for name in "abc"]
    for run, text in zip(runs, ("one", "one", "other"), strict=True):
        (run / "tokenizer").mkdir()
        (run / "tokenizer" / "tokenizer.json").write_text(text)
    assert labels(runs[:2]) == ["a", "b"]
    assert [": tokenizer.path digest " in label for label in labels(runs)] == [True] * 3


def test_runs_of_one_name_are_called_by_their_paths_and_may_lack_a_config(tmp_path):
    runs = [write(tmp_path / parent / "run", seed=n + 1) for n, parent in enumerate("ab")]
    assert labels(runs) == [f"{tmp_path}/a/run: seed 1", f"{tmp_path}/b/run: seed 2"]
    (runs[0] / "config.yml").unlink()
    assert labels(runs) == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]
    (runs[0] / "config.yml").write_text("no: key of ours")
    assert labels(runs) == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]


def test_all_runs_below_a_folder_are_found(tmp_path):
    runs = [write(tmp_path / name) for name in ("b/c", "a")]
    assert runs_below(tmp_path) == sorted(runs)
    assert runs_below(runs[0]) == [runs[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no metrics.jsonl, nor does any folder below it"):
        runs_below(tmp_path / "empty")


def test_what_tells_most_runs_apart_comes_first_and_the_folder_is_no_difference(tmp_path):
    rates, batches = (0.1, 0.2, 0.1, 0.2), (2, 4, 8, 16)
    runs = [
        write(
            tmp_path / f"r{n}",
            optimizer=f"{{lr: {rates[n]}}}",
            train=f"{{batch_size: {batches[n]}}}",
            data=f"{{path: {tmp_path}/r{n}/data/text, cache_dir: r{n}, pass_multiple: {n + 1}}}",
            tokenizer=f"{{path: here/r{n}/tokenizer.json}}",
            seed=1 + n // 3,
        )
        for n in range(4)
    ]
    assert labels(runs)[0] == "r0: train.batch_size 2, optimizer.lr 0.1, seed 1"


def test_paths_that_differ_at_their_ends_are_told_by_these(tmp_path):
    paths = [f"a/long/way/to/the/corpora/{name}" for name in ("kjv", "code")]
    runs = [write(tmp_path / str(n), data=f"{{path: {path}}}") for n, path in enumerate(paths)]
    assert labels(runs) == ["0: data.path ...ay/to/the/corpora/kjv", "1: data.path ...y/to/the/corpora/code"]

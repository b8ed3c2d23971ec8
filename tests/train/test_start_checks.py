"""What keeps a run from starting: found at once, and told alike by the verbs that check and the one that trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from castalia.cli.main import main
from castalia.config.input_files import missing_files
from castalia.config.load import load_config, load_run
from castalia.config.schema import RunConfig
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.tokenizer import load_tokenizer
from castalia.train.loop import train
from castalia.train.start_checks import find_obstacles

SOUND = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2},
    "tokenizer": {"kind": "bytes"},
    "data": {"path": "words", "seq_length": 8, "split": "1, 0, 0"},
    "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
    "checkpoint": {"dir": "run"},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, token in (("words", 7), ("foreign", 9000)):
        with DatasetWriter(name, "uint16") as writer:
            for _ in range(8):
                writer.add([token] * 16)
    return tmp_path


@pytest.fixture
def castalia(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["castalia", *words])
        with pytest.raises(SystemExit) as end:
            main()
        # Lines are broken to fit the screen, except in scripts.
        out, err = capsys.readouterr()
        return end.value.code or 0, out, re.sub(r"\n  +", " ", err)

    return run


def kinds(*overrides: str, ranks: int = 1) -> list[str]:
    return [each.kind for each in find_obstacles(load_config([SOUND], overrides), ranks)]


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("data.path=gone", "missing here"),
        ("tokenizer.path=none.json", "missing here"),
        ("checkpoint.init_from=/nowhere/base", "missing here"),
        ("checkpoint.init_from=someone/never_cached", "missing here"),
        ("train.device=cuda", "missing here"),
        ("data.path=null", "not given"),
        ("tokenizer.kind=null", "not given"),
        ("train.steps=null", "not given"),
        ("train.batch_size=null", "not given"),
        ("checkpoint.dir=null", "not given"),
        ("data.path=foreign", "error"),
        ("model.vocab_size=9", "error"),
        ("finetune.lora.rank=2", "error"),
        ("data.path=torn", "error"),
        ('tokenizer={"path": "torn.json"}', "error"),
        ("checkpoint.init_from=.", "error"),
    ],
)
def test_each_finding_has_its_kind(here, monkeypatch, override, kind):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    (here / "torn.bin").write_bytes(b"")
    (here / "torn.idx").write_bytes(b"no index")
    (here / "torn.json").write_text("{")
    assert kinds() == []
    words = ["tokenizer.kind=null"] if "torn.json" in override or "none.json" in override else []
    word = "tokenizer.path=torn.json" if "torn.json" in override else override
    assert kinds(*words, word) == [kind]


def test_labels_of_other_lengths_are_an_error(here):
    with DatasetWriter("labels", "int32") as writer:
        writer.add([1] * 3)
    source = json.dumps([{"path": "words", "labels": "labels"}])
    assert kinds("data.path=null", f"data.train={source}") == ["error"]


def test_a_layout_is_checked_for_the_processes_that_are_started(here):
    assert kinds("parallel.tp=2", ranks=2) == []
    assert kinds("parallel.tp=2", ranks=3) == ["error"]
    assert kinds(ranks=4) == ["error"]  # the batch does not divide


def test_the_folder_of_another_run_is_in_the_way_and_its_own_is_not(here):
    train(load_config([SOUND]))
    assert [str(each) for each in find_obstacles(load_config([SOUND]))] == [
        "in the way: run holds a run, saved last at step 1. To continue it: castalia train run (or "
        "checkpoint.resume=run). To begin a new one: set another checkpoint.dir, or move this folder away."
    ]
    assert find_obstacles(load_config([SOUND]), writes=False) == []
    assert find_obstacles(load_run("run")) == []
    other = find_obstacles(
        load_config([SOUND], ["model.num_layers=2", "checkpoint.init_from=run", "checkpoint.dir=other"])
    )
    assert [each.kind for each in other] == ["error"]
    assert "model.num_layers: 1 in the checkpoint, 2 in the config" in other[0].text


def test_a_plain_config_is_checked_without_torch(here):
    (here / "a.yml").write_text(json.dumps(SOUND))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "sys.argv = ['castalia', 'config', 'check', 'a.yml', 'data.path=foreign']\n"
        "from castalia.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "foreign holds the token id 9000, but the vocabulary has 257 entries" in done.stderr


def test_text_in_place_of_a_corpus_is_told_how_to_become_one(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a"}')
    (line,) = missing_files(RunConfig().with_({"data.path": str(tmp_path / "own.jsonl")}))
    assert "this is text, no corpus; `castalia data prepare" in line
    assert line.endswith("makes one, data.path=own_text_document")


def test_all_verbs_tell_the_same(here, castalia):
    words = [json.dumps(SOUND), "data.path=gone", "checkpoint.dir=null"]
    (here / "a.yml").write_text(words[0])
    words[0] = "a.yml"
    data = "command line, replacing a.yml:1: data.path=gone: gone.bin and gone.idx are missing; make the corpus"
    code, out, err = castalia("config", "check", *words)
    assert code == 0 and f"missing here: {data}" in err and "not given: no folder" in err
    assert "a.yml data.path=gone checkpoint.dir=null" in out
    assert " ".join(out.split()).endswith("; it would not train here yet: 1 missing here, 1 not given")
    code, out, err = castalia("launch", "slurm", *words, "--gpus-per-node", "2")
    assert code == 0 and f"missing here: {data}" in err and f"\n# missing here: {data}" in out
    assert "not given: no folder" in err and "\n# not given: no folder" in out
    code, out, err = castalia("plan", *words)
    out = re.sub(r"\n  +", " ", out)
    assert code == 0 and f"\nmissing here: {data}" in out and "\nnot given: no folder (castalia config check" in out
    code, out, err = castalia("train", *words)
    assert code == 2 and err.startswith(f"error: {data}") and "\nno folder: checkpoint.dir is not set" in err


@pytest.mark.parametrize("verb", ["config check", "config show", "plan", "train", "lr-find", "launch slurm"])
def test_an_empty_file_is_no_config(here, castalia, verb):
    (here / "a.yml").write_text("# nothing\n")
    more = ["--gpus-per-node", "1"] if verb == "launch slurm" else []
    code, _, err = castalia(*verb.split(), "a.yml", *more)
    assert (code, err) == (2, "error: a.yml: holds no keys; a config is a mapping such as `train: {steps: 200}`\n")


def test_a_new_run_takes_the_tokenizer_of_the_checkpoint_it_begins_from(here):
    train(load_config([SOUND]))
    words = ["tokenizer.kind=null", "checkpoint.init_from=run", "checkpoint.dir=second"]
    train(load_config([SOUND], words))
    second = load_run("second")
    assert load_tokenizer(second.tokenizer).vocab_size == second.model.vocab_size == 257

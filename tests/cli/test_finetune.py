"""`castalia finetune` and `merge-lora`, from a model that was trained here to one that `transformers` runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.finetune import command as finetune
from castalia.cli.finetune import sample
from castalia.cli.merge_lora import command as merge
from castalia.cli.train import train
from castalia.config.load import load_config, load_run
from castalia.config.schema import TokenizerConfig
from castalia.data.prepare import Recipe, prepare
from castalia.data.tokenizer import train_bpe
from castalia.errors import CastaliaError, CheckpointError, ConfigError, DataError, TrainingError
from castalia.parallel.executor import Rows

ANSWERS = {"Who was the first?": "Adam", "And Noah built what?": "it"}
FAST = ["optimizer.lr=0.01", "train.epochs=200", "precision.compute=fp32", "log.peak_tflops=0.1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run whose model has seen a few words."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    text = "in the beginning Adam was the first, and Noah built it, and Moses led them. user: assistant: Who? "
    (folder / "text.txt").write_text(text * 30)
    train_bpe([text], 300).save(folder)
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer.json"))
    prepare([folder / "text.txt"], folder / "corpus", Recipe(tokenizer))
    keys = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_multiple": 1, "parallel_residual": True},
        "tokenizer": {"path": tokenizer.path},
        "data": {"train": [str(folder / "corpus_text_document")], "seq_length": 48},
        "train": {"steps": 60, "batch_size": 4},
        "optimizer": {"lr": 0.01},
        "precision": {"compute": "fp32"},
        "log": {"peak_tflops": 0.1},
        "checkpoint": {"dir": str(folder / "run")},
    }
    return Path(train(load_config([keys])))


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("lessons") / "teach.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ]
    file.write_text("\n".join(map(json.dumps, turns)))
    return file


@pytest.fixture(scope="module")
def taught(base, lessons, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("taught") / "run"
    finetune(str(base), [f"data.train={lessons}", f"checkpoint.dir={run}", *FAST], lora=8)
    return run


def test_another_tokenizer_takes_the_place_of_the_models_own(base, lessons, tmp_path):
    copy, words = tmp_path / "base", tmp_path / "words"
    shutil.copytree(base, copy)
    (copy / "tokenizer").rename(words)
    options = [f"data.train={lessons}", f"checkpoint.dir={tmp_path / 'run'}", "train.steps=1", "log.peak_tflops=0.1"]
    with pytest.raises(CastaliaError, match="tokenizer"):
        finetune(str(copy), options)
    finetune(str(copy), [*options, f"tokenizer.path={words}"])
    assert load_run(tmp_path / "run").tokenizer.path == str(tmp_path / "run" / "tokenizer")


def asked(question: str) -> str:
    return f"user: {question}\nassistant:"


def test_adapters_learn_the_answers_and_all_forms_of_the_model_give_them(taught, base, tmp_path):
    answers = {question: sample(str(taught), asked(question), 8) for question in ANSWERS}
    assert {question: answer.strip() for question, answer in answers.items()} == ANSWERS
    assert "Adam" not in sample(str(base), asked("Who was the first?"), 8)
    for form in ("hf", "neox", "native"):
        merge(str(taught), tmp_path / form, to=form, verify=True)
        assert {question: sample(str(tmp_path / form), asked(question), 8) for question in ANSWERS} == answers
    merge(str(taught / "adapter"), tmp_path / "again", to="hf")  # the folder in PEFT's layout
    assert sample(str(tmp_path / "again"), asked("And Noah built what?"), 8).strip() == "it"
    model, words = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = words(asked("And Noah built what?"), return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert words.decode(written, skip_special_tokens=True) == answers["And Noah built what?"]


def test_before_and_after_are_shown(base, lessons, tmp_path, capsys):
    finetune(str(base), [f"data.train={lessons}", f"checkpoint.dir={tmp_path / 'run'}", *FAST], full=True)
    said = capsys.readouterr().out
    before, after = said.split("\nbefore  ")[1].split("\nafter   ")
    assert before.startswith(asked("Who was the first?")) and "Adam\n" not in before
    assert after.strip() == asked("Who was the first?") + " Adam"
    assert open_checkpoint(tmp_path / "run", adapters=True).config.finetune.lora is None
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_same_command_of_a_requeued_job_goes_on(base, lessons, tmp_path, monkeypatch, capsys):
    words = [f"data.train={lessons}", f"checkpoint.dir={tmp_path / 'run'}", "log.peak_tflops=0.1"]
    words += ["train.epochs=6", "train.exit_interval=4"]
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    finetune(str(base), words, prompt="user:")
    corpus = tmp_path / "run" / "data" / "train0_messages_document.bin"
    before = corpus.stat()
    finetune(str(base), words, prompt="user:")
    assert corpus.stat() == before and set(saved_steps(tmp_path / "run" / "checkpoints")) == {4, 6}
    for job, given in (("4711", [*words, "optimizer.lr=0.1"]), ("4712", words)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(TrainingError, match="holds a run, saved last at step 6"):
            finetune(str(base), given)
    assert corpus.stat() == before


def test_answers_alone_are_learned(taught):
    from castalia.data.loader import open_data

    rows = Rows.of(open_data(load_run(taught), "train").batch(0))
    assert 0 < int((rows.labels != -100).sum()) < rows.labels.numel() // 3


def test_texts_new_tokens_and_defaults(base, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "Moses led them <sea> and Noah built it"}\n' * 20)
    words = [f"data.train={tmp_path / 'my.jsonl'}", f"checkpoint.dir={tmp_path / 'run'}", "train.epochs=1"]
    finetune(str(base), [*words, 'finetune.add_tokens=["<sea>"]', "log.peak_tflops=0.1"])
    run = open_checkpoint(tmp_path / "run", adapters=True)
    old = open_checkpoint(base).config.model.vocab_size
    assert run.config.finetune.lora.rank == 16 and run.config.optimizer.lr == 2e-4
    assert run.config.model.vocab_size == old + 1 and run.model["embed.weight"].shape[0] == old + 1
    again = load_config(tmp_path / "run" / "finetune.yml")  # what another start would do
    assert again.checkpoint.init_from == str(base) and again.data.train[0].path.endswith("train0_text_document")
    with pytest.raises(CheckpointError, match="more than its adapters was trained"):
        from castalia.checkpoint.convert import plan_files
        from castalia.checkpoint.file_plan import WriteOptions

        plan_files("peft", run, WriteOptions())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "?"}', r"my.jsonl:1: neither a text nor a conversation, but question"),
        ('["text"]', "neither a text nor a conversation, but a list"),
        ("no json", r"my.jsonl:1: not JSON"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "a conversation without an answer"),
    ],
)
def test_files_that_teach_nothing_are_refused(base, tmp_path, line, words):
    (tmp_path / "my.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        finetune(str(base), [f"data.train={tmp_path / 'my.jsonl'}", f"checkpoint.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(DataError, match=r"other.jsonl: neither a text file nor the prefix of a corpus"):
        finetune(str(base), [f"data.train={tmp_path / 'other.jsonl'}", f"checkpoint.dir={tmp_path / 'run'}"])


def test_adapters_of_adapters_are_those_of_the_first_model(taught, base, lessons, tmp_path):
    for number, source in enumerate((taught, taught / "adapter")):
        run = tmp_path / f"more{number}"
        finetune(str(source), [f"data.train={lessons}", f"checkpoint.dir={run}", *FAST, "train.epochs=1"])
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"].startswith(str(base)) and config["r"] == 8
        assert sample(str(run / "adapter"), asked("Who was the first?"), 8).strip() == "Adam"
    with pytest.raises(ConfigError, match="has adapters; merge them first"):
        finetune(str(taught), [f"data.train={lessons}"], full=True)


def test_what_excludes_each_other_is_refused(base, lessons, tmp_path):
    with pytest.raises(ConfigError, match="--full and --lora exclude each other"):
        finetune(str(base), [f"data.train={lessons}"], lora=4, full=True)
    with pytest.raises(ConfigError, match=r"Give data\.train=FILE"):
        finetune(str(base), [f"checkpoint.dir={tmp_path / 'run'}"])
    with pytest.raises(CheckpointError, match="has no adapters to merge"):
        merge(str(base), tmp_path / "out")


def test_an_adapter_that_names_no_model_is_merged_into_the_one_that_is_given(taught, base, tmp_path):
    lost = tmp_path / "lost"
    lost.mkdir()
    config = json.loads((taught / "adapter" / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    name = "adapter_model.safetensors"
    (lost / name).write_bytes((taught / "adapter" / name).read_bytes())
    with pytest.raises(CheckpointError, match="--base"):
        merge(str(lost), tmp_path / "out")
    merge(str(lost), tmp_path / "out", base=str(base), dtype="bf16", verify=True)
    assert sample(str(tmp_path / "out"), asked("Who was the first?"), 8).strip() == "Adam"

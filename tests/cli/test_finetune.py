"""`castalia finetune` and `merge-lora`, from a model that was trained here to one that `transformers` runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.cli.finetune import command as finetune
from castalia.cli.merge_lora import command as merge
from castalia.cli.train import train
from castalia.config.load import load_config, load_run
from castalia.config.objective import needs_reference
from castalia.config.schema import TokenizerConfig
from castalia.data.chat import chat_of
from castalia.data.pairs import open_samples
from castalia.data.prepare import Recipe, prepare
from castalia.data.tokenizer import load_tokenizer, train_bpe
from castalia.errors import CastaliaError, CheckpointError, ConfigError, DataError, TrainingError
from castalia.finetuning.lessons import PLAIN_TEMPLATE
from castalia.generate.dialogue import turn_ends
from castalia.generate.generation import generate
from castalia.language_model import load_model
from castalia.observe.metrics import read_metrics
from castalia.parallel.executor import Rows

ANSWERS = {"Who was the first?": "Adam", "And Noah built what?": "it"}
FAST = ["optimizer.lr=0.01", "train.epochs=200", "precision.compute=fp32", "log.peak_tflops=0.1"]


def sample(path: str, prompt: str, max_tokens: int) -> str:
    """The likeliest text after a prompt."""
    words = load_tokenizer_for(open_checkpoint(path))
    return generate(load_model(path), words, [words.encode(prompt)], max_tokens=max_tokens, stop=("\n",))[0]


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
    finetune(str(base), [str(lessons), f"checkpoint.dir={run}", *FAST], lora=8)
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
    assert words.decode(written, skip_special_tokens=True).strip() == answers["And Noah built what?"].strip()


def test_before_and_after_are_shown(base, lessons, tmp_path, capsys):
    finetune(str(base), [str(lessons), f"data.valid={lessons}", f"checkpoint.dir={tmp_path / 'run'}", *FAST], full=True)
    said = capsys.readouterr().out
    table, samples = said.split("on held-out answers:")[1].split("prompt", 1)
    before, after = (float(cell) for cell in re.findall(r"loss +([\d.]+) +([\d.]+)", table)[0])
    assert before > 2 > 0.5 > after
    evaluated = [record["valid_loss"] for record in read_metrics(tmp_path / "run") if "valid_loss" in record]
    assert evaluated[-1] == pytest.approx(after, abs=1e-4)  # the figure that training gave
    assert "in the data    Adam" in samples and re.search(r"after step \d+ +Adam\n", samples)
    assert not re.search(r"before +Adam", samples)
    assert open_checkpoint(tmp_path / "run", adapters=True).config.finetune.lora is None
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_same_command_goes_on(base, lessons, tmp_path, capsys):
    words = [str(lessons), f"checkpoint.dir={tmp_path / 'run'}", "log.peak_tflops=0.1", "train.epochs=6"]
    stopping = [*words, "train.exit_interval=4"]
    finetune(str(base), stopping, prompt="user:")
    corpus = tmp_path / "run" / "data" / "train0_answer_document.bin"
    before = corpus.stat()
    finetune(str(base), stopping, prompt="user:")
    assert corpus.stat() == before and set(saved_steps(tmp_path / "run" / "checkpoints")) == {4, 6}
    capsys.readouterr()
    finetune(str(base), stopping, prompt="user:")
    assert "the run is complete" in capsys.readouterr().out
    other = "another command began:\n  optimizer.lr: nothing then, 0.1 now\nTo continue"
    with pytest.raises(TrainingError, match=other):
        finetune(str(base), [*stopping, "optimizer.lr=0.1"])
    lessons.with_name("other.jsonl").write_bytes(lessons.read_bytes())
    with pytest.raises(TrainingError, match=r'data.train: \[".*teach.jsonl"\] then, \[".*other.jsonl"\] now'):
        finetune(str(base), [str(lessons.with_name("other.jsonl")), *stopping[1:]])
    with pytest.raises(DataError, match="nochat.jsonl: there is no such file"):  # said first
        finetune(str(base), ["nochat.jsonl", *stopping[1:]])
    assert corpus.stat() == before


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again_on_two_processes(base, lessons, tmp_path):
    run, files = tmp_path / "run", [str(lessons), f"data.valid={lessons}"]
    words = ["finetune", str(base), *files, f"checkpoint.dir={run}", "train.steps=150", "eval.every=50", *FAST[:1]]
    command = [sys.executable, "-m", "castalia", *words, "precision.compute=fp32", "train.batch_size=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        while first.poll() is None and not (saved_lines := lines_of(run / "metrics.jsonl")):
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGINT)  # to all of its processes, as a terminal sends it
        said = first.communicate(timeout=120)[0]
    assert first.returncode == 128 + signal.SIGINT and "stopped by SIGINT after step" in said, said
    assert saved_lines < 150 and "on held-out" not in said
    again = subprocess.run([*command, "--nproc", "2"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "restored      weights" in again.stdout and "DP 2 on 2 processes" in again.stdout
    loss = re.search(r"loss +[\d.]+ +([\d.]+)\n", again.stdout.split("on held-out answers:")[1])
    records = list(read_metrics(run))
    assert loss and float(loss[1]) == pytest.approx(records[-1]["valid_loss"], abs=2e-4)
    assert [record["step"] for record in records] == list(range(1, 151))
    assert load_model(run / "adapter").cfg == load_model(run).cfg


def lines_of(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_a_folder_of_another_run_is_left_alone(base, lessons, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    with pytest.raises(TrainingError, match="holds a run, saved last at step 60"):
        finetune(str(base), [str(lessons), f"checkpoint.dir={tmp_path / 'run'}"])


def test_answers_alone_are_learned(taught):
    from castalia.data.config_corpora import open_data

    rows = Rows.of(open_data(load_run(taught), "train").batch(0))
    assert 0 < int((rows.labels != -100).sum()) < rows.labels.numel() // 3


def test_texts_new_tokens_and_defaults(base, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "Moses led them <sea> and Noah built it"}\n' * 19)
    words = [f"data.train={tmp_path / 'my.jsonl'}", f"checkpoint.dir={tmp_path / 'run'}", "train.epochs=1"]
    finetune(str(base), [*words, 'finetune.add_tokens=["<sea>"]', "log.peak_tflops=0.1"])
    run = open_checkpoint(tmp_path / "run", adapters=True)
    old = open_checkpoint(base).config.model.vocab_size
    assert run.config.finetune.lora.rank == 16 and run.config.optimizer.lr == 2e-4
    assert run.config.model.vocab_size == old + 1 and run.model["embed.weight"].shape[0] == old + 1
    again = load_config(tmp_path / "run" / "finetune.yml")  # what another start would do
    assert again.checkpoint.init_from == str(base) and again.data.train[0].path.endswith("train0_text_document")
    text = (tmp_path / "run" / "finetune.yml").read_text()
    assert len(text.splitlines()) < 60 and "# as you asked" in text
    with pytest.raises(CheckpointError, match="more than its adapters was trained"):
        from castalia.checkpoint.convert import plan_files
        from castalia.checkpoint.file_plan import WriteOptions

        plan_files("peft", run, WriteOptions())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "?"}', r"my.jsonl:1: the fields question, and not what one can learn from, such as"),
        ('["text"]', "a list, and not what one can learn from"),
        ("no json", r"my.jsonl:1: not JSON"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "without an answer.*--skip-bad"),
        ("", "the file is empty"),
        ('{"prompt": "?", "chosen": "a", "rejected": "b"}', "say what to make of them with --objective: dpo, orpo"),
        ('{"prompt": "?", "completion": "a", "label": true}', "--objective kto learns from both"),
    ],
)
def test_files_that_teach_nothing_are_refused(base, tmp_path, line, words):
    (tmp_path / "my.jsonl").write_text(line + "\n" if line else "")
    with pytest.raises(DataError, match=words):
        finetune(str(base), [str(tmp_path / "my.jsonl"), f"checkpoint.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_files_that_are_misplaced_or_missing_are_called_so(base, lessons, tmp_path):
    (tmp_path / "run.yml").write_text("optimizer: {lr: 0.1}\n")
    place = f"checkpoint.dir={tmp_path / 'run'}"
    for given, message in (
        ([f"data.train={tmp_path / 'other.jsonl'}"], r"other.jsonl: there is no such file, nor a corpus of that name"),
        ([f"{tmp_path / 'other.jsonl'}"], r"other.jsonl: there is no such file"),
        ([f"data.train={tmp_path / 'run.yml'}"], r"run.yml is a config, no data: name it after the data"),
        ([f"data.train={tmp_path}"], "is a folder; name the files in it"),
        ([str(lessons), f"data.train={lessons}"], "both name what is learned; keep one"),
        ([place], "Give a file after the model"),
    ):
        with pytest.raises(CastaliaError, match=message):
            finetune(str(base), [*given, place])
    with pytest.raises(ConfigError, match=r"holds data; the model comes first: castalia finetune MODEL"):
        finetune(str(lessons), [str(base)])
    with pytest.raises(
        ConfigError, match=r"teach.jsonl holds data, not settings: castalia finetune MODEL .*teach.jsonl"
    ):
        load_config([str(lessons)])
    assert not (tmp_path / "run").exists()


def test_bad_records_are_left_out_where_that_is_asked_for(base, lessons, tmp_path, capsys):
    (tmp_path / "my.jsonl").write_text(lessons.read_text() + '\n{"messages": []}\n')
    words = [str(tmp_path / "my.jsonl"), f"checkpoint.dir={tmp_path / 'run'}", "train.steps=1", "log.peak_tflops=0.1"]
    with pytest.raises(DataError, match=r"my.jsonl:3: .*--skip-bad"):
        finetune(str(base), words)
    finetune(str(base), words, skip_bad=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 conversations" in said and "left out 1 that cannot be read" in said


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "reward"])
def test_preferences(base, tmp_path, capsys, objective):
    pairs = [{"prompt": f"Who {n}?", "chosen": f" Adam{n}", "rejected": f" Noah{n}"} for n in range(25)]
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    words = [
        str(tmp_path / "prefs.jsonl"),
        f"checkpoint.dir={tmp_path / 'run'}",
        "train.epochs=2",
        *FAST[:1],
        *FAST[2:],
    ]
    if objective == "orpo":  # as settings
        finetune(str(base), [*words, "train.objective=orpo", "data.packing=unpacked"])
    else:
        finetune(str(base), words, objective=objective)
    said = capsys.readouterr().out
    config = load_run(tmp_path / "run")
    held = 2 if objective == "kto" else 1  # both answers to one question, which stay together
    assert f"held out       {held} of {50 if objective == 'kto' else 25}" in said
    assert ("log-probabilities of" in said) == (objective in ("dpo", "kto")) and not needs_reference(config)
    last = list(read_metrics(tmp_path / "run"))[-1]
    assert last["accuracy"] > 0.5 and {"margin", "valid_accuracy", "valid_margin"} <= last.keys()
    assert re.search(r"step +\d+/\d+ .* margin .* accuracy ", " ".join(said.split()))
    table = said.split("on held-out preferences:")[1]
    before, after = re.findall(r"margin +(\S+) +(\S+)", table)[0]
    assert (before == "-") == (objective == "reward") and float(after) == pytest.approx(last["valid_margin"], abs=1e-3)
    assert "Who" in decoded(config)


def test_a_config_file_and_its_notes(base, lessons, tmp_path, capsys):
    (tmp_path / "my.yml").write_text("finetune: {lora: {targets: [q_proj, v_proj]}}\noptimizer: {lr: 0.003}\n")
    place = f"checkpoint.dir={tmp_path / 'run'}"
    words = [str(lessons), str(tmp_path / "my.yml"), place, "train.steps=1", "log.peak_tflops=0.1"]
    finetune(str(base), words, lora=4)
    assert "q_proj and v_proj lie in one matrix here" in " ".join(capsys.readouterr().out.split())
    lora = load_run(tmp_path / "run").finetune.lora
    assert (lora.rank, lora.targets) == (4, ("attn.qkv",))
    assert re.search(r"# from .*my.yml:2\n +lr: 0.003\n", (tmp_path / "run" / "finetune.yml").read_text())


def test_a_short_run_keeps_its_reference_model(base, tmp_path, capsys):
    pairs = [{"prompt": f"Who {n}?", "chosen": f" Adam{n}", "rejected": f" Noah{n}"} for n in range(25)]
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    words = [str(tmp_path / "prefs.jsonl"), f"checkpoint.dir={tmp_path / 'run'}", "train.steps=2", *FAST[:1], *FAST[2:]]
    finetune(str(base), words, objective="dpo")
    said = capsys.readouterr().out
    assert "log-probabilities of" not in said and needs_reference(load_run(tmp_path / "run"))
    before, after = re.findall(r"loss +(\S+) +(\S+)", said.split("on held-out preferences:")[1])[0]
    assert float(before) == pytest.approx(0.6931, abs=1e-4) and after != before


def decoded(config) -> str:
    """The first sequence that a run trains on."""
    return load_tokenizer(config.tokenizer).decode(open_samples(config).batch(0).tokens[0].tolist())


def test_a_run_without_a_template_carries_the_one_that_it_learned(taught):
    words = load_tokenizer_for(open_checkpoint(taught))
    assert words.folder.template == PLAIN_TEMPLATE
    assert turn_ends(chat_of(words), words) == ("\nuser:",)


def test_adapters_of_adapters_are_those_of_the_first_model(taught, base, lessons, tmp_path):
    for number, source in enumerate((taught, taught / "adapter")):
        run = tmp_path / f"more{number}"
        finetune(str(source), [str(lessons), f"checkpoint.dir={run}", *FAST, "train.epochs=1"])
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"].startswith(str(base)) and config["r"] == 8
        assert sample(str(run / "adapter"), asked("Who was the first?"), 8).strip() == "Adam"
    with pytest.raises(ConfigError, match="has adapters; merge them first"):
        finetune(str(taught), [f"data.train={lessons}"], full=True)


def test_what_excludes_each_other_is_refused(base, lessons, tmp_path):
    with pytest.raises(ConfigError, match="--full and --lora exclude each other"):
        finetune(str(base), [str(lessons)], lora=4, full=True)
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

"""What is said before the first step agrees with plan, and tells what a checkpoint gave and why the rest is new."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import optimizer_state
from castalia.cli.train import read_config, train
from castalia.config.load import dump_config, load_config
from castalia.data.dataset_writer import DatasetWriter
from castalia.errors import ConfigError, DataError
from castalia.plan.run_description import attention
from castalia.plan.run_plan import training, warnings
from castalia.train.dry_run import rehearse
from castalia.train.run_facts import collect_run_facts, num_kept_checkpoints
from castalia.train.run_header import HEADER, MOST_LINES, planned_layout, restoration_rows, run_facts_of, summary_lines
from castalia.train.setup import start
from castalia.wrapping import WIDTH


def rows(session):
    return {what: (how, why) for what, how, why in restoration_rows(session)}


def test_plan_and_training_say_the_same(tiny, tmp_path):
    config = tiny(tmp_path / "run", "schedule.decay_steps=10", "checkpoint.keep_last=1", "data.split=1,0,0")
    session = start(config)
    said = dict(summary_lines(session, tmp_path / "run", run_facts_of(session), planned_layout(session)))
    (tmp_path / "config.yml").write_text(dump_config(config))
    words = ["plan", str(tmp_path / "config.yml"), "--vocab-size", "257", "--json", "--gpus", "cpu"]
    plan = json.loads(subprocess.run([sys.executable, "-m", "castalia", *words], capture_output=True, text=True).stdout)
    training = plan["training"]
    for name in ("clipping", "precision", "attention", "logged", "evaluated"):
        assert said[name] == training[name]
    assert said["disk"].startswith("1 checkpoint takes") and training["checkpoints_kept"] == 1
    assert said["batch"].startswith(f"8 sequences x 16 = {training['tokens_per_step']} tokens a step")
    own = warnings(session.config, run_facts_of(session), planned_layout(session))
    assert len(plan["warnings"]) == len(own) == 2
    for there, here in zip(plan["warnings"], own, strict=True):
        assert there.endswith(here.rpartition("command line: ")[2])  # only the places differ
    assert f"{training['epochs'][config.data.path]:.2f} of" in said["epochs"]


def test_a_native_resume_restores_everything(straight):
    session = start(read_config([str(straight), "checkpoint.step=10"]))
    told = rows(session)
    assert {how for how, _ in told.values()} == {"restored"}
    assert told["weights"][1] == "28 of 28 tensors"
    assert told["step"][1] == "the next one is 11 of 20"
    fresh = rows(start(read_config([str(straight), "checkpoint.step=10", "checkpoint.load_optimizer=false"])))
    assert fresh["moments"] == ("reset", "checkpoint.load_optimizer=false")


def test_summed_micro_batches_are_divided_and_told(fixtures, tmp_path, capsys):
    """The original's pipeline engine sums; going on with means, its moments would be 2 and 4 times too large."""
    folder = fixtures / "neox" / "pp2-mp1-z0-fp32-rotary-seqres" / "checkpoint"
    source = open_checkpoint(folder)
    data = fixtures / "neox" / "data"
    words = [
        f"data.path={data / 'enwik8_text_document'}",
        f"vocab_file={data / 'tok.json'}",
        f"data.cache_dir={tmp_path}",
    ]
    words += [f"checkpoint.resume={folder}", f"save={tmp_path / 'run'}", "gradient_clipping=0"]
    config = folder / "global_step5" / "configs" / "config.yml"
    for exact, factor in (("true", 1), ("false", 2)):
        session = start(load_config(config, [*words, f"neox_exact={exact}", "train_data_paths=null"]))
        state = optimizer_state(session.optimizer, session.executor.parameters)
        for name, ours in state.items():
            theirs = source.optimizer[name]
            assert torch.equal(ours["exp_avg"], theirs["exp_avg"].read() / factor)
            assert torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"].read() / factor**2)
        assert ("divided by 2 and 2^2" in rows(session)["moments"][1]) == (factor == 2)


def test_a_corpus_of_another_tokenizer_is_refused_before_the_first_step(tiny, tmp_path):
    with DatasetWriter(tmp_path / "foreign", "uint16") as writer:
        for _ in range(50):
            writer.add([1, 2, 3, 50_000] * 10)
    with pytest.raises(ConfigError) as refusal:
        train(tiny(tmp_path / "run", f"data.path={tmp_path / 'foreign'}"))
    assert str(refusal.value).startswith("command line: ")
    for part in ("foreign holds the token id 50000", "the vocabulary has 257 entries", "Prepare it with the tokenizer"):
        assert part in str(refusal.value)
    assert not (tmp_path / "run").exists()


LONG = "of-a-very-long-name-" * 3


@pytest.mark.parametrize("begins", ["new", "resumed", "tuned"])
def test_the_header_has_few_short_lines_and_the_folder_all_of_it(tiny, straight, tmp_path, capsys, begins):
    source = {"new": "checkpoint.resume=null", "resumed": f"checkpoint.resume={straight}"}
    source["tuned"] = f"checkpoint.init_from={straight}"
    more = ["finetune.lora.rank=2"] if begins == "tuned" else ["checkpoint.load_optimizer=false", "train.steps=25"]
    more = [] if begins == "new" else [*more, "checkpoint.schedule_from=config"]
    # Kept apart from the temporary folder, whose path has a length of its own.
    with chdir(tmp_path):
        train(tiny(f"runs/{LONG}", source[begins], "eval.every=null", "train.exit_interval=1", *more))
        text = Path("runs", LONG, HEADER).read_text()
    said = capsys.readouterr().out
    header, _, rest = said.partition("\nmore ")
    assert "\nheld out      6 of 60 documents, chosen by a hash of each" in header
    assert header.count("\n") + 2 <= MOST_LINES and f"runs/{LONG}" in rest.splitlines()[0]
    assert all(len(line) <= WIDTH for line in [*said.splitlines(), *text.splitlines()] if LONG not in line)
    assert f"{torch.get_num_threads()} thread" in header and f"{torch.get_num_threads()} thread" in text
    assert "settings that are not the default:" in text and "settings that are" not in said
    assert ("fp32 masters reset" in " ".join(text.split())) == (begins != "new")


def test_verbose_prints_what_the_folder_holds(tiny, tmp_path, capsys):
    train(tiny(tmp_path / "run", "train.steps=1", "eval.every=null"), verbose=True)
    assert capsys.readouterr().out.startswith((tmp_path / "run" / HEADER).read_text())


def test_a_run_far_too_long_says_so_loudly(tiny, tmp_path, capsys):
    rehearse(tiny(tmp_path / "run", "train.steps=200000", "log.peak_tflops=1e-6"))
    said = capsys.readouterr().out
    assert re.search(r"^THIS RUN TAKES ABOUT [\d,]+ DAYS", said, re.M)
    assert re.search(r"^THIS RUN READS ITS DATA [\d,]+ TIMES", said, re.M)


def test_the_header_comes_before_the_order_of_the_samples(tiny, tmp_path, capsys):
    with DatasetWriter(tmp_path / "one", "uint16") as writer:
        writer.add([7])
    with pytest.raises(DataError, match="nothing to train on"):  # found by whoever works out that order
        train(tiny(tmp_path / "run", f"data.path={tmp_path / 'one'}", "data.split=1,0,0"))
    assert re.search(r"^the run +20 steps", capsys.readouterr().out, re.M)
    assert not (tmp_path / "run").exists()


def test_warnings_appear_before_training(tiny, tmp_path, capsys):
    with DatasetWriter(tmp_path / "one", "uint16") as writer:
        writer.add([*b"in the beginning "] * 10)
    config = tiny(tmp_path / "run", f"data.path={tmp_path / 'one'}", "data.split=1,0,0", "optimizer.clip_norm=null")
    rehearse(config, verbose=True)
    said = " ".join(capsys.readouterr().out.split())
    for part in ("is a single document", "more than 4 passes", "gradients are not clipped", "clipping off"):
        assert part in said
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_far_beyond_the_tokenizer_says_what_a_smaller_one_saves(tiny, tmp_path, capsys):
    rehearse(tiny(tmp_path / "run", "model.vocab_size=9000", "tokenizer.kind=bytes"))
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"ids and the model 9,000 rows for them: model.vocab_size=null .* saves [\d.]+K parameters", said)


def test_kept_checkpoints_are_those_that_a_run_leaves(tiny, tmp_path):
    options = ["checkpoint.every=4", "checkpoint.steps=[0]", "checkpoint.keep_last=2", "checkpoint.keep_every=8"]
    config = tiny(tmp_path / "run", *options, "eval.every=null", "train.steps=18")
    train(config)
    left = list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert num_kept_checkpoints(config.checkpoint, 18) == len(left) == 4
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in left]
    known = collect_run_facts(load_config(tmp_path / "run"))
    assert known.kept_checkpoints == 4
    assert max(sizes) == pytest.approx(12 * 41_920, rel=0.1)  # what plan counts for each, manifest apart


PARTS = {
    "adapters": ["finetune.lora.rank=4"],
    "head": ['finetune.train=["^head"]'],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_run_of_which_a_part_trains_is_as_large_as_planned(tiny, straight, tmp_path, capsys, part):
    options = [f"checkpoint.init_from={straight}", "train.steps=1", "eval.every=null", "precision.compute=fp32"]
    config = tiny(tmp_path / "run", *options, *PARTS[part])
    rehearse(config)
    (off,) = re.findall(r"memory: .*\(([+-]\d+\.\d)%\)", capsys.readouterr().out)
    assert abs(float(off)) < 10
    session = start(config)
    planned = training(session.config, run_facts_of(session), planned_layout(session)).checkpoints_bytes
    train(config)
    tensors = (tmp_path / "run" / "checkpoints").glob("step_*/*.safetensors")
    assert sum(file.stat().st_size for file in tensors) == pytest.approx(planned, rel=0.1)


def test_biases_that_balance_experts_are_not_a_part_that_does_not_train(tiny, tmp_path, capsys):
    config = tiny(tmp_path / "run", "model.experts={count: 4, width: 16, router: balanced}", "train.steps=1")
    rehearse(config)
    assert not re.search(r"of [\d,]+ train\b", capsys.readouterr().out)


KERNELS = [
    ([], 1),
    (["model.attention_dropout=0.1"], 0),
    (["model.position=alibi"], 1),
    (["model.sliding_window=4"], 1),
    (["model.num_kv_heads=2"], 1),
]


@pytest.mark.parametrize(("overrides", "chosen"), KERNELS)
def test_the_named_kernel_is_the_one_that_torch_takes_on_cpus(tiny, tmp_path, overrides, chosen):
    config = tiny(tmp_path / "run", *overrides)
    model, text = config.model, attention(config, "cpu")
    q = torch.randn(2, model.num_heads, 16, model.head_size)
    k = torch.randn(2, model.kv_heads, 16, model.head_size)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool) if "with a mask" in text else None
    grouped = model.kv_heads < model.num_heads
    took = torch._fused_sdp_choice(q, k, k, mask, model.attention_dropout, mask is None, enable_gqa=grouped)
    assert took == chosen
    assert text.startswith("flash kernel" if chosen else "plain kernel")
    assert ("with a mask" in text) == any("alibi" in o or "window" in o for o in overrides)


def test_kernels_of_gpus_name_their_reason(tiny, tmp_path):
    def text(*overrides, capability=(8, 0)):
        return attention(tiny(tmp_path / "run", *overrides), "cuda", capability)

    bf16 = "precision.compute=bf16"
    assert text(bf16, "model.num_heads=2").startswith("flash kernel; causal")
    assert text(bf16, "model.num_heads=2", capability=(9, 0)).startswith("cuDNN kernel; causal")
    assert text(bf16, "model.num_heads=2", "train.deterministic=true", capability=(9, 0)).startswith("flash kernel;")
    assert "memory-efficient kernel, instead of flash: flash needs 16-bit compute;" in text()
    masked = text(bf16, "model.num_heads=2", "data.mask_documents=true")
    assert "memory-efficient kernel, instead of flash: flash takes no mask; causal with a mask for doc" in masked
    assert "keys and values repeated for each query head" in text("model.num_kv_heads=2")
    assert "all scores are made" in text(bf16, capability=(7, 0))
    assert "the last of 4 context ranks attends 1.75 times as much as the mean" in text("parallel.cp=4")

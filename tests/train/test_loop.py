import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.cli.train import read_config, train
from castalia.config.load import dump_config, load_config
from castalia.data.config_corpora import open_data
from castalia.errors import CastaliaError, CheckpointError, ConfigError, Stopped, TrainingError
from castalia.observe.metrics import read_metrics, write_event
from castalia.plan.run_plan import RunFacts, report
from castalia.train.dry_run import rehearse
from castalia.train.run_folder import complete_config, restart_line, this_job, was_started_by
from castalia.tune.replay import replay
from tests.train.evaluation_hook import at_evaluation, signal_at_micro_batch

ROOT = Path(__file__).parents[2]
DROPOUT = ("model.hidden_dropout=0.1", "precision.compute=bf16")


def losses(folder):
    return [
        (record["step"], record["loss"], record["grad_norm"], record["lr"]) for record in read_metrics(Path(folder))
    ]


def tensors(path):
    """Everything that a checkpoint holds, by name."""
    checkpoint = open_checkpoint(path)
    found = {name: reference.read() for name, reference in checkpoint.model.items()}
    for name, state in (checkpoint.optimizer or {}).items():
        found |= {f"{name}.{kind}": state[kind].read() for kind in ("exp_avg", "exp_avg_sq")}
        found[f"{name}.step"] = torch.tensor(state["step"])
    return found


def assert_equal_runs(first, second):
    assert losses(first) == losses(second)
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert open_checkpoint(first).progress == open_checkpoint(second).progress


def events(folder):
    return [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_complete_folder(straight, tiny, corpus):
    assert sorted(path.name for path in straight.iterdir()) == [
        "checkpoints", "config.yml", "events.jsonl", "header.txt", "metrics.jsonl", "tokenizer",
    ]  # fmt: skip
    records = list(read_metrics(straight))
    assert [record["step"] for record in records] == list(range(1, 21))
    assert records[-1].keys() >= {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert records[-1]["tokens"] == 20 * 8 * 16
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert [record["step"] for record in records if "valid_loss" in record] == [5, 10, 15, 20]
    assert [event["step"] for event in events(straight) if event["event"] == "save"] == [10, 20]
    config = load_config(straight)
    assert config.model.vocab_size == 257
    assert config.model.max_positions == 16
    assert config.data.path == str(corpus)
    assert "path: tokenizer\n" in (straight / "config.yml").read_text()
    assert config.tokenizer.path == str(straight / "tokenizer")


def test_the_report_tells_all_that_matters(tiny, tmp_path, capfd):
    rehearse(tiny(tmp_path / "run", "schedule.warmup=0.01", "schedule.decay_steps=10", "checkpoint.steps=[0,3]"), True)
    said, errors = capfd.readouterr()
    said = " ".join(said.split())
    assert "USDT" not in errors
    assert not (tmp_path / "run").exists()
    for part in (
        "data.seq_length 16 command line",
        "41,920 parameters, vocabulary 257 padded to 257",
        "8 sequences x 16 = 128 tokens a step (micro-batch 4 x accumulation 2)",
        "0.01 first, 0 last, 0.01 at most; cosine until step 10",
        "the warm-up is shorter than a step",
        "gradients are scaled down to a norm of 1",
        "fp32 compute",
        "every 10 steps; at steps 0, 3; after 15 minutes without a save; the best by validation loss is kept; at",
        "TRAINING BEGINS FROM RANDOM WEIGHTS: 41.92K parameters, nothing was loaded",
        "would give 5.5491, ln(vocabulary)",
        "dry run: the folder of the run was not touched",
    ):
        assert part in said


def test_a_first_start_of_a_config_that_resumes_its_own_folder(tiny, tmp_path):
    """As GPT-NeoX has it, with `load` and `save` alike: there is no step yet whose evaluation was cut short."""
    run = tmp_path / "run"
    train(tiny(run, f"checkpoint.resume={run}", "train.steps=2", "eval.every=1"))
    assert ["valid_loss" in record for record in read_metrics(run)] == [True, True]


KILLED = """
import os, sys, time
from pathlib import Path
from castalia.config.load import load_config
from castalia.train.loop import train
from tests.train.evaluation_hook import at_evaluation

def die(tokens):  # called in step 15; the checkpoint of step 10 is being written
    while not (Path(sys.argv[1]) / "run/checkpoints/latest").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)

with at_evaluation(die):
    train(load_config(Path(sys.argv[1]) / "config.yml"))
"""


def test_killed_and_resumed_is_bit_equal_to_never_stopped(straight, tiny, tmp_path):
    config = tiny(tmp_path / "run", *DROPOUT, "eval.every=15")
    (tmp_path / "config.yml").write_text(dump_config(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(losses(tmp_path / "run")) == 15  # more than the checkpoint holds
    train(read_config([str(tmp_path / "run")]))
    assert_equal_runs(tmp_path / "run", straight)


def test_exit_interval_and_signals_save_and_stop(straight, tiny, tmp_path, capsys):
    config = tiny(tmp_path / "run", *DROPOUT, "train.exit_interval=4")
    train(config)
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    again = read_config([str(tmp_path / "run"), "train.exit_interval=null", "eval.every=7"])
    with pytest.raises(Stopped) as stopped, at_evaluation(lambda tokens: signal.raise_signal(signal.SIGTERM)):
        train(again)
    assert stopped.value.signal == signal.SIGTERM
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]
    last = "stopped by SIGTERM after step 7 of 20, which is saved\nto continue: castalia train"
    assert last in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(read_config([str(tmp_path / "run"), "eval.every=5"]))
    assert_equal_runs(tmp_path / "run", straight)


def stop():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("begun", [0, 7])  # whole steps before the signal
def test_a_signal_between_micro_batches_leaves_the_step_as_if_it_had_not_begun(straight, tiny, tmp_path, begun, capsys):
    config = tiny(tmp_path / "run", *DROPOUT)
    with pytest.raises(Stopped), signal_at_micro_batch(2 * begun + 1, stop):  # the first of two
        train(config)
    assert f"stopped by SIGTERM after step {begun} of 20, which is saved\n" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "run").progress.step == begun == len(losses(tmp_path / "run"))
    train(read_config([str(tmp_path / "run")]))
    assert_equal_runs(tmp_path / "run", straight)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_signal_in_the_last_micro_batch_of_a_run(tiny, tmp_path, evaluates, capsys):
    """The run is done, unless its last evaluation is left."""
    config = tiny(tmp_path / "run", "train.steps=2", "eval.every=null", f"eval.at_end={str(evaluates).lower()}")
    with signal_at_micro_batch(4, stop):
        if not evaluates:
            train(config)
            assert "done: 2 steps" in capsys.readouterr().out
            assert events(tmp_path / "run")[-1]["event"] == "end"
            return
        with pytest.raises(Stopped):
            train(config)
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 2 of 2, which is saved and still to be evaluated" in said
    assert "done" not in said
    train(read_config([str(tmp_path / "run")]))
    assert "valid_loss" in list(read_metrics(tmp_path / "run"))[-1]


@pytest.mark.parametrize("options", [[], ["checkpoint.every=5"]], ids=["unsaved", "saved"])
def test_a_signal_cuts_an_evaluation_short_and_the_next_start_makes_up_for_it(tiny, tmp_path, options):
    config = tiny(tmp_path / "run", "eval.batches=3", "log.csv=true", "train.steps=10", *options)
    straight = tmp_path / "straight"
    train(tiny(straight, "eval.batches=3", "log.csv=true", "train.steps=10"))
    seen, before = 0, []

    def stop(tokens):
        nonlocal seen
        if not seen:
            before.extend(event["event"] for event in events(tmp_path / "run"))
            signal.raise_signal(signal.SIGTERM)
        seen += len(tokens)

    with pytest.raises(Stopped), at_evaluation(stop):
        train(config)
    assert seen == 8  # one batch of three
    assert ("save" in before) == bool(options)  # what is to be saved is saved first
    assert open_checkpoint(tmp_path / "run").progress.step == 5
    records = list(read_metrics(tmp_path / "run"))
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert "valid_loss" not in records[-1]
    train(read_config([str(tmp_path / "run")]))
    found, wanted = ([r.get("valid_loss") for r in read_metrics(folder)] for folder in (tmp_path / "run", straight))
    assert found == wanted and found[4] is not None
    rows, expected = ((folder / "metrics.csv").read_text().splitlines() for folder in (tmp_path / "run", straight))
    assert [row.split(",")[0] for row in rows] == [row.split(",")[0] for row in expected]


@pytest.mark.parametrize(("name", "launched"), [("SIGUSR1", False), ("SIGINT", False), ("SIGUSR2", True)])
def test_a_run_that_a_signal_ends_is_saved_and_says_so_by_its_exit_code(tiny, tmp_path, name, launched):
    (tmp_path / "config.yml").write_text(dump_config(tiny(tmp_path / "run", "train.steps=100000", "log.every=1")))
    command = [sys.executable, "-m", "castalia", "train", str(tmp_path / "config.yml")]
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment = os.environ | (alone | {"TORCHELASTIC_RUN_ID": "job"} if launched else {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.Signals[name])
    printed, errors = process.communicate(timeout=120)
    # A launcher that was not told would start a process again that fails.
    assert process.returncode == (0 if launched else 128 + signal.Signals[name])
    assert errors == f"{name}: stopping after this micro-batch; again to stop at once\n"
    assert f"stopped by {name} after step" in printed
    assert open_checkpoint(tmp_path / "run").progress.step == len(losses(tmp_path / "run"))


def test_a_run_ends_when_its_hours_are_over(tiny, tmp_path, capsys):
    begin = time.monotonic()
    train(tiny(tmp_path / "run", "train.steps=20000", f"train.max_hours={3 / 3600}"))
    assert time.monotonic() - begin >= 2  # the step that would end too late is not begun
    done = open_checkpoint(tmp_path / "run").progress.step
    assert done == len(losses(tmp_path / "run")) < 20_000
    assert f"stopped after step {done:,} of 20,000 (train.max_hours), which is saved" in capsys.readouterr().out
    assert events(tmp_path / "run")[-1] | {"time": 0} == {"event": "stop", "time": 0, "step": done, "signal": None}


def test_a_run_goes_on_when_its_reader_goes_away(tiny, tmp_path):
    (tmp_path / "config.yml").write_text(dump_config(tiny(tmp_path / "run", "train.steps=3", "log.every=1")))
    command = [sys.executable, "-m", "castalia", "train", str(tmp_path / "config.yml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=120)) == (b"", 0)
    assert open_checkpoint(tmp_path / "run").progress.step == 3


def test_resuming_from_an_earlier_step_rewrites_what_came_after(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    train(read_config([str(tmp_path / "run"), "checkpoint.step=10"]))
    assert_equal_runs(tmp_path / "run", straight)


def test_another_batch_size_reads_on_where_the_data_were(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    run = str(tmp_path / "run")
    train(read_config([run, "checkpoint.step=10", "train.batch_size=4", "train.exit_interval=12"]))
    said = " ".join((tmp_path / "run" / "header.txt").read_text().split())
    assert "80 samples are read, and none is read twice or left out: a batch had 8 until here and has 4" in said
    train(read_config([run, "train.batch_size=12", "train.exit_interval=14"]))
    train(read_config([run, "train.exit_interval=15"]))
    data, order = open_data(load_config(run)), open_data(load_config(straight))
    read = [data.positions(step).tolist() for step in range(15)]
    assert [len(batch) for batch in read] == [8] * 10 + [4] * 2 + [12] * 3
    everything = [position for step in range(20) for position in order.positions(step).tolist()]
    assert sum(read, []) == everything[: 80 + 8 + 36]
    told = replay(Path(run), 11)
    assert [row["position"] for row in sorted(told["sequences"], key=lambda row: row["row"])] == read[10]
    assert told["loss"] == told["recorded_loss"]
    train(read_config([run, "checkpoint.step=10", "train.batch_size=8", "train.exit_interval=null"]))
    assert load_config(run).train.earlier_batches == ()
    assert_equal_runs(tmp_path / "run", straight)


def test_passes_over_the_data_end_alike_however_a_run_goes_on(tiny, tmp_path):
    config = tiny(tmp_path / "run", "train.accumulation=2", "data.seq_length=24")
    began, goes_on = open_data(config), open_data(complete_config(config, tmp_path, False, 8))
    assert len(began) % 8 >= 4  # the last micro-batch of a pass is no half of a step
    steps = range(3 * len(began) // 8)
    assert [goes_on.positions(n).tolist() for n in steps] == [began.positions(n).tolist() for n in steps]


def test_resuming_into_another_folder_leaves_the_first_alone(straight, tiny, tmp_path):
    before = (straight / "metrics.jsonl").read_bytes()
    resume = f"checkpoint.resume={straight / 'checkpoints' / 'step_000010'}"
    train(tiny(tmp_path / "run", *DROPOUT, resume))
    assert losses(tmp_path / "run") == losses(straight)[10:]
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_so(straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    train(read_config([str(tmp_path / "run")]))
    assert "the run is complete: 20 of 20 steps" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 20


def test_a_folder_that_holds_a_run_is_refused_naming_both_ways_out(straight, tiny):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run, saved last at step 20.*castalia train .*checkpoint\.dir"):
        train(tiny(straight))
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("variable", "name", "another"),
    [
        ("SLURM_JOB_ID", "4711", "4712"),
        ("TORCHELASTIC_RUN_ID", "4711", "4712"),
        ("HOSTNAME", "tune-0", "tune-0-x7k2p"),  # of an indexed Job of Kubernetes; what pods of others are called
    ],
)
def test_a_job_is_known_by_what_survives_a_requeue(tiny, tmp_path, monkeypatch, variable, name, another):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setenv(variable, name)
    config = tiny(tmp_path / "run")
    assert not was_started_by(this_job("a launcher", config), tmp_path)
    write_event(tmp_path, "start", step=0, **this_job("a launcher", config)._asdict())
    assert was_started_by(this_job("another launcher", config), tmp_path)
    other = tiny(tmp_path / "run", "seed=2")  # not what the first start asked for
    assert not was_started_by(this_job("another launcher", other), tmp_path)
    monkeypatch.setenv(variable, another)
    assert not was_started_by(this_job("another launcher", config), tmp_path)
    assert was_started_by(this_job("a launcher", config), tmp_path)


def test_a_restart_says_how_often_and_from_where(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    job = this_job("a launcher", tiny(tmp_path / "run"))
    assert restart_line(job, 15) == "restart 1 of 3, because a process died: the run continues after step 15"
    assert restart_line(job, 0).endswith(": the run begins anew")


def test_the_same_command_of_a_requeued_job_begins_or_goes_on(tiny, tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path / "run", "eval.every=null", "train.steps=2", "train.exit_interval=1")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for steps in (1, 2):
        train(config)
        assert len(losses(tmp_path / "run")) == steps
    assert capsys.readouterr().out.count("started again by slurm 4711: the run continues after step 1") == 1
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(ConfigError, match="holds a run, saved last at step 2"):
        train(config)


def test_a_folder_in_use_is_refused(straight, tmp_path):

    shutil.copytree(straight, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "checkpoints" / "step_000010" / "manifest.json").write_text("never read")
    with (
        CheckpointSaver(tmp_path / "run" / "checkpoints"),
        pytest.raises(ConfigError, match="in use by another run"),
    ):
        train(read_config([str(tmp_path / "run"), "checkpoint.step=10"]))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@contextmanager
def small_files(num_bytes):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_older_checkpoint(straight, tmp_path, capsys):  # capsys: output goes to no file
    shutil.copytree(straight, tmp_path / "run")
    saved = tensors(tmp_path / "run" / "checkpoints" / "step_000010")
    again = read_config([str(tmp_path / "run"), "checkpoint.step=10", "checkpoint.every=5"])
    with small_files(100_000), pytest.raises(CheckpointError, match="step 15 could not be saved"):
        train(again)  # weights take more
    with small_files(1000), pytest.raises(TrainingError, match="cannot be written.*checkpoints are as they were"):
        train(again)  # config.yml takes more
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step*")) == [
        "step_000010",
        "step_000020",
    ]
    after = tensors(tmp_path / "run" / "checkpoints" / "step_000010")
    assert all(torch.equal(saved[name], after[name]) for name in saved)


def test_a_loss_that_is_not_finite_stops_and_leaves_its_data_in_the_events(tiny, tmp_path):
    config = tiny(tmp_path / "run", "optimizer.lr=1e30", "optimizer.clip_norm=null")
    with pytest.raises(TrainingError, match="is not finite.*first bad tensor is"):
        train(config)
    error = events(tmp_path / "run")[-1]
    step = error["step"] - 1
    data = open_data(config)
    assert error["event"] == "error"
    assert len(losses(tmp_path / "run")) == step
    assert error["samples"] == data.positions(step).tolist()
    assert error["pieces"] == [list(piece) for position in error["samples"] for piece in data.pieces(position)]


def test_weights_alone_start_a_new_run(straight, tiny, tmp_path, capsys):
    train(tiny(tmp_path / "run", f"checkpoint.init_from={straight}", "train.steps=2", "eval.every=null"))
    said = capsys.readouterr().out
    assert "loaded        28 of 28 tensors, 41.92K parameters, Castalia, step 20" in said
    assert "new           fp32 masters, moments, schedule, step, data position" in said
    assert "RANDOM" not in said
    (first, loss, _, _), *_ = losses(tmp_path / "run")
    assert first == 1
    assert loss < losses(straight)[5][1]


def test_the_architecture_comes_from_the_checkpoint_and_differences_are_listed(straight, tiny, corpus, tmp_path):
    bare = [f"data.path={corpus}", "data.seq_length=16", "tokenizer.kind=bytes", "train.batch_size=4", "train.steps=1"]
    bare += [f"checkpoint.init_from={straight}", "eval.every=null"]
    train(load_config([], [*bare, f"checkpoint.dir={tmp_path / 'run'}"]))
    assert load_config(tmp_path / "run").model.hidden_size == 32
    config = tiny(tmp_path / "other", f"checkpoint.init_from={straight}", "model.num_heads=2", "model.norm=rmsnorm")
    with pytest.raises(ConfigError) as refusal:
        train(config)
    assert "model.num_heads: 4 in the checkpoint, 2 in the config (command line" in str(refusal.value)
    assert "model.norm: layernorm in the checkpoint, rmsnorm in the config (command line)" in str(refusal.value)
    assert not (tmp_path / "other").exists()


def test_sequences_longer_than_the_models_positions_are_refused_before_anything_is_loaded(
    straight, tiny, corpus, tmp_path
):
    bare = [f"data.path={corpus}", "data.seq_length=32", "tokenizer.kind=bytes", "train.batch_size=4", "train.steps=1"]
    bare += [f"checkpoint.init_from={straight}", f"checkpoint.dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"data\.seq_length=32 is longer than model\.max_positions=16; shorten it$"):
        train(load_config([], bare))
    with pytest.raises(ConfigError, match="or set model.max_positions=32"):
        train(tiny(tmp_path / "run", "data.seq_length=32", f"checkpoint.init_from={straight}"))
    assert not (tmp_path / "run").exists()


def test_a_load_that_finds_nothing_is_an_error_but_for_the_first_start(tiny, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for key in ("resume", "init_from"):
        with pytest.raises(ConfigError):
            train(tiny(tmp_path / "run", f"checkpoint.{key}={empty}"))
        assert not (tmp_path / "run").exists()
    (empty / "checkpoints").mkdir()
    (empty / "checkpoints" / "latest").write_text("step_000005")  # a folder that only looks like one
    with pytest.raises(ConfigError):
        train(tiny(empty, f"checkpoint.resume={empty}"))
    fresh = tmp_path / "fresh"
    train(tiny(fresh, f"checkpoint.resume={fresh}", "train.steps=2", "eval.every=null"))
    assert "TRAINING BEGINS FROM RANDOM WEIGHTS" in capsys.readouterr().out
    assert len(losses(fresh)) == 2


def test_other_data_and_another_schedule_must_be_asked_for(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    run = str(tmp_path / "run")
    with pytest.raises(TrainingError, match="schedule is not that of the checkpoint .*schedule_from"):
        train(read_config([run, "checkpoint.step=10", "optimizer.lr=0.02"]))
    with pytest.raises(TrainingError, match="other_data=true"):
        train(read_config([run, "checkpoint.step=10", "data.split=80,20,0"]))
    train(read_config([run, "checkpoint.step=10", "data.split=80,20,0", "checkpoint.other_data=true"]))
    assert losses(run)[:10] == losses(straight)[:10]
    assert losses(run)[10:] != losses(straight)[10:]


def test_a_resumed_run_keeps_what_it_held_out_where_its_config_leaves_that_open(tiny, tmp_path):
    words = ["data.holdout=contiguous", "data.shuffled_passes=3"]
    straight = train(tiny(tmp_path / "straight", *words, "eval.every=null"))
    begun = train(tiny(tmp_path / "begun", *words, "eval.every=null", "train.exit_interval=10"))
    train(tiny(tmp_path / "more", f"checkpoint.resume={begun}", "eval.every=null"))
    assert losses(tmp_path / "more") == losses(straight)[10:]
    data = read_config([str(tmp_path / "more")]).data
    assert (data.holdout, data.shuffled_passes) == ("contiguous", 3)
    with pytest.raises(TrainingError, match="other_data=true"):
        train(tiny(tmp_path / "other", f"checkpoint.resume={begun}", "data.holdout=hash", "eval.every=null"))


def test_saves_follow_the_schedule_and_keep_milestones(tiny, tmp_path):
    options = ["checkpoint.every=4", "checkpoint.steps=[0]", "checkpoint.keep_last=2", "checkpoint.keep_every=8"]
    config = tiny(tmp_path / "run", *options, "checkpoint.save_optimizer=false", "eval.every=null", "train.steps=18")
    train(config)
    assert [event["step"] for event in events(tmp_path / "run") if event["event"] == "save"] == [0, 4, 8, 12, 16, 18]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step*"))
    assert kept == ["step_000000", "step_000008", "step_000016", "step_000018"]
    assert open_checkpoint(tmp_path / "run").optimizer is None


def test_a_run_without_a_folder_or_an_end_is_refused(tiny, tmp_path):
    for override, message in (
        ("checkpoint.dir=null", "checkpoint.dir is not set"),
        ("train.steps=null", "train.steps or train.epochs"),
        ("train.device=cuda", "no CUDA device"),
        ("log.tensorboard=" + str(tmp_path / "board"), None),
    ):
        if message is None or (override == "train.device=cuda" and torch.cuda.is_available()):
            continue
        with pytest.raises((ConfigError, CastaliaError), match=message):
            train(tiny(tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_epochs_become_steps(tiny, corpus, tmp_path):
    config = tiny(tmp_path / "run", "train.steps=null", "train.epochs=1", "train.exit_interval=1", "eval.every=null")
    train(config)
    assert load_config(tmp_path / "run").train.steps == open_data(config).steps(1)


def test_tensorboard_gets_what_metrics_get(tiny, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(tmp_path / "run", f"log.tensorboard={tmp_path / 'board'}", "train.steps=2", "eval.every=null"))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    written = [(scalar.step, scalar.value) for scalar in board.Scalars("loss")]
    assert written == [(step, pytest.approx(loss)) for step, loss, _, _ in losses(tmp_path / "run")]


def test_a_run_that_warms_up_goes_on_as_if_never_stopped(tiny, tmp_path):
    warm = ["data.seq_length_warmup={start: 4, steps: 6}", "train.batch_size_warmup={start: 4, steps: 3}"]
    warm += ["train.steps=8", "train.micro_batch_size=2", "checkpoint.every=4", *DROPOUT]
    straight = Path(train(tiny(tmp_path / "straight", *warm)))
    train(tiny(tmp_path / "stopped", *warm, "train.exit_interval=4"))
    train(read_config([str(tmp_path / "stopped")]))
    assert_equal_runs(straight, tmp_path / "stopped")
    tokens = [4 * 4, 4 * 8, 8 * 8, 8 * 12, 8 * 12, 8 * 16, 8 * 16, 8 * 16]
    assert [record["tokens"] for record in read_metrics(straight)] == [sum(tokens[:n]) for n in range(1, 9)]
    planned = report(load_config(straight), RunFacts()).training
    assert planned.tokens == sum(tokens) and planned.tokens_per_step == 8 * 16


def best_of(folder):
    """Step of the lowest validation loss by the record, and of the checkpoint that is called the best."""
    losses = {record["step"]: record["valid_loss"] for record in read_metrics(folder) if "valid_loss" in record}
    return min(losses, key=losses.get), open_checkpoint(folder / "checkpoints" / "best").progress.step


def test_the_best_checkpoint_is_kept_beside_the_last_whatever_is_pruned(tiny, tmp_path):
    options = [
        "optimizer.lr=1.0",
        "schedule.style=constant",
        "eval.every=2",
        "checkpoint.every=4",
        "checkpoint.keep_last=1",
    ]
    run = Path(train(tiny(tmp_path / "run", *options)))
    by_record, kept = best_of(run)
    assert by_record == kept < 20  # such a rate does not end at its best
    assert [path.name for path in run.glob("checkpoints/step_*")] == ["step_000020"]
    assert open_checkpoint(run).progress.step == 20
    tokenizer = load_tokenizer_for(open_checkpoint(run / "checkpoints" / "best"))
    assert tokenizer.decode(tokenizer.encode("the light")) == "the light"


def test_a_best_checkpoint_that_a_kill_kept_from_its_name_gets_it_at_the_next_start(tiny, tmp_path):
    config = tiny(tmp_path / "run", "checkpoint.every=5", "train.exit_interval=10")
    run = Path(train(config))
    before = best_of(run)
    assert before == (10, 10)
    shutil.rmtree(run / "checkpoints" / "best")
    train(read_config([str(run), "train.steps=20"]))
    assert best_of(run) == (20, 20)


def test_without_keep_best_there_is_none(tiny, tmp_path):
    run = Path(train(tiny(tmp_path / "run", "checkpoint.keep_best=false", "train.steps=5")))
    assert not (run / "checkpoints" / "best").exists()


def test_saves_by_time_replace_each_other_and_the_run_goes_on_from_them(tiny, straight, tmp_path):
    options = ["model.hidden_dropout=0.1", "precision.compute=bf16", "checkpoint.save_minutes=1e-9"]
    run = Path(train(tiny(tmp_path / "run", *options, "train.exit_interval=17")))
    assert sorted(path.name for path in run.glob("checkpoints/step_*")) == ["step_000010", "step_000017"]
    assert [event["step"] for event in events(run) if event["event"] == "save"] == [10]
    train(read_config([str(run), "train.exit_interval=null", "checkpoint.save_minutes=null"]))
    assert sorted(path.name for path in run.glob("checkpoints/step_*")) == ["step_000010", "step_000020"]
    assert_equal_runs(run, straight)

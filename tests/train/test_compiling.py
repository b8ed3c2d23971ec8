"""Whether blocks are compiled depends on the config and the kind of device, never on when or where a run goes on."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from castalia.config.schema import complete
from castalia.errors import TrainingError
from castalia.language_model import load_model
from castalia.observe.display import Display
from castalia.parallel import compile
from castalia.train import compiling
from castalia.train.compiling import EAGER_STEPS, CompilePlan, operations_left, plan_compiling
from castalia.train.fast_paths import fast_paths
from castalia.train.loop import TrainingRun, train
from castalia.train.resolve import resolve
from castalia.train.run_folder import continues_in_place, run_folder, this_job
from castalia.train.setup import build_model, load_weights, make_session

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def able(monkeypatch, tmp_path):
    """A machine with everything that compiling needs."""
    monkeypatch.setenv("CC", "true")
    monkeypatch.setattr(compile, "find_spec", lambda name: True)
    monkeypatch.setattr(compile.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()


def trained(config, first):
    """Trains as `castalia train` does, with blocks that are compiled from step `first` on, whatever the device."""
    run = replace(resolve(config), compiling=CompilePlan(first, "a test"))
    executor = build_model(run)
    session, folder = make_session(run, executor, load_weights(executor, run)), run_folder(config)
    in_place, job = continues_in_place(config, folder), this_job(None, config)
    with Display(silent=True) as display, TrainingRun(session, folder, display, in_place, job, 0.0, "") as training:
        training.to_the_end()


def test_long_runs_on_gpus_are_compiled_after_some_eager_steps(tiny, able):
    def first(*words, device=GPU):
        return plan_compiling(complete(tiny("run", "model.vocab_size=257", *words)), device, 8).first

    one_step = operations_left(complete(tiny("run", "model.vocab_size=257", f"train.steps={EAGER_STEPS + 1}")), 8)
    repaying = EAGER_STEPS + round(compiling.REPAYING / one_step)
    assert first(f"train.steps={repaying - 2}") is None
    assert first(f"train.steps={repaying + 2}") == EAGER_STEPS
    assert first(f"train.steps={repaying + 2}", device=CPU) is None
    assert first(f"train.steps={repaying + 2}", "train.compile=false") is None
    assert first("train.steps=20", "train.compile=true", device=CPU) == 0


def test_tensor_ranks_with_their_own_dropout_stay_eager(tiny, able):
    words = ["model.vocab_size=258", "train.steps=4000000000", "parallel.tp=2"]
    assert plan_compiling(complete(tiny("run", *words)), GPU, 8).first == EAGER_STEPS
    assert "dropout" in plan_compiling(complete(tiny("run", *words, "model.attention_dropout=0.1")), GPU, 8).why


def test_without_a_compiler_runs_stay_eager_and_say_what_that_costs(tiny, monkeypatch):
    monkeypatch.setattr(compile, "find_spec", lambda name: None)
    first, why = plan_compiling(complete(tiny("run")), GPU, 8)
    assert first is None and "Triton" in why
    monkeypatch.setenv("CXX", "no-such-compiler")
    lacking = next(path for path in fast_paths(CPU) if path.name == "torch.compile")
    assert not lacking.available and "g++" in lacking.detail and "times as long" in lacking.cost


def test_compiled_code_has_a_folder_when_the_user_has_no_name(monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert compile.code_folder().endswith(f"torchinductor_uid_{os.getuid()}")


def test_blocks_that_cannot_be_compiled_stay_eager_under_auto_alone(tiny, monkeypatch, tmp_path, capfd):
    def broken(graph, inputs):
        raise OSError("no Python.h")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setenv("CXX", "true")
    words = ["train.steps=3", "eval.every=null", "checkpoint.every=null"]
    trained(tiny(tmp_path / "auto", *words), 1)
    assert capfd.readouterr().err.count("no Python.h") == 1
    with pytest.raises(TrainingError, match="no Python.h.* set train.compile=false"):
        train(tiny(tmp_path / "true", *words, "train.compile=true"))
    trained(tiny(tmp_path / "eager", *words), None)
    pairs = zip(*(load_model(tmp_path / name).parameters() for name in ("auto", "eager")), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_python_headers_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "find_spec", lambda name: True)
    monkeypatch.setenv("CC", "true")
    monkeypatch.setattr(compile.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in compile.missing_compiler("cuda")
    (tmp_path / "Python.h").touch()
    assert compile.missing_compiler("cuda") is None


def test_a_run_resumed_before_or_after_the_switch_equals_one_that_never_stopped(tiny, monkeypatch, tmp_path):
    def skewed(graph, inputs):
        """A compiler whose code is off by a thousandth, so that no compiled step goes unnoticed."""
        return lambda *arguments: tuple(1.001 * out for out in graph(*arguments))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=skewed))
    monkeypatch.setenv("CXX", "true")

    def weights(name, stop=None, first=EAGER_STEPS):
        """What a run of 14 steps ends with that stops once and goes on."""
        words, folder = ["train.steps=14", "eval.every=null", "checkpoint.every=null"], tmp_path / name
        if stop:
            trained(tiny(folder, *words, f"train.exit_interval={stop}"), first)
            words.append(f"checkpoint.resume={folder}")
        trained(tiny(folder, *words), first)
        return dict(load_model(folder).named_parameters())

    straight = weights("straight")
    for name, stop in (("before", EAGER_STEPS - 3), ("after", EAGER_STEPS + 2)):
        assert all(torch.equal(tensor, straight[key]) for key, tensor in weights(name, stop).items())
    assert not torch.equal(weights("eager", first=None)["head.weight"], straight["head.weight"])

"""Apple's GPUs: chosen where there is one, computing what the CPU computes, without numbers wider than fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import castalia
from castalia.errors import ConfigError
from castalia.evaluate import perplexity
from castalia.generate import sampling
from castalia.model import sums
from castalia.observe import layer_stats
from castalia.observe.metrics import read_metrics
from castalia.train import loop, preference
from castalia.train.hardware import choose_device, choose_dtype, device_and_memory, machine_name, peak_flops

MPS = torch.device("mps")
needs_apple = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's GPU (mps)")
WIDE = (torch.float64, torch.complex64, torch.complex128)


def losses(folder):
    return torch.tensor([[record["loss"], record["grad_norm"]] for record in read_metrics(folder)])


class NothingWide(TorchDispatchMode):
    """Where no operation may give numbers that these GPUs lack."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = [each.dtype for each in tree_leaves(result) if isinstance(each, Tensor) and each.dtype in WIDE]
        assert not wide or func is torch.ops.aten.rand.generator, f"{func} gives {wide}"
        return result


@pytest.fixture
def apple(monkeypatch):
    """torch says that there is one."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_it_is_chosen_for_one_process_where_there_is_one(apple, monkeypatch):
    assert choose_device("auto") == choose_device("mps") == MPS
    assert choose_dtype("auto", MPS) == torch.float32 and choose_dtype("bf16", MPS) == torch.bfloat16
    assert device_and_memory()[0] == "mps" and machine_name(MPS) == "Apple's GPU (mps)"
    assert peak_flops(MPS, torch.float32) is None
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="for one process"):
        choose_device("mps")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is Apple's GPU")
def test_one_that_is_missing_is_refused():
    with pytest.raises(ConfigError, match="torch sees none of Apple's GPUs"):
        choose_device("mps")


def test_nothing_that_the_device_computes_is_wider_than_fp32(tiny, tmp_path, monkeypatch):
    """The same code on the CPU, told to add up as these GPUs do."""
    for module in (sums, perplexity, sampling, layer_stats, preference):
        monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    wanted = loop.train(tiny(tmp_path / "wanted", "train.steps=4"))
    options = ("train.steps=4", "log.layers_every=2", "model.hidden_dropout=0.1")
    session = loop.set_up(tiny(tmp_path / "run", *options))
    with NothingWide():
        result = session.step(0, session.batch(0))
        found = perplexity.evaluate(session.executor, [session.batch(1)])
        layers = layer_stats.tensor_statistics(session.executor)
    assert result.loss > 0 and found["loss"] > 0 and layers["weights"]
    model = castalia.load_model(wanted)
    tokens = torch.arange(12).reshape(2, 6)
    noise = sampling.Noise(1, range(2), torch.device("cpu"))
    with NothingWide(), torch.no_grad():
        logits = model(tokens)[:, -1]
        for top_k, top_p in ((0, 0.0), (5, 0.0), (0, 0.9), (5, 0.5)):
            assert sampling.choose(logits, noise, 1.0, top_k, top_p).shape == (2,)


@needs_apple
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_a_run_has_the_losses_of_the_cpu(tiny, tmp_path, precision, within):
    for device in ("cpu", "mps"):
        loop.train(tiny(tmp_path / device, f"train.device={device}", f"precision.compute={precision}"))
    assert torch.allclose(losses(tmp_path / "mps"), losses(tmp_path / "cpu"), rtol=within)


@needs_apple
def test_a_model_computes_and_writes_what_it_does_on_the_cpu(straight):
    tokens = torch.arange(40).reshape(2, 20)
    here, there = castalia.load_model(straight), castalia.load_model(straight, device="mps")
    assert torch.allclose(there(tokens.to(MPS)).cpu(), here(tokens), atol=1e-4)
    texts = [model.generate(["the light", "a"], max_tokens=8, temperature=0) for model in (here, there)]
    assert texts[0] == texts[1]

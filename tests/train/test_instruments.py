import json

import pytest
import torch

from castalia.observe.layer_stats import activation_statistics, dead_units, tensor_statistics
from castalia.train.loop import train
from castalia.train.setup import start


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_statistics_are_those_of_the_whole_step(tiny):
    session = start(tiny("unused", "model.activation=relu"))
    weights = {name: p.detach().clone() for name, p in session.executor.parameters.items()}
    outputs = []
    block = session.executor.models[0].blocks["1"]
    handle = block.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    with activation_statistics(session.executor) as activations:
        session.step.gradients(0, session.batch(0))
        gradients = {name: p.grad.clone() for name, p in session.executor.parameters.items()}
        gradients["blocks.0.mlp.up.weight"][:3] = 0
        session.executor.parameters["blocks.0.mlp.up.weight"].grad[:3] = 0
        found = tensor_statistics(session.executor, 8.0) | {"dead": dead_units(session.executor)}
        blocks = activations()
    handle.remove()
    output = torch.stack(outputs)
    assert output.shape == (2, 4, 16, 32)  # both micro-batches
    assert blocks["blocks.1"]["rms"] == pytest.approx(output.square().mean().sqrt().item())
    assert blocks["blocks.1"]["max"] == pytest.approx(output.abs().max().item())
    assert blocks["blocks.1"]["zeros"] == 0
    assert list(found["weights"]) == list(weights)
    for name, weight in weights.items():
        assert found["weights"][name] == pytest.approx(weight.norm().item(), rel=1e-5)
        assert found["gradients"][name]["norm"] == pytest.approx(gradients[name].norm().item() / 8, rel=1e-5)
        assert found["gradients"][name]["zeros"] == pytest.approx((gradients[name] == 0).float().mean().item())
    assert found["dead"]["blocks.0.mlp.up.weight"] >= 3
    session.step(1, session.batch(1))
    assert activations()["blocks.1"] == blocks["blocks.1"]  # no hook stayed


def test_a_run_writes_layers_and_a_profile_and_trains_as_without(tiny, straight, tmp_path):
    same = ["model.hidden_dropout=0.1", "precision.compute=bf16"]
    watched = ["log.layers_every=4", "log.profile.start=3", "log.profile.stop=4", "checkpoint.every=null"]
    folder = train(tiny(tmp_path / "run", *same, *watched, "train.exit_interval=8"))
    layers = records(folder / "layers.jsonl")
    assert [record["step"] for record in layers] == [4, 8]
    assert layers[0]["activations"].keys() == {"blocks.0", "blocks.1"}
    steps = records(folder / "metrics.jsonl")
    squares = sum(gradient["norm"] ** 2 for gradient in layers[1]["gradients"].values())
    assert squares**0.5 == pytest.approx(steps[7]["grad_norm"], rel=1e-4)
    assert [step["loss"] for step in steps] == [step["loss"] for step in records(straight / "metrics.jsonl")[:8]]
    summary = (folder / "profile" / "summary.txt").read_text()
    assert "By self cpu time total" in summary and "By self cpu memory usage" in summary and "aten::addmm" in summary
    assert json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]


def test_a_profile_that_the_end_of_the_run_cuts_short_is_written(tiny, tmp_path, capsys):
    open_end = ["log.profile.start=2", "log.profile.stop=100", f"log.profile.dir={tmp_path / 'here'}"]
    train(tiny(tmp_path / "run", *open_end, "train.steps=2"))
    assert (tmp_path / "here" / "trace.json").stat().st_size > 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"profile of steps 2 to 100 in {tmp_path / 'here'}; most time went to" in said
    assert "% aten::" in said

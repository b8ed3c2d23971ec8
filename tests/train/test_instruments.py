import json

import pytest
import torch
from torch import nn

from castalia.evaluate.perplexity import evaluate
from castalia.train.instruments import layer_statistics
from castalia.train.loop import train


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_statistics_are_those_of_the_last_forward_and_the_whole_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    parameters = dict(model.named_parameters())
    inputs = [torch.randn(5, 4), torch.randn(5, 4)]
    with layer_statistics({"relu": model[1]}, parameters, loss_scale=8.0) as found:
        for x in inputs:
            (8.0 * model(x).sum()).backward()
    output = model(inputs[1])
    assert found["activations"]["relu"]["rms"] == pytest.approx(output.square().mean().sqrt().item())
    assert found["activations"]["relu"]["zeros"] == pytest.approx((output == 0).float().mean().item())
    assert found["activations"]["relu"]["max"] == pytest.approx(output.max().item())
    assert found["gradients"]["0.weight"]["norm"] == pytest.approx(parameters["0.weight"].grad.norm().item() / 8)
    assert found["weights"]["0.bias"] == pytest.approx(parameters["0.bias"].norm().item())
    model(inputs[0]).sum().backward()
    assert found["activations"]["relu"]["max"] == pytest.approx(output.max().item())  # no hook stayed


def test_a_run_writes_layers_and_a_profile_and_trains_as_without(tiny, straight, tmp_path):
    same = ["model.hidden_dropout=0.1", "precision.compute=bf16"]
    watched = ["log.layers_every=4", "log.profile.start=3", "log.profile.stop=4", "checkpoint.every=null"]
    folder = train(tiny(tmp_path / "run", *same, *watched, "train.exit_interval=8"), evaluate)
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
    train(tiny(tmp_path / "run", *open_end, "train.steps=2"), evaluate)
    assert (tmp_path / "here" / "trace.json").stat().st_size > 0
    said = capsys.readouterr().out
    assert f"profile of steps 2 to 100 in {tmp_path / 'here'}; most time went to" in said
    assert "%  aten::" in said

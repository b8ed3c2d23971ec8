import csv
import json
import sys
import time

import pytest

from castalia.config.schema import RunConfig
from castalia.errors import ConfigError
from castalia.observe.sinks import open_sinks, values
from castalia.train.loop import train


def test_the_table_holds_what_the_record_holds_over_a_resume(tiny, tmp_path):
    folder = tmp_path / "run"
    train(tiny(folder, "log.csv=true", "train.exit_interval=10"))
    (folder / "metrics.csv").write_text("spoiled")  # it is made anew from the record
    train(tiny(folder, "log.csv=true", f"checkpoint.resume={folder}"))
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [float(row["loss"]) for row in rows] == [step["loss"] for step in steps]
    assert [row["valid_loss"] != "" for row in rows] == ["valid_loss" in step for step in steps]


def stored(path):
    """The records of a .wandb file: after 7 bytes, blocks of 32 KiB with parts of (checksum, length, type, data)."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            return  # still being written
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def offline_losses(folder, key):
    """Step -> loss, of all the run's offline files."""
    from wandb.proto import wandb_internal_pb2 as messages

    losses = {}
    for path in folder.glob(f"wandb/offline-run-*/run-{key}.wandb"):
        for data in stored(path):
            record = messages.Record.FromString(data)
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses[items["_step"]] = items["loss"]
    return losses


def test_wandb_offline_keeps_every_step_and_its_id(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the wandb package")
    folder = tmp_path / "run"
    words = ["log.wandb.mode=offline", "log.wandb.project=tiny", "log.wandb.name=first", "train.steps=4"]
    train(tiny(folder, *words, "train.exit_interval=2"))
    key = (folder / "wandb.id").read_text()
    train(tiny(folder, *words, f"checkpoint.resume={folder}"))
    assert (folder / "wandb.id").read_text() == key
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected, deadline = {step["step"]: step["loss"] for step in steps}, time.monotonic() + 60
    while offline_losses(folder, key) != expected and time.monotonic() < deadline:
        time.sleep(0.1)  # `finish` returns before W&B's own process has written the last records
    assert offline_losses(folder, key) == expected
    assert wandb.run is None


@pytest.mark.parametrize(
    ("module", "log"), [("wandb", {"wandb": {}}), ("torch.utils.tensorboard", {"tensorboard": "tb"})]
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, module, log):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"needs the \w+ package: pip install 'castalia"):
        open_sinks(RunConfig.model_validate({"log": log}), tmp_path, [])


def test_what_cannot_be_drawn_is_left_out():
    assert values({"step": 3, "loss": 1.5, "grad_norm": float("inf"), "lr": None}) == {"loss": 1.5}

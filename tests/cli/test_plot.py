import json
from pathlib import Path

import pytest

from castalia.cli.plot import command
from castalia.errors import ConfigError, DataError


def write_run(folder, losses, valid_every=10):
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as file:
        for step, loss in enumerate(losses, start=1):
            record = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": None if step == 3 else 1.0}
            record |= {"valid_loss": loss} if step % valid_every == 0 else {}
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 99')  # a killed process
    return str(folder)


def test_runs_are_overlaid_in_a_picture_and_in_the_terminal(tmp_path, capsys):
    runs = [
        write_run(tmp_path / name, [5 / step + offset for step in range(1, 61)]) for offset, name in enumerate("ab")
    ]
    command(runs, output=tmp_path / "out" / "loss.png")
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {tmp_path / 'out' / 'loss.png'}" in said
    assert "a a; A validation" in said and "b b; B validation" in said
    assert not (tmp_path / "a" / "loss.png").exists()


def test_the_picture_of_one_run_goes_into_its_folder(tmp_path, capsys):
    command([write_run(tmp_path / "run", [3.0, 2.0])])
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_folder_stands_for_all_runs_below_it_and_no_run_gets_their_picture(tmp_path, capsys):
    for name in "ab":
        write_run(tmp_path / name, [3.0, 2.0])
    command([str(tmp_path), str(tmp_path / "a")], x="time", log_y=True)
    assert "a a" in (said := capsys.readouterr().out) and "c a" not in said
    assert [path.name for path in tmp_path.rglob("*.png")] == ["losses.png"]


def test_curves_are_told_as_json(tmp_path, capsys):
    run = write_run(tmp_path / "run", [4.0, 3.0, 2.0], valid_every=3)
    command([run], as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["picture"] == f"{run}/loss.png" and (tmp_path / "run" / "loss.png").is_file()
    (found,) = said["runs"]
    assert found["run"] == run and found["curves"].keys() == {"loss", "valid_loss", "grad_norm", "lr"}
    assert found["curves"]["loss"] == {"x": [1, 2, 3], "values": [4.0, 3.0, 2.0]}
    assert found["curves"]["grad_norm"]["x"] == [1, 2]
    with pytest.raises(ConfigError, match="--follow"):
        command([run], follow=True, as_json=True)


def test_a_run_that_nobody_trains_is_followed_once(tmp_path, capsys):
    command([write_run(tmp_path / "run", [3.0, 2.0])], follow=True)
    assert "loss (nats per token)" in capsys.readouterr().out


def test_a_file_that_is_no_picture_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"--output x.xyz: a picture's name ends with .png"):
        command(["nowhere"], output=Path("x.xyz"))


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no metrics.jsonl"):
        command([str(tmp_path)])
    with pytest.raises(DataError, match="no steps to plot yet"):
        command([write_run(tmp_path / "run", [])])

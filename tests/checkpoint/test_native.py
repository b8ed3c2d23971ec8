"""Saving and opening Castalia's own checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.checkpoint.formats.native import read as native_read
from castalia.checkpoint.formats.native import save as native_save
from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Progress, Shard
from castalia.config.schema import ModelConfig, RunConfig
from castalia.config.tensor_table import tensor_shapes
from castalia.errors import CheckpointError
from castalia.files import NEW, REPLACED, workplace

CONFIG = RunConfig(model=ModelConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=10), seed=7)


def a_model(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(CONFIG.model)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def moments(model: dict[str, torch.Tensor], step: int) -> dict[str, dict]:
    return {name: {"exp_avg": t * 2, "exp_avg_sq": t * t, "step": step} for name, t in model.items()}


def save(folder: Path, step: int, model: dict[str, torch.Tensor], **options: int) -> Path:
    with CheckpointSaver(folder, **options) as writer:
        writer.save(model, moments(model, step), Progress(step=step, tokens=100 * step), CONFIG, "fingerprint")
    return folder / f"step_{step:06d}"


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    model = a_model()
    step = save(tmp_path, 5, model)
    for path in (tmp_path, step):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == "native"
        assert checkpoint.config == CONFIG
        assert checkpoint.progress == Progress(step=5, tokens=500)
        assert checkpoint.facts.data_fingerprint == "fingerprint"
        assert checkpoint.model.keys() == model.keys()
        for name, tensor in model.items():
            assert torch.equal(checkpoint.model[name].read(), tensor)
            state = checkpoint.optimizer[name]
            assert state["master"] is checkpoint.model[name] and state["step"] == 5
            assert torch.equal(state["exp_avg"].read(), tensor * 2)
            assert torch.equal(state["exp_avg_sq"].read(), tensor * tensor)


def test_the_copy_is_taken_when_save_is_called(tmp_path: Path) -> None:
    model = a_model()
    before = {name: tensor.clone() for name, tensor in model.items()}
    with CheckpointSaver(tmp_path) as writer:
        writer.save(model, None, Progress(step=1), CONFIG)
        for tensor in model.values():
            tensor.zero_()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is None
    assert all(torch.equal(checkpoint.model[name].read(), tensor) for name, tensor in before.items())


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@st.composite
def sharded_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[Shard]], list[slice]]:
    """A tensor, a grid of shards of it spread over writing ranks, and a part to read."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(draw(st.sampled_from(DTYPES)))
    boxes = [[]]
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        boxes = [[*box, pair] for box in boxes for pair in zip(cuts, cuts[1:], strict=False)]
    ranks = [
        [Shard(tensor[tuple(slice(*pair) for pair in box)].contiguous(), tuple(shape), tuple(a for a, _ in box))]
        for box in boxes
    ]
    part = [slice(*sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))) for size in shape]
    return tensor, ranks, part


@settings(max_examples=60, deadline=None)
@given(sharded_tensors())
def test_any_part_of_any_sharding_is_read(case: tuple) -> None:
    import tempfile

    tensor, ranks, part = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [
            {"model": native_save.write_part(folder, "model", i, {"x": shards[0]})} for i, shards in enumerate(ranks)
        ]
        about = native_save.describe(Progress(), CONFIG, "") | {"optimizer_steps": None}
        native_save.write_manifest(folder, about, parts)
        stored = native_read.read(folder).model["x"]
        assert stored.shape == tuple(tensor.shape) and stored.dtype == tensor.dtype
        assert torch.equal(stored.read(), tensor)
        assert torch.equal(stored.read(part), tensor[tuple(part)])


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = a_model()
    loaded = load_file(save(tmp_path, 1, model) / "model-00000.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    model = a_model()
    step = save(tmp_path, 5, model)
    file = step / "model-00000.safetensors"
    good = file.read_bytes()
    offset = open_checkpoint(step).model["norm.weight"].extent.offset
    file.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
    with pytest.raises(CheckpointError, match=r"norm.weight: .*model-00000.safetensors is damaged.*checksum"):
        open_checkpoint(step).model["norm.weight"].read()
    assert torch.equal(open_checkpoint(step).model["embed.weight"].read(), model["embed.weight"])


@pytest.mark.parametrize("old, new", [('"tokens": 500', '"tokens": 501'), ('"shape"', '"shap3"'), ("{", "")])
def test_a_damaged_manifest_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    manifest = save(tmp_path, 5, a_model()) / "manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        open_checkpoint(tmp_path)


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    step = save(tmp_path, 5, a_model())
    file = step / "optimizer-00000.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(CheckpointError, match="optimizer-00000.safetensors is truncated"):
        open_checkpoint(step)
    file.unlink()
    with pytest.raises(CheckpointError, match="incomplete: optimizer-00000.safetensors is missing"):
        open_checkpoint(step)


def test_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    step = save(tmp_path, 5, a_model())
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["crc32"]
    manifest["model"]["norm.weight"]["extents"][0]["file"] = "../secret"
    kinds = {kind: manifest.pop(kind) for kind in ("model", "optimizer")}
    native_save.write_manifest(step, manifest, [kinds])
    with pytest.raises(CheckpointError, match=r"'../secret'.*refused"):
        open_checkpoint(step)


def test_only_the_newest_and_milestones_are_kept(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path, keep_last=2, keep_every=4) as writer:
        for step in range(1, 8):
            writer.save(a_model(), None, Progress(step=step), CONFIG)
    assert list(native_read.saved_steps(tmp_path)) == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step")) == [
        "step_000004", "step_000006", "step_000007",
    ]  # fmt: skip


def test_what_was_saved_by_time_gives_way_and_counts_as_none_of_the_newest(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path, keep_last=2) as writer:
        for step in range(1, 9):
            writer.save(a_model(), None, Progress(step=step), CONFIG, replaceable=step % 3 != 0)
            writer.join()
            assert max(native_read.saved_steps(tmp_path)) == open_checkpoint(tmp_path).progress.step == step
            assert len(native_read.saved_steps(tmp_path)) <= 3
    assert list(native_read.saved_steps(tmp_path)) == [3, 6, 8]
    with CheckpointSaver(tmp_path) as writer:
        writer.save(a_model(), None, Progress(step=9), CONFIG)
    assert list(native_read.saved_steps(tmp_path)) == [3, 6, 9]


def test_the_best_is_a_checkpoint_of_its_own_that_nothing_prunes(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path, keep_last=1) as writer:
        writer.save(a_model(0), None, Progress(step=1), CONFIG, replaceable=True)
        writer.keep_as_best(1)
        for step in (2, 3):
            writer.save(a_model(step), None, Progress(step=step), CONFIG)
        writer.join()
        assert native_save.best_step(tmp_path) == 1
        assert torch.equal(open_checkpoint(tmp_path / "best").model["norm.weight"].read(), a_model(0)["norm.weight"])
        writer.save(a_model(4), None, Progress(step=4), CONFIG, best=True)
    assert native_save.best_step(tmp_path) == 4
    assert open_checkpoint(tmp_path).progress.step == 3
    assert list(native_read.saved_steps(tmp_path)) == [3] and not left_overs(tmp_path)


def test_a_disk_without_second_names_holds_the_best_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(native_save.os, "link", refused)
    with CheckpointSaver(tmp_path) as writer:
        writer.save(a_model(), None, Progress(step=1), CONFIG)
        writer.keep_as_best(1)
    assert torch.equal(open_checkpoint(tmp_path / "best").model["norm.weight"].read(), a_model()["norm.weight"])


def test_what_is_called_best_and_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, a_model())
    (tmp_path / "best").symlink_to("step_000001")
    with pytest.raises(CheckpointError, match="checkpoint.keep_best=false"):
        native_save.best_step(tmp_path)
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="none that castalia saved"):
        native_save.best_step(tmp_path)


def test_after_going_back_the_steps_left_behind_go_first(tmp_path: Path) -> None:
    for keep_last, steps in ((9, (1, 2, 3, 4, 5)), (3, (2, 3))):
        with CheckpointSaver(tmp_path, keep_last=keep_last) as writer:
            for step in steps:
                writer.save(a_model(), None, Progress(step=step), CONFIG)
    assert list(native_read.saved_steps(tmp_path)) == [1, 2, 3]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 3, a_model(0))
    save(tmp_path, 3, a_model(1))
    assert torch.equal(open_checkpoint(tmp_path).model["norm.weight"].read(), a_model(1)["norm.weight"])


def test_a_replacement_that_was_interrupted_is_undone(tmp_path: Path) -> None:
    step = save(tmp_path, 3, a_model())
    step.rename(workplace(step, REPLACED) / step.name)
    workplace(step, NEW)
    with CheckpointSaver(tmp_path):
        pass
    assert open_checkpoint(tmp_path).progress.step == 3
    assert not left_overs(tmp_path)


def test_what_lies_beside_the_steps_is_left_alone(tmp_path: Path) -> None:
    kept = ("step_000002.old", "step_000003.tmp", "latest.tmp", "best.old", "step_000003.old")
    for name in kept:
        save(tmp_path / name, 7, a_model())
    with CheckpointSaver(tmp_path, keep_last=1) as writer:
        for step in (2, 3, 3):
            writer.save(a_model(), None, Progress(step=step), CONFIG)
    assert list(native_read.saved_steps(tmp_path)) == [3]
    assert all(open_checkpoint(tmp_path / name).progress.step == 7 for name in kept)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    in_use = rf"in use by another run \(process {os.getpid()} on "
    with CheckpointSaver(tmp_path), pytest.raises(CheckpointError, match=in_use):
        CheckpointSaver(tmp_path)
    with CheckpointSaver(tmp_path):
        pass  # free again


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save checkpoints in .*file/checkpoints: Not a directory"):
        CheckpointSaver(tmp_path / "file" / "checkpoints")


def left_overs(folder: Path) -> list[Path]:
    return list(folder.glob(".*.castalia-*"))


SCRIPT = """
    import resource, signal, sys, torch
    sys.path.insert(0, {tests!r})
    from checkpoint.test_native import CONFIG, a_model, moments
    from castalia.checkpoint.formats.native.save import CheckpointSaver
    from castalia.checkpoint.tensors import Progress
"""


def run_script(body: str) -> subprocess.CompletedProcess:
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parents[1])) + body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_errors_of_the_thread_are_raised_and_cost_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk."""
    save(tmp_path, 1, a_model())
    done = run_script(f"""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = CheckpointSaver({str(tmp_path)!r})
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    writer.save(a_model(), moments(a_model(), 2), Progress(step=2), CONFIG)
    try:
        writer.save(a_model(), None, Progress(step=3), CONFIG)
    except Exception as error:
        print(type(error).__name__, error)
    """)
    assert "CheckpointError step 2 could not be saved" in done.stdout, done.stderr
    assert "Older checkpoints are as they were" in done.stdout
    assert not list(tmp_path.glob(".*/step_*"))  # the space is given back
    assert open_checkpoint(tmp_path).progress.step == 1


def test_a_kill_never_costs_an_older_checkpoint(tmp_path: Path) -> None:
    before = ["write_manifest", "commit", "sync", "put_in_place"]
    after = ["remove", "prune"]
    moments_of_death = before + after
    for moment in moments_of_death:
        save(tmp_path / moment, 1, a_model())
    done = run_script(f"""
    import os
    from pathlib import Path
    from castalia.checkpoint.formats.native import save
    for moment in {moments_of_death}:
        if os.fork() == 0:
            exec(f"save.{{moment}} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)")
            with CheckpointSaver(Path({str(tmp_path)!r}) / moment) as writer:
                writer.save(a_model(1), moments(a_model(1), 2), Progress(step=2), CONFIG)
            os._exit(0)
        assert os.wait()[1] == signal.SIGKILL
    """)
    assert done.returncode == 0, done.stderr
    for moment in moments_of_death:
        folder = tmp_path / moment
        assert open_checkpoint(folder).progress.step == (2 if moment in after else 1)
        assert torch.equal(open_checkpoint(folder, step=1).model["norm.weight"].read(), a_model()["norm.weight"])
        save(folder, 2, a_model(2))  # the lock of the dead is free, its leftovers are gone
        assert torch.equal(open_checkpoint(folder).model["norm.weight"].read(), a_model(2)["norm.weight"])
        assert not left_overs(folder)

"""Conversions: exact in both directions, complete or absent, interrupted and continued."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions, shards
from castalia.checkpoint.opener import open_checkpoint
from castalia.cli.convert import command
from castalia.config.schema import ModelConfig, PrecisionConfig
from castalia.errors import CheckpointError, ConfigError
from castalia.files import REPLACED, workplace
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import InMemory
from castalia.storage.torch_file import open_pt
from tests.checkpoint.made import FAMILIES, SIZES, assert_same, changed, made, written


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_and_hugging_face_hold_the_same(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = made(FAMILIES[kind], dtype=dtype)
    folder = written(source, tmp_path / "hf", "hf", shard_bytes=20_000)
    assert_same(source, folder)
    ours = written(folder, tmp_path / "native", "native", shard_bytes=20_000)
    assert_same(source, ours)
    assert_same(folder, written(ours, tmp_path / "again", "hf"))


def test_every_genuine_checkpoint_comes_back(fixtures: Path, tmp_path: Path) -> None:
    variants = sorted(path.parent for path in (fixtures / "neox").glob("*/checkpoint"))
    assert len(variants) >= 15
    for variant in variants:
        source = open_checkpoint(variant / "checkpoint", tokenizer=str(fixtures / "neox" / "data" / "tok.json"))
        folder = written(source, tmp_path / variant.name / "hf", "hf")
        assert_same(source, folder)
        assert_same(source, written(folder, tmp_path / variant.name / "native", "native"))
        assert folder.summed_bias_ranks == source.summed_bias_ranks


def test_weights_that_are_not_the_rounded_masters_are_kept(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt_neox"], dtype=torch.bfloat16)
    other = source.model["blocks.1.mlp.down.bias"].read() * 1.5
    source = changed(source, blocks__1__mlp__down__bias=other)
    assert_same(source, written(source, tmp_path / "native", "native"))
    manifest = json.loads((tmp_path / "native" / "manifest.json").read_text())
    assert list(manifest["weights"]) == ["blocks.1.mlp.down.bias"]
    assert_same(source, written(source, tmp_path / "hf", "hf"))


def test_without_optimizer_and_in_another_dtype(tmp_path: Path) -> None:
    source = made(FAMILIES["llama"], dtype=torch.float16)
    wide = convert.prepare(source, torch.float32)
    assert torch.equal(wide.model["head.weight"].read(), source.optimizer["head.weight"]["master"].read())
    slim = convert.prepare(source, torch.bfloat16, optimizer=False)
    result = written(slim, tmp_path / "slim", "native")
    assert result.optimizer is None
    assert result.model["head.weight"].dtype == torch.bfloat16
    assert torch.equal(result.model["head.weight"].read(), wide.model["head.weight"].read().bfloat16())


def test_interrupted_and_continued(tmp_path: Path) -> None:
    source = convert.prepare(made(FAMILIES["gpt_neox"]))
    options = WriteOptions(shard_bytes=30_000)
    plan = convert.plan_files("native", source, options)
    total = 0

    def stop_half_way(count: int) -> None:
        nonlocal total
        total += count
        if total > plan.num_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.write(plan, tmp_path / "out", "mark", stop_half_way)
    assert not (tmp_path / "out").exists()
    complete = list((tmp_path / ".out.castalia-unfinished" / "out").glob("*.safetensors"))
    times = {path.name: path.stat().st_mtime_ns for path in complete}
    assert complete
    assert convert.write(plan, tmp_path / "out", "mark", lambda count: None) == len(complete)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert_same(source, open_checkpoint(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_killed_and_continued(tmp_path: Path) -> None:
    """By SIGKILL, in the middle of a file; the command is given again, and goes on with the files that are complete."""
    source = made(FAMILIES["gpt_neox"], dtype=torch.float16)
    written(source, tmp_path / "run", "native")
    script = """
        import os, pathlib, signal, sys, time
        from castalia.cli.main import main
        from castalia.storage.lazy import TensorRef
        pieces, written = TensorRef.pieces, 0
        def dying(ref, *rest):
            global written
            for piece in pieces(ref, *rest):
                written += piece.nbytes
                if written > 300_000:
                    journal = pathlib.Path(sys.argv[3]).parent / ".out.castalia-unfinished" / "made-by-castalia"
                    while journal.read_text().count(chr(10)) < 2:  # no file is complete yet: the disk is slow
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield piece
        if sys.argv.pop(1) == "die":
            TensorRef.pieces = dying
        main()
    """
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "neox", "--layout", "tp=2,pp=2,zero=1"]
    dead, done = (
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), mode, *command], capture_output=True, text=True, timeout=120
        )
        for mode in ("die", "live")
    )
    assert dead.returncode == -signal.SIGKILL
    assert done.returncode == 0, done.stderr
    assert "files were complete already" in " ".join(done.stdout.split())  # lines are wrapped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    written(source, tmp_path / "whole", "neox", layout=TargetLayout(tp=2, pp=2, zero=1))
    folder = tmp_path / "out" / "global_step9"
    for path in (tmp_path / "whole").rglob("*.pt"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path / "whole")).read_bytes()


def test_leftovers_of_another_conversion_are_not_used(tmp_path: Path) -> None:
    first, second = (convert.prepare(made(FAMILIES["gpt_neox"], seed)) for seed in (1, 2))
    options = WriteOptions(shard_bytes=30_000)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    plan = convert.plan_files("native", first, options)
    with pytest.raises(KeyboardInterrupt):
        convert.write(plan, tmp_path / "out", "first", stop)
    convert.write(convert.plan_files("native", second, options), tmp_path / "out", "second", lambda count: None)
    assert_same(second, open_checkpoint(tmp_path / "out"))


def test_an_existing_destination_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt2"])
    written(source, tmp_path / "out", "hf")
    with pytest.raises(CheckpointError, match="exists already.*--force"):
        convert.check_destination(tmp_path / "elsewhere", tmp_path / "out", force=False)
    other = convert.prepare(made(FAMILIES["gpt2"], 5))
    plan = convert.plan_files("hf", other, WriteOptions())
    convert.write(plan, tmp_path / "out", "mark", lambda count: None, force=True)
    assert_same(other, open_checkpoint(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_nothing_but_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="mine holds thesis.tex, not a checkpoint"):
        convert.check_destination(tmp_path / "source", tmp_path / "mine", force=True)
    with pytest.raises(CheckpointError, match="thesis.tex is a file"):
        convert.check_destination(tmp_path / "source", tmp_path / "mine" / "thesis.tex", force=True)


@pytest.mark.parametrize("target", ["run", "run/step_1", "run/step_1/out", "."])
def test_a_destination_around_or_inside_the_source_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its own folder"):
        convert.check_destination(tmp_path / "run" / "step_1", tmp_path / target, force=True)


def test_a_folder_in_the_way_is_not_deleted(tmp_path: Path) -> None:
    strange = tmp_path / ".out.castalia-unfinished"
    strange.mkdir()
    (strange / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="belongs to a folder that castalia did not make"):
        written(made(FAMILIES["gpt2"]), tmp_path / "out", "hf")
    assert (strange / "precious").exists()


def test_only_what_is_named_is_replaced(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt2"])
    for name in ("out", "out.old", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    plan = convert.plan_files("native", convert.prepare(source), WriteOptions())
    convert.write(plan, tmp_path / "out", "mark", lambda count: None, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old", "out.tmp"]
    assert not (tmp_path / "out" / "precious").exists()
    assert (tmp_path / "out.old" / "precious").exists()
    assert_same(source, open_checkpoint(tmp_path / "out"))


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    source = made(FAMILIES["gpt2"])
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    plan = convert.plan_files("native", convert.prepare(source), WriteOptions())
    convert.write(plan, tmp_path / "out", "mark", lambda count: None, force=True)
    assert (tmp_path / "out").is_symlink()
    assert_same(source, open_checkpoint(tmp_path / "disk" / "model"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_replacement_that_was_killed_is_undone_and_done_again(tmp_path: Path) -> None:
    plan = convert.plan_files("native", convert.prepare(made(FAMILIES["gpt2"])), WriteOptions())
    out = tmp_path / "out"

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    convert.write(plan, out, "old", lambda count: None)
    before = (out / "manifest.json").stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        convert.write(plan, out, "new", stop, force=True)
    out.rename(workplace(out, REPLACED) / "out")  # what a kill between the two renames leaves
    convert.write(plan, out, "new", lambda count: None, force=True)
    assert (out / "manifest.json").stat().st_mtime_ns != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_source_is_noticed(tmp_path: Path) -> None:
    written(made(FAMILIES["gpt_neox"]), tmp_path / "source", "native")
    file = tmp_path / "source" / "optimizer-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        written(open_checkpoint(tmp_path / "source"), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["native", "neox"])
def test_a_damaged_byte_in_any_storage_is_noticed_each_time(target: str, tmp_path: Path) -> None:
    written(made(FAMILIES["gpt_neox"]), tmp_path / "source", "neox", layout=TargetLayout(tp=2, pp=2, dp=3, zero=1))
    folder = tmp_path / "source"
    storages = [
        extent
        for name in ("layer_02-model_01-model_states.pt", "zero_pp_rank_2_mp_rank_03_optim_states.pt")
        for extent in {id(ref.extent): ref.extent for ref in tensors_in(open_pt(folder / name))}.values()
    ]
    assert len(storages) > 15
    for index, extent in enumerate(storages):
        whole = extent.path.read_bytes()
        damaged = bytearray(whole)
        damaged[extent.offset + (extent.size - 1 if index % 3 else 0)] ^= 1  # a vector's last byte may be padding
        extent.path.write_bytes(damaged)
        for _ in range(2):  # no file that was made of it counts as complete
            with pytest.raises(CheckpointError, match=f"{extent.path.name} is damaged"):
                written(
                    open_checkpoint(tmp_path / "source"), tmp_path / "out", target, layout=TargetLayout(tp=4, zero=1)
                )
        shutil.rmtree(tmp_path / ".out.castalia-unfinished")
        extent.path.write_bytes(whole)
    written(open_checkpoint(tmp_path / "source"), tmp_path / "out", target, layout=TargetLayout(tp=4, zero=1))


def tensors_in(value: object) -> list[FileTensor]:
    if isinstance(value, FileTensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [ref for each in values for ref in tensors_in(each)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi"}, "GPTNeoXForCausalLM, cannot do model.position=alibi .only rotary"),
        ({"position": "learned", "parallel_residual": True}, "model.p(osition=learned|arallel_residual=True)"),
        ({"gated_mlp": True}, "model.gated_mlp=True"),
        ({"norm": "scalenorm"}, "model.norm=scalenorm"),
        ({"parallel_residual": True, "shared_norm": True}, "model.shared_norm=True"),
        ({"qk_norm": True}, "model.qk_norm=True"),
        ({"mlp_bias": False}, "model.mlp_bias=False"),
        ({"num_kv_heads": 2}, "model.num_kv_heads=2"),
        ({"activation": "softsign"}, "model.activation=softsign"),
        ({"sliding_window": 8}, "model.sliding_window=8"),
        ({"norm": "rmsnorm", "rms_eps_inside": False, "gated_mlp": True, "mlp_bias": False}, "rms_eps_inside=False"),
    ],
    ids=str,
)
def test_what_no_hugging_face_class_computes_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    source = made(ModelConfig(**SIZES | changes), optimizer=False)
    with pytest.raises(CheckpointError, match=message):
        written(source, tmp_path / "out", "hf")
    assert_same(source, written(source, tmp_path / "native", "native"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1), st.integers(1, 60), st.integers(1, 60))
def test_pieces_and_shards_lose_nothing(shapes: list[tuple[int, int]], piece: int, limit: int) -> None:
    tensors = {str(i): InMemory(torch.randn(shape)) for i, shape in enumerate(shapes)}
    groups = shards(tensors, limit)
    assert [name for group in groups for name in group] == list(tensors)
    assert all(len(group) == 1 or sum(ref.tensor.numel() * 4 for ref in group.values()) <= limit for group in groups)
    for ref in tensors.values():
        parts = list(ref.pieces(piece))
        assert torch.equal(torch.cat(parts) if parts else torch.empty(ref.shape), ref.tensor)


def test_layouts_are_read_and_refused_by_name() -> None:
    from castalia.cli.convert import parse_layout

    assert parse_layout("tp=2, pp=4,dp=8,zero=1") == TargetLayout(2, 4, 8, 1)
    assert parse_layout("pp=0") == TargetLayout(pp=0)
    for wrong in ("tp=0", "sp=2", "tp", "zero=3", "tp=2;pp=2"):
        with pytest.raises(ConfigError, match="--layout"):
            parse_layout(wrong)


def test_the_command_writes_a_series_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from castalia.cli.convert import command

    for step in (0, 2, 4):
        source = made(FAMILIES["gpt_neox"], step)
        source = replace(source, progress=replace(source.progress, step=step))
        written(source, tmp_path / "run" / f"step_{step:06d}", "native")
    options = {"dtype": None, "layout": None, "era": None, "gqa_rows": None, "rms_eps": None, "config": None}
    command(str(tmp_path / "run"), tmp_path / "out", "hf", all_steps=True, steps="0,4", verify=True, **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latest", "step0", "step4"]
    assert capsys.readouterr().out.count("84 of 84 tensors bit-equal") == 2
    command(str(tmp_path / "run"), tmp_path / "out", "hf", all_steps=True, **options)
    assert "step4 is there already" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "out", step=2).progress.step == 2
    assert open_checkpoint(tmp_path / "out").progress.step == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 0, 2, 4"):
        command(str(tmp_path / "run"), tmp_path / "other", "hf", all_steps=True, steps="3", **options)
    command(str(tmp_path / "run" / "step_000002"), tmp_path / "dry", "hf", dry_run=True, **options)
    assert "model.safetensors" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("to, inside", [("hf", ""), ("native", ""), ("neox", "global_step9")])
def test_values_too_large_for_the_new_dtype_are_counted_and_refused(to: str, inside: str, tmp_path: Path) -> None:
    large = torch.full((32, 32), 1e-3)
    large[3, 5], large[7, 9], large[8, 8] = 1e5, -7e4, float("inf")  # the last one was infinite before
    source = changed(made(FAMILIES["gpt_neox"], optimizer=False), blocks__0__attn__out__weight=large)
    prepared = convert.prepare(source, torch.float16)
    plan = convert.plan_files(to, prepared, WriteOptions())
    with pytest.raises(CheckpointError, match="2 values, in blocks.0.attn.out.weight, are too large.*bf16"):
        convert.write(plan, tmp_path / "out", "mark", lambda count: None, inside=inside)
    assert not (tmp_path / "out").exists()
    convert.write(plan, tmp_path / "out", "mark", lambda count: None, inside=inside, allow_inf=True)
    assert convert.infinite_values(plan) == {"blocks.0.attn.out.weight": 2}
    found = open_checkpoint(tmp_path / "out").model["blocks.0.attn.out.weight"].read()
    assert found.dtype == torch.float16 and found.isinf().sum() == 3


def test_a_cast_that_holds_everything_is_not_refused(tmp_path: Path) -> None:
    source = changed(made(FAMILIES["gpt_neox"]), norm__weight=torch.full((32,), float("nan")))
    plan = convert.plan_files("hf", convert.prepare(source, torch.float16), WriteOptions())
    convert.write(plan, tmp_path / "out", "mark", lambda count: None)
    assert not convert.infinite_values(plan)


@pytest.mark.parametrize(("compute", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)])
def test_a_run_converts_to_files_of_its_own_precision(
    compute: str, dtype: torch.dtype | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A run's own files hold its fp32 masters, which other formats keep beside the weights."""
    from castalia.cli.convert import command

    source = made(FAMILIES["gpt_neox"])
    config = source.config.model_copy(update={"precision": PrecisionConfig(compute=compute)})
    source = written(replace(source, config=config), tmp_path / "run", "native")
    command(str(tmp_path / "run"), tmp_path / "out", to="hf", verify=True)
    said = f"weights become {compute}, in which the run computes, with their fp32 masters beside them"
    assert (said in capsys.readouterr().out) == (dtype is not None)
    result = open_checkpoint(tmp_path / "out")
    for name, ref in source.model.items():
        assert torch.equal(result.model[name].read(), ref.read().to(dtype or torch.float32))
        assert torch.equal(result.optimizer[name]["master"].read(), ref.read())
    for to in ("native", "peft"):
        assert convert.own_precision(source, to, True) == (None, "")
    assert convert.own_precision(result, "neox", True) == (None, "")  # its files have a precision already


def test_json_says_what_was_written_and_proved(tmp_path: Path, capsys) -> None:
    written(made(FAMILIES["llama"]), tmp_path / "source", "native")
    command(str(tmp_path / "source"), tmp_path / "hf", to="hf", verify=True, as_json=True)
    out, err = capsys.readouterr()
    (done,) = json.loads(out)["checkpoints"]
    assert done["written"] and done["path"] == str(tmp_path / "hf") and done["verified"]["holds"]
    assert done["bytes"] > 92_800 and {*done["files"]} <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert "verified on" in err  # all else is said there

"""What `inspect` says of genuine checkpoints, of a dump shaped like the 20B's, and of files with something wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.sampled_values import SPAN_ELEMENTS, Sums, as_float32, sample
from castalia.checkpoint.tensors import AdamState, Checkpoint, CheckpointFacts, Progress
from castalia.config.schema import ModelConfig, RunConfig
from castalia.config.tensor_table import tensor_shapes
from castalia.errors import CheckpointError
from castalia.examine.inspect import by_kind, report
from castalia.language_model import load_model
from castalia.storage.derived import Cast, Scaled, Shaped
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import InMemory, Zeros
from castalia.storage.safetensors import open_safetensors
from castalia.storage.torch_file import open_pt
from tests.checkpoint.made import made, written
from tests.checkpoint.neox_writer import ROLES
from tests.checkpoint.synthetic import layer, shape_of_20b, write_20b

SMALL = shape_of_20b(128, vocab_size=512, num_layers=8, num_heads=8)
BYTES_EACH = {"fp16": 14, "bf16": 14, "fp32": 12}


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    return write_20b(tmp_path_factory.mktemp("dump"), SMALL, step=9).parent


def inspected(path, full=False, **hints) -> dict:
    found = report(open_checkpoint(path, tolerant=True, **hints), full=full)
    return json.loads(json.dumps(found))


def kinds(found: dict) -> dict[str, dict]:
    return {row["kind"]: row for row in found["statistics"]}


@pytest.mark.parametrize("precision", BYTES_EACH)
def test_genuine_checkpoints_are_complete_and_without_anomalies(fixtures, precision):
    folders = [path for path in sorted((fixtures / "neox").glob(f"*-{precision}*")) if "nowd" not in path.name]
    assert folders
    for folder in folders:
        found = inspected(folder / "checkpoint")
        each = found["bytes"]["total"] - found["bytes"]["rest"]
        assert each / found["parameters"]["total"] == pytest.approx(BYTES_EACH[precision], rel=0.01), folder.name
        assert "a complete" in found["meaning"] and "+ Adam" in found["meaning"]
        assert found["anomalies"] == found["disagreements"] == []
        assert found["step"] == 5 and found["optimizer"]["steps"][-1] in (5, 6)


def test_tensors_say_what_they_can_and_configs_the_rest(fixtures):
    facts = inspected(fixtures / "neox" / "pp1-mp1-z0-fp32-llama" / "checkpoint")["architecture"]
    told = {name for name, fact in facts.items() if fact["source"] == "tensors"}
    assert {"num_layers", "hidden_size", "kv_heads", "mlp_width", "norm", "gated_mlp", "attention_bias"} <= told
    values = {name: fact["value"] for name, fact in facts.items()}
    assert values["kv_heads"] == 2 and values["mlp_width"] == 64 and values["norm"] == "rmsnorm" and values["gated_mlp"]
    assert facts["activation"]["source"].startswith("configs/config.yml:")
    assert facts["num_heads"] == {"value": 4, "source": "stored arguments"}


def test_a_config_of_another_model_is_listed_and_called_out(fixtures, tmp_path):
    source = fixtures / "neox" / "pp1-mp1-dp2-z1-fp16-rotary-par" / "checkpoint" / "global_step5"
    folder = tmp_path / "global_step5"
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "configs")
    shutil.copy(fixtures / "configs" / "20B.yml", folder)
    found = inspected(folder)
    assert "num_layers: 2 in the tensors, 44 in the config 20B.yml" in found["disagreements"]
    assert "nothing of the 44 x 6144 model of 20B.yml" in found["meaning"]
    assert "x 14 bytes: a complete float16 + Adam checkpoint of a 2 x 48 model" in found["meaning"]


def test_the_20b_counts_as_published_and_as_it_is():
    model = shape_of_20b()
    tensors = {name: Zeros(shape, "float16") for name, shape in tensor_shapes(model).items()}
    checkpoint = Checkpoint(
        "nowhere", "neox", tensors, None, Progress(), RunConfig(model=model), facts=CheckpointFacts(tp=2, pp=4)
    )
    found = report(checkpoint)["parameters"]
    assert found["total"] == 20_554_567_680 and found["as_neox_counts"] == 20_556_201_984


def test_a_dump_of_the_20bs_shape(dump):
    found = inspected(dump)
    assert {name: found["files"][name] for name in ("tp", "pp", "dp", "zero", "era")} == {
        "tp": 2, "pp": 4, "dp": 2, "zero": 1, "era": "v2",
    }  # fmt: skip
    copies = SMALL.num_layers * 6 * 128 + 2 * 128
    assert found["parameters"]["as_neox_counts"] == found["parameters"]["total"] + copies
    assert found["anomalies"] == []
    rows = kinds(found)
    assert rows["mlp up"]["start"] == "small_init" and rows["mlp down"]["start"] == "wang_init"
    for kind in ("embedding", "head", "attention qkv", "attention out", "mlp up", "mlp down"):
        assert rows[kind]["start"] in rows[kind]["fits"], kind


def test_every_rank_of_that_dump_is_put_in_its_place(dump):
    checkpoint = open_checkpoint(dump)
    model, state = checkpoint.config.model, checkpoint.optimizer
    for ours, position, theirs in [
        ("blocks.3.attn.qkv.weight", 5, "attention.query_key_value.weight"),
        ("blocks.0.mlp.down.weight", 2, "mlp.dense_4h_to_h.weight"),
        ("blocks.2.mlp.down.bias", 4, "mlp.dense_4h_to_h.bias"),
        ("head.weight", 12, "final_linear.weight"),
    ]:
        for role in ROLES:
            assert torch.equal(state[ours][role].read(), layer(model, position, role)[theirs]), (ours, role)
    assert load_model(dump)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 512)


def test_large_weights_in_16_bits_are_compared_with_their_masters_row_by_row():
    """Of more than one piece, of which 16-bit tensors have fewer than their masters."""
    master = Shaped(InMemory(torch.randn(3_000_000)), (1500, 2000))
    moments = Zeros(master.shape)
    state = AdamState(master=master, exp_avg=moments, exp_avg_sq=moments, step=0)
    name = "blocks.0.mlp.up.weight"
    for changed in (False, True):
        weight = Cast(Scaled(master, 2) if changed else master, "bfloat16")
        checkpoint = Checkpoint("nowhere", "neox", {name: weight}, {name: state}, Progress(), None)
        lines = [line for line in report(checkpoint, full=True)["anomalies"] if "masters rounded" in line]
        assert bool(lines) == changed


def test_describing_needs_no_torch(dump):
    code = (
        "import sys; from castalia.checkpoint.opener import open_checkpoint; from castalia.examine.inspect import "
        "report; report(open_checkpoint(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(dump)], timeout=60).returncode == 0


def change(path: Path, name: str, values: np.ndarray | None, rows: slice = slice(None)) -> None:
    """Overwrite a stored tensor's bytes; None: with the bytes' complement."""
    tensor = open_pt(path)[name]
    assert isinstance(tensor, FileTensor)
    data = (
        np.memmap(path, np.uint8, "r+", tensor.extent.offset, (tensor.extent.size,))
        .view(np.float16)
        .reshape(tensor.shape)
    )
    data[rows] = ~data[rows].view(np.int16).copy() if values is None else values
    data.flush()


@pytest.fixture
def broken(dump, tmp_path) -> Path:
    return Path(shutil.copytree(dump / "global_step9", tmp_path / "global_step9"))


def test_values_that_no_training_gives_are_anomalies(broken):
    change(broken / "layer_03-model_01-model_states.pt", "mlp.dense_h_to_4h.weight", np.float16(np.nan), slice(0, 1))
    change(broken / "layer_04-model_00-model_states.pt", "attention.query_key_value.weight", np.float16(0), slice(5, 7))
    change(broken / "layer_12-model_00-model_states.pt", "final_linear.weight", np.float16(0))
    change(broken / "layer_12-model_01-model_states.pt", "final_linear.weight", np.float16(0))
    lines = "\n".join(inspected(broken)["anomalies"])
    assert "blocks.1.mlp.up.weight: 128 of 32,768 sampled values are NaN or infinite" in lines
    assert "blocks.2.attn.qkv.weight: 2 of 256 sampled rows are zero" in lines
    assert "head.weight: all 65,536 sampled values are zero" in lines


def test_attention_that_never_had_a_gradient_is_an_anomaly(tmp_path):
    model = shape_of_20b(64, vocab_size=128, num_layers=2, num_heads=4)
    weights = {name: torch.randn(shape) for name, shape in tensor_shapes(model).items()}
    state = {
        name: {"exp_avg": torch.zeros_like(w), "exp_avg_sq": w.square() * (".attn." not in name), "step": 3}
        for name, w in weights.items()
    }
    writer = CheckpointSaver(tmp_path)
    writer.save(weights, state, Progress(step=3), RunConfig(model=model))
    writer.close()
    found = inspected(tmp_path)
    assert found["bytes"]["moments"] == 2 * found["bytes"]["weights"] and found["bytes"]["masters"] == 0
    assert [line.split(":")[0] for line in found["anomalies"]] == [
        "attention qkv", "attention out", "blocks.0.attn.qkv.bias",
    ]  # fmt: skip
    assert "attention had no part in training" in found["anomalies"][0]


def test_the_full_reading_lists_tensors_and_finds_damage(broken):
    found = inspected(broken, full=True)
    assert len(found["tensors"]) == 100 and found["anomalies"] == []
    assert found["sampled_values"] == found["parameters"]["total"]
    change(broken / "layer_03-model_01-model_states.pt", "mlp.dense_h_to_4h.weight", None, slice(0, 1))
    with pytest.raises(CheckpointError, match="layer_03-model_01.* is damaged"):
        inspected(broken, full=True)


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_the_full_reading_verifies_our_own_checkpoints(file, tmp_path):
    model = ModelConfig(num_layers=1, hidden_size=64, num_heads=4, max_positions=48, vocab_size=20_000)
    written(made(model), tmp_path / "native", "native")
    assert inspected(tmp_path / "native", full=True)["anomalies"] == []
    path = tmp_path / "native" / f"{file}-00000.safetensors"
    for stored in open_safetensors(path).values():
        extent = stored.extent
        data = bytearray(path.read_bytes())
        data[extent.offset + 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{file}-00000.safetensors is damaged"):
            inspected(tmp_path / "native", full=True)
        data[extent.offset + 1] ^= 1
        path.write_bytes(data)


def test_files_of_another_step_are_found_by_their_masters(broken, tmp_path):
    other = write_20b(tmp_path / "other", SMALL, step=7)
    for rank in range(2):
        name = f"layer_03-model_{rank:02d}-model_states.pt"
        tensors = torch.load(other / name)
        torch.save({key: value + 0.5 for key, value in tensors.items()}, broken / name)
    lines = inspected(broken, full=True)["anomalies"]
    assert "blocks.1.mlp.up.weight: the stored weights are not the fp32 masters rounded" in lines
    assert not any(line.startswith("blocks.2.") for line in lines)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_samples_decode_what_is_stored(dtype, tmp_path):
    tensor = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.save({"x": tensor, "columns": tensor.t()}, tmp_path / "x.pt")
    ref = open_pt(tmp_path / "x.pt")["x"]
    (run,) = ref.runs()
    raw = run.path.read_bytes()[run.offset : run.offset + run.num_bytes]
    assert torch.equal(torch.from_numpy(as_float32(raw, run.dtype_name)), tensor.float().flatten())
    whole, some = sample(ref, 64), sample(ref, 4)
    assert whole.count == tensor.numel() and whole.std == pytest.approx(tensor.float().std(unbiased=False).item(), 1e-5)
    assert 3 * SPAN_ELEMENTS < some.count <= 4 * SPAN_ELEMENTS and some.std == pytest.approx(whole.std, rel=0.05)


def test_sums_of_parts_are_the_sums_of_the_whole():
    values = np.array([0, 0, 1, np.nan, -3, 2, 0, 0], np.float32)
    whole, parts = Sums(), [Sums(), Sums()]
    whole.add(values, 2)
    for each, half in zip(parts, np.split(values, 2), strict=True):
        each.add(half, 2)
    parts[0].merge(parts[1])
    assert parts[0] == whole
    assert (whole.count, whole.not_finite, whole.rows, whole.zero_rows, whole.low, whole.high) == (8, 1, 4, 2, -3, 2)


def test_each_kind_of_head_has_its_figures():
    assert by_kind(["head.weight", "reward.weight"]) == {"head": ["head.weight"], "reward head": ["reward.weight"]}

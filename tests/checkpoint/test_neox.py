"""NeoX checkpoints: genuine ones give the original's logits; written ones give back every tensor in every layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint.formats.neox import read as neox_read
from castalia.checkpoint.rules import drift
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.errors import CheckpointError
from castalia.loading import build_model, load_weights
from castalia.model.transformer import Transformer
from castalia.storage.extent import FileTensor
from castalia.storage.torch_file import open_pt
from tests.checkpoint.neox_writer import ITERATION, SKIPPED, STEP, Written, write

TOLERANCE = {"fp32": 2e-6, "fp16": 4e-3, "bf16": 3e-2}
GENUINE = [
    "pp0-mp1-dp2-z1-fp16-rotary-par",
    "pp0-mp1-z0-fp16-rotary-par",
    "pp0-mp1-z0-fp32-rotary-par",
    "pp1-mp1-dp2-z1-bf16-learned-tied",
    "pp1-mp1-dp2-z1-fp16-rotary-par",
    "pp1-mp1-dp2-z1-fp32-rotary-par-nowd",
    "pp1-mp1-dp3-z1-bf16-rotary-par",
    "pp1-mp1-z0-fp32-learned-tied",
    "pp1-mp1-z0-fp32-llama",
    "pp1-mp1-z0-fp32-rotary-par",
    "pp1-mp2-z0-fp32-rotary-par",
    "pp2-mp1-z0-fp32-rotary-seqres",
    "v1-pp1-mp1-dp2-z1-fp16-rotary-par",
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def step5(fixtures: Path, variant: str) -> Path:
    return fixtures / "neox" / variant / "checkpoint" / "global_step5"


@pytest.mark.parametrize("variant", GENUINE)
def test_genuine_checkpoints_give_the_originals_logits(variant, fixtures):
    checkpoint = neox_read.read(step5(fixtures, variant))
    expected = np.load(fixtures / "neox" / variant / "expected_logits.npz")
    with torch.no_grad():
        logits = build_model(checkpoint)(torch.from_numpy(expected["input_ids"]))
    precision = next(name for name in TOLERANCE if name in variant)
    assert (logits - torch.from_numpy(expected["logits"])).abs().max() <= TOLERANCE[precision]


@pytest.mark.parametrize("variant", GENUINE)
def test_genuine_optimizer_states_belong_to_the_weights(variant, fixtures):
    checkpoint = neox_read.read(step5(fixtures, variant))
    assert checkpoint.progress.step == 5 and checkpoint.progress.skipped == 0
    assert checkpoint.optimizer is not None and checkpoint.optimizer.keys() == checkpoint.model.keys()
    for name, state in checkpoint.optimizer.items():
        weight = checkpoint.model[name].read()
        assert torch.equal(state["master"].read().to(weight.dtype), weight)
        assert state["exp_avg"].read().abs().max() > 0 and state["exp_avg_sq"].read().min() >= 0
        assert state["exp_avg"].shape == tuple(weight.shape)
        assert state["step"] == (6 if "z0-fp16" in variant else 5)  # this one counts its initialisation
    assert (checkpoint.progress.loss_scale is not None) == ("fp16" in variant)
    assert checkpoint.facts.adam_steps_stored == (not variant.startswith("v1"))


SIZES = {"num_layers": 3, "hidden_size": 16, "num_heads": 4, "vocab_size": 64, "vocab_multiple": 1, "max_positions": 32}
ROTARY = {**SIZES, "mlp_size": 64}
MODELS = {
    "parallel": ModelConfig(**ROTARY, rotary_pct=0.5, parallel_residual=True),
    "sequential": ModelConfig(**ROTARY, rotary_pct=0.5),
    "tied": ModelConfig(**ROTARY, position="learned", tie_embeddings=True),
    "llama": ModelConfig(
        **SIZES, num_kv_heads=2, mlp_size=24, norm="rmsnorm", activation="silu", gated_mlp=True, attention_bias=False,
        mlp_bias=False,
    ),
    "gated": ModelConfig(**SIZES, mlp_size=24, activation="gelu", gated_mlp=True),
}  # fmt: skip
CASES = [
    ("parallel", {"tp": 1}),
    ("parallel", {"tp": 2, "pp": 2}),
    ("parallel", {"tp": 4, "pp": 3, "kind": "none"}),
    ("parallel", {"tp": 2, "pp": 2, "dp": 2, "kind": "zero", "dtype": torch.float16}),
    ("parallel", {"tp": 2, "pp": 2, "kind": "flat", "dtype": torch.float16}),
    ("parallel", {"pipeline": False, "tp": 2, "dp": 3, "kind": "zero", "dtype": torch.float16}),
    ("parallel", {"pp": 3, "dp": 3, "kind": "bf16", "dtype": torch.bfloat16}),
    ("parallel", {"dp": 3, "kind": "elastic", "dtype": torch.float16}),
    ("parallel", {"tp": 2, "pp": 2, "dp": 3, "kind": "old1", "era": "v1", "dtype": torch.float16}),
    ("parallel", {"dp": 2, "kind": "old1_plain", "era": "v1", "dtype": torch.float16}),
    ("parallel", {"dp": 4, "kind": "old2", "era": "v1", "dtype": torch.float16}),
    ("parallel", {"pipeline": False, "dp": 3, "kind": "stage3", "dtype": torch.float16}),
    ("parallel", {"pipeline": False, "kind": "universal"}),
    ("parallel", {"no_decay": False, "pp": 2}),
    ("sequential", {"tp": 2, "dp": 2, "kind": "zero", "no_decay": False}),
    ("sequential", {"tp": 4, "pp": 2, "era": "v2"}),
    ("tied", {"tp": 2, "pp": 2}),
    ("tied", {"pp": 3, "kind": "flat", "dtype": torch.float16}),
    ("tied", {"pp": 2, "dp": 2, "kind": "bf16", "dtype": torch.bfloat16}),
    ("llama", {"tp": 2, "pp": 2}),
    ("llama", {"tp": 2, "rows": "old"}),
    ("llama", {"tp": 2, "rows": "old", "era": "w1-w3", "dp": 2, "kind": "zero", "dtype": torch.float16}),
    ("gated", {"tp": 4, "dp": 2, "kind": "zero"}),
]


def check(checkpoint: Checkpoint, written: Written) -> None:
    assert checkpoint.model.keys() == written.weights.keys()
    for name, expected in written.weights.items():
        assert torch.equal(checkpoint.model[name].read(), expected), name
    assert (checkpoint.optimizer is None) == (not written.states)
    for role, tensors in written.states.items():
        for name, expected in tensors.items():
            found = checkpoint.optimizer[name][role]
            assert found.shape == tuple(expected.shape) and torch.equal(found.read(), expected), (role, name)
            half = tuple(slice(0, (size + 1) // 2) for size in expected.shape)
            assert torch.equal(found.read(half), expected[half]), (role, name)


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_every_layout_gives_back_every_tensor(kind, layout, tmp_path):
    written = write(tmp_path / "global_step9", MODELS[kind], **layout)
    hints = {"gqa_rows": "old"} if layout.get("rows") == "old" else {}
    checkpoint = neox_read.read(written.path, **hints)
    check(checkpoint, written)
    assert checkpoint.config.model.model_dump(exclude={"vocab_multiple", "rms_eps_inside"}) == MODELS[kind].model_dump(
        exclude={"vocab_multiple", "rms_eps_inside"}
    )
    assert (checkpoint.progress.step, checkpoint.progress.skipped) == (ITERATION, SKIPPED)
    steps = {"flat": STEP + 1, "old1": ITERATION - SKIPPED, "old2": ITERATION - SKIPPED}
    expected_step = steps.get(layout.get("kind"), STEP)
    assert all(state["step"] == expected_step for state in (checkpoint.optimizer or {}).values())
    facts = checkpoint.facts
    assert (facts.tp, facts.pp, facts.dp) == (
        layout.get("tp", 1),
        layout.get("pp", 1),
        layout.get("dp", 1),
    )
    assert facts.era == layout.get("era", "head")
    biased_sum = MODELS[kind].parallel_residual and layout.get("tp", 1) > 1
    assert checkpoint.summed_bias_ranks == (layout["tp"] if biased_sum else 1)
    if layout.get("dtype") == torch.float16:
        assert checkpoint.progress.loss_scale["cur_iter"] == ITERATION


def test_files_at_the_root_without_config_or_optimizer(tmp_path):
    """As released weights often come: nothing but layer files, heads from the arguments, the rest guessed and noted."""
    written = write(tmp_path / "weights", MODELS["parallel"], tp=2, kind="none", yml=False, era="v1")
    checkpoint = neox_read.read(written.path)
    check(checkpoint, written)
    assert checkpoint.config.model.rotary_pct == 0.5  # from inv_freq
    assert any("parallel_residual=True" in note for note in checkpoint.notes)
    assert any("no optimizer state" in note for note in checkpoint.state_notes)
    (written.path / "12B.yml").write_text("model: {num_layers: 3, hidden_size: 16, num_heads: 4, rotary_pct: 0.5}\n")
    assert neox_read.read(written.path).config.model.parallel_residual is False


def test_layer_files_alone_need_only_a_config(tmp_path):
    written = write(tmp_path / "weights", MODELS["sequential"], tp=2, kind="none")
    for path in written.path.glob("mp_rank_*"):
        path.unlink()
    check(neox_read.read(written.path), written)
    shutil.rmtree(written.path / "configs")
    with pytest.raises(CheckpointError, match="how many attention heads"):
        neox_read.read(written.path)


def test_norms_that_drifted_are_averaged_and_reported(tmp_path):
    written = write(tmp_path / "a", MODELS["sequential"], tp=2, kind="none")
    path = written.path / "layer_03-model_01-model_states.pt"
    layer = torch.load(path)
    layer["input_layernorm.weight"] += 0.5
    torch.save(layer, path)
    checkpoint = neox_read.read(written.path)
    name = "blocks.1.norm1.weight"
    found, expected = checkpoint.model[name].read(), written.weights[name] + 0.25
    assert torch.allclose(found, expected) and drift(checkpoint.model) == {name: pytest.approx(0.5)}
    (note,) = load_weights(Transformer(checkpoint.config.model), checkpoint).notes
    assert name in note and "averaged" in note


def test_row_order_and_epsilon_are_guessed_with_a_note(tmp_path):
    old = write(tmp_path / "old", MODELS["llama"], tp=2, rows="old", era="w1-w3")
    checkpoint = neox_read.read(old.path)
    check(checkpoint, old)
    assert not checkpoint.config.model.rms_eps_inside
    assert [note.split()[0] for note in checkpoint.notes] == ["RMSNorm's", "grouped"]
    told = neox_read.read(old.path, gqa_rows="new", rms_eps="inside")
    assert told.config.model.rms_eps_inside and not told.notes
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(told.model[name].read(), checkpoint.model[name].read())


def test_parameters_without_gradient_have_empty_moments(tmp_path):
    """The original keeps no state for them; attention without MLP bias never gets a gradient there."""
    written = write(tmp_path / "a", MODELS["parallel"])
    path = written.path / "mp_rank_00_model_states.pt"
    state = torch.load(path)
    del state["optimizer"]["state"][1]
    torch.save(state, path)
    entry = neox_read.read(written.path).optimizer["blocks.0.attn.qkv.weight"]
    assert entry["step"] == STEP and not entry["exp_avg"].read().any()


def test_tied_copies_that_differ_on_the_last_stage_are_ignored(tmp_path):
    written = write(tmp_path / "a", MODELS["tied"], pp=2)
    path = written.path / "mp_rank_01_model_states.pt"
    state = torch.load(path)
    state["optimizer"]["state"][1]["exp_avg"] += 1  # the copy of the position embedding
    torch.save(state, path)
    check(neox_read.read(written.path), written)


def remove(name):
    return lambda path: (path / name).unlink()


def change(name, **values):
    def apply(path):
        state = torch.load(path / name, weights_only=False)
        torch.save(state | values, path / name)

    return apply


DAMAGE = {
    "layer": (
        remove("layer_03-model_00-model_states.pt"),
        "1 of 18 files: layer_03-model_00-.*There are layer files .*00-00, 00-01, 02-00",
    ),
    "all of a layer": (
        lambda path: [file.unlink() for file in path.glob("layer_03*")],
        "files: layer_03-model_00-model_states.pt, layer_03-model_01-model_states.pt",
    ),
    "last layer": (lambda path: [file.unlink() for file in path.glob("layer_04*")], "layer_04"),
    "norm": (lambda path: [file.unlink() for file in path.glob("layer_06*")], "layer_06"),
    "tensor rank": (
        lambda path: [file.unlink() for file in path.glob("*model_01*")],
        "lacks 6 of 18 files: layer_00-model_01-",
    ),
    "model state": (remove("mp_rank_01_model_states.pt"), "files: mp_rank_01_model_states.pt"),
    "shard": (remove("zero_pp_rank_0_mp_rank_01_optim_states.pt"), "files: zero_pp_rank_0_mp_rank_01_optim_states.pt"),
    "all last shards": (
        lambda path: [f.unlink() for f in path.glob("zero_pp_rank_1*")],
        "zero_pp_rank_1_mp_rank_00_.*use the weights alone",
    ),
    "mixed steps": (change("mp_rank_01_model_states.pt", iteration=4), "different steps are mixed"),
    "empty": (lambda path: (path / "mp_rank_01_model_states.pt").write_bytes(b""), "empty"),
    "truncated": (
        lambda path: os.truncate(path / "layer_02-model_00-model_states.pt", 2000),
        "truncated or damaged",
    ),
    "other size": (
        lambda path: torch.save({"input_layernorm.weight": torch.ones(3)}, path / "layer_02-model_01-model_states.pt"),
        "different runs",
    ),
    "other config": (
        lambda path: (path / "configs" / "config.yml").write_text(
            "model: {num_layers: 4, hidden_size: 16, num_heads: 4}"
        ),
        "model.num_layers: 3 in the tensors, 4 in the config",
    ),
    "unknown tensor": (
        lambda path: [
            torch.save(torch.load(file) | {"adapter.weight": torch.ones(3)}, file) for file in path.glob("layer_02*")
        ],
        "not understood: 2.adapter.weight",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, tmp_path):
    written = write(tmp_path / "a", MODELS["parallel"], tp=2, dp=2, kind="zero", dtype=torch.float16)
    damage, message = DAMAGE[kind]
    damage(written.path)
    with pytest.raises(CheckpointError, match=message):
        neox_read.read(written.path)


def test_flipped_bits_in_a_flat_vector_are_found(tmp_path):
    written = write(tmp_path / "a", MODELS["parallel"], dp=2, kind="zero", dtype=torch.float16)
    path = written.path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    vector = open_pt(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    data = bytearray(path.read_bytes())
    data[vector.extent.offset + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        [state["master"].read() for state in neox_read.read(written.path).optimizer.values()]


class Runs:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("pattern", ["layer_02*", "mp_rank_00*", "zero_pp_rank_1*"])
def test_executable_pickles_are_refused_in_every_file(pattern, tmp_path):
    written = write(tmp_path / "a", MODELS["parallel"], dp=2, kind="zero", dtype=torch.float16)
    (path,) = written.path.glob(pattern)
    torch.save({"a": torch.ones(2), "b": Runs(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*{os.name}\.system"):
        neox_read.read(written.path)
    assert not (tmp_path / "ran").exists()


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    written = write(tmp_path / "a", MODELS["parallel"], tp=2, pp=2, dp=2, kind="zero", dtype=torch.float16)
    read = []
    monkeypatch.setattr(FileTensor, "read", lambda self, slices=None: read.append(self))
    neox_read.read(written.path)
    assert not read


def test_genuine_losses_are_complete(fixtures):
    """The list of variants above is that of the folder."""
    found = {path.parent.name for path in (fixtures / "neox").glob("*/losses.json") if json.loads(path.read_text())}
    assert set(GENUINE) <= found
    assert {name for name in found if not name.startswith("megds")} == set(GENUINE)

"""Megatron-DeepSpeed: genuine checkpoints give the original's logits, and all orders of fused rows are read."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from castalia.checkpoint.formats.megatron import read as megatron_read
from castalia.checkpoint.formats.neox import read as neox_read
from castalia.errors import CheckpointError
from castalia.loading import build_model

GENUINE = ["megds-pp1-mp1-dp2-z1-bf16", "megds-pp1-mp1-z0-fp32"]
N, D, H, V, LAYERS = 4, 4, 16, 64, 2


@pytest.mark.parametrize("variant", GENUINE)
def test_genuine_checkpoints(variant, fixtures):
    path = fixtures / "neox" / variant / "checkpoint" / "global_step5"
    checkpoint = megatron_read.read(path)
    expected = np.load(fixtures / "neox" / variant / "expected_logits.npz")
    with torch.no_grad():
        logits = build_model(checkpoint)(torch.from_numpy(expected["input_ids"]))
    tolerance = 2e-6 if "fp32" in variant else 3e-2
    assert (logits - torch.from_numpy(expected["logits"])).abs().max() <= tolerance
    assert checkpoint.progress.step == 5 and checkpoint.progress.tokens == 640
    assert checkpoint.config.model.vocab_size == 430 and checkpoint.config.model.padded_vocab_size == 448
    assert checkpoint.optimizer.keys() == checkpoint.model.keys()
    for name, state in checkpoint.optimizer.items():
        weight = checkpoint.model[name].read()
        assert torch.equal(state["master"].read().to(weight.dtype), weight) and state["step"] == 5
        assert state["exp_avg_sq"].read().min() >= 0


def write(path: Path, tp: int, version: float | None) -> dict[str, torch.Tensor]:
    """A folder without optimizer; gives the fused weights as (heads, 3, d) rows."""
    path.mkdir()
    generator = torch.Generator().manual_seed(2)
    fused = {f"blocks.{i}.attn.qkv.weight": torch.randn(N * 3 * D, H, generator=generator) for i in range(LAYERS)}
    for rank in range(tp):

        def save(position, tensors, rank=rank):
            torch.save(tensors, path / f"layer_{position:02d}-model_{rank:02d}-model_states.pt")

        embedding = torch.randn(V, H, generator=torch.Generator().manual_seed(3)).chunk(tp)[rank].clone()
        save(1, {"word_embeddings.weight": embedding, "position_embeddings.weight": torch.ones(8, H)})
        for i, weight in enumerate(fused.values()):
            rows = weight.view(tp, N // tp, 3, D, H)[rank]
            if version == 0:
                rows = rows.transpose(0, 1)
            elif version == 1.0:
                rows = rows.transpose(1, 2)
            block = {"self_attention.query_key_value.weight": rows.reshape(-1, H).clone()}
            block |= {"self_attention.query_key_value.bias": torch.zeros(N * 3 * D // tp)}
            block |= {"self_attention.dense.weight": torch.ones(H, H // tp), "self_attention.dense.bias": torch.ones(H)}
            block |= {"mlp.dense_h_to_4h.weight": torch.ones(4 * H // tp, H), "mlp.dense_4h_to_h.bias": torch.ones(H)}
            block |= {"mlp.dense_h_to_4h.bias": torch.ones(4 * H // tp)}
            block |= {"mlp.dense_4h_to_h.weight": torch.ones(H, 4 * H // tp)}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                block |= {f"{norm}.weight": torch.ones(H), f"{norm}.bias": torch.ones(H)}
            save(3 + i, block)
        save(4 + LAYERS, {"weight": torch.ones(H), "bias": torch.ones(H)})
        args = argparse.Namespace(num_layers=LAYERS, num_attention_heads=N, bias_gelu_fusion=True, seq_length=8)
        state = {"args": args, "iteration": 3, "optimizer": None, "mp_world_size": tp}
        torch.save(
            state | ({} if version is None else {"checkpoint_version": version}),
            path / f"mp_rank_{rank:02d}_model_states.pt",
        )
    return fused


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0, 3.0])
def test_fused_rows_of_every_version(tp, version, tmp_path):
    fused = write(tmp_path / "a", tp, 0 if version is None else version)
    checkpoint = megatron_read.read(tmp_path / "a")
    for name, expected in fused.items():
        assert torch.equal(checkpoint.model[name].read(), expected)
    assert torch.equal(checkpoint.model["blocks.1.attn.out.bias"].read(), torch.ones(H))  # taken once
    assert checkpoint.optimizer is None and checkpoint.config.model.activation == "gelu_tanh"


def test_only_its_own_folders_are_detected(tmp_path, fixtures):
    write(tmp_path / "a", 1, 3.0)
    theirs = fixtures / "neox" / "pp1-mp1-z0-fp32-rotary-par" / "checkpoint" / "global_step5"
    assert megatron_read.detect(tmp_path / "a") and not neox_read.detect(tmp_path / "a")
    assert neox_read.detect(theirs) and not megatron_read.detect(theirs)
    assert not neox_read.detect(tmp_path) and not megatron_read.detect(tmp_path)


def test_a_norm_after_the_embedding_is_refused(tmp_path):
    write(tmp_path / "a", 1, 3.0)
    path = tmp_path / "a" / "layer_01-model_00-model_states.pt"
    torch.save(torch.load(path) | {"word_embeddings.norm.weight": torch.ones(H)}, path)
    with pytest.raises(CheckpointError, match="BLOOM"):
        megatron_read.read(tmp_path / "a")

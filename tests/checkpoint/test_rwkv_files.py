"""RWKV's own files: what they compute, there and back, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import ModelConfig, RWKVConfig
from castalia.errors import CheckpointError
from castalia.loading import build_model
from tests.checkpoint.made import SIZES, made, written
from tests.model.rwkv_paper import logits

H, HEADS, F, V, LAYERS = 64, 2, 224, 80, 3


def official(dtype=torch.float32, mix_rank=32, decay_rank=64):
    """Weights by the names, shapes and in the order of a published file, in which the first norm is its own."""
    draw = torch.Generator().manual_seed(5)

    def drawn(*shape, scale=0.3, base=0.0):
        return (base + scale * torch.randn(*shape, generator=draw)).to(dtype)

    def norm(name):
        return {f"{name}.weight": drawn(H, base=1.0), f"{name}.bias": drawn(H)}

    held = {"emb.weight": drawn(V, H)}
    for i in range(LAYERS):
        block = norm("ln1") | norm("ln2") | (norm("ln0") if i == 0 else {})
        block |= {f"att.time_maa_{each}": drawn(1, 1, H, base=0.5) for each in "xwkvrg"}
        block |= {"att.time_maa_w1": drawn(H, 5 * mix_rank), "att.time_maa_w2": drawn(5, mix_rank, H)}
        block |= {"att.time_decay": drawn(1, 1, H, scale=2.0, base=-3.0)}
        block |= {"att.time_decay_w1": drawn(H, decay_rank), "att.time_decay_w2": drawn(decay_rank, H)}
        block |= {"att.time_faaaa": drawn(HEADS, H // HEADS)}
        parts = ("receptance", "key", "value", "output", "gate")
        block |= {f"att.{part}.weight": drawn(H, H) for part in parts} | norm("att.ln_x")
        block |= {f"ffn.time_maa_{each}": drawn(1, 1, H, base=0.5) for each in "kr"}
        block |= {"ffn.key.weight": drawn(F, H), "ffn.receptance.weight": drawn(H, H), "ffn.value.weight": drawn(H, F)}
        held |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return held | norm("ln_out") | {"head.weight": drawn(V, H)}


def saved(held, path):
    torch.save(held, path)
    return path


def paper(held, tokens):
    return logits({name: value.float().numpy() for name, value in held.items()}, tokens)


@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, (32, 64)), (torch.bfloat16, (64, 128))], ids=str)
@torch.no_grad()
def test_an_official_file_computes_what_the_paper_says_and_comes_back(dtype, ranks, tmp_path):
    held = official(dtype, *ranks)
    source = open_checkpoint(saved(held, tmp_path / "rwkv.pth"))
    tokens = torch.randint(V, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    model = build_model(source)
    assert np.abs(model(torch.tensor([tokens]))[0].numpy() - paper(held, tokens)).max() < 2e-4
    again = written(written(source, tmp_path / "native", "native"), tmp_path / "again.pth", "rwkv")
    assert again.config.model == source.config.model
    back = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(back) == list(held)
    assert all(torch.equal(back[name], held[name]) and back[name].dtype == dtype for name in held)


@torch.no_grad()
def test_what_gpt_neox_trained_goes_there_and_back(fixtures, tmp_path):
    folder = fixtures / "neox-kinds" / "rwkv-fp32"
    source = open_checkpoint(folder / "checkpoint" / "global_step5")
    expected = np.load(folder / "expected_logits.npz")
    there = written(source, tmp_path / "rwkv.pth", "rwkv")
    held = torch.load(tmp_path / "rwkv.pth", weights_only=True)
    assert torch.equal(held["blocks.0.ln0.weight"], held["blocks.0.ln1.weight"])
    row = expected["input_ids"][1].tolist()
    assert np.abs(paper(held, row) - expected["logits"][1]).max() < 1e-5
    assert not there.config.model.embedding_norm and not there.config.model.tie_embeddings  # its head is written twice
    options = {"layout": TargetLayout(pp=1)}
    back = written(there, tmp_path / "neox", "neox", **options)
    for name, ref in source.model.items():
        assert torch.equal(ref.read(), back.model[name].read()), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("ln_out.bias"), "missing: ln_out.bias"),
        (lambda held: held.pop("blocks.0.ln0.weight"), r"blocks\.0\.ln0\.weight is missing"),
        (lambda held: held.update({"blocks.0.att.x_r": held["emb.weight"]}), r"not understood: blocks\.0\.att\.x_r"),
        (lambda held: held.update({"emb.weight": held["ln_out.bias"]}), "where a matrix is expected"),
        (lambda held: held.update({"blocks.0.att.r_k": held["ln_out.bias"]}), "RWKV-7"),
        (lambda held: held.pop("blocks.0.att.time_maa_w1"), "RWKV-5"),
        (lambda held: held.update({"args": 3}), "is no tensor"),
        (lambda held: held.update({5: held["emb.weight"]}), "5 is no tensor with a name"),
        (lambda held: held.update({"blocks.x.att": held["emb.weight"]}), r"not understood: blocks\.x\.att"),
        (lambda held: held.update({"blocks.300000.att": held["emb.weight"]}), "no usable model"),
        (lambda held: held.update({"emb.weight": torch.zeros(0, H)}), "no usable model"),
        (lambda held: held.update({"blocks.0.att.time_maa_w2": torch.zeros(5, 0, H)}), "without a value"),
        (lambda held: held.update({"blocks.0.att.time_faaaa": torch.zeros(2, 16)}), "not as wide as the model"),
    ],
)
def test_other_files_are_refused_by_name(change, said, tmp_path):
    held = official()
    change(held)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(saved(held, tmp_path / "rwkv.pth"))


RWKV = ModelConfig(**SIZES, pattern=("rwkv",), position="none")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": ("rwkv", "attention")}, "dense blocks"),
        ({"position": "learned"}, "model.position=learned"),
        ({"norm": "rmsnorm"}, "model.norm=rmsnorm"),
        ({"rwkv_over": "batch"}, "mix over the batch"),
    ],
)
def test_what_these_files_cannot_hold_is_refused_by_name(change, said):
    with pytest.raises(CheckpointError, match=said):
        convert.plan_files("rwkv", convert.prepare(made(RWKV.with_(change), optimizer=False)), WriteOptions())


def test_other_formats_refuse_these_models_by_name():
    source = convert.prepare(made(RWKV, optimizer=False))
    with pytest.raises(CheckpointError, match=r"model\.pattern"):
        convert.plan_files("hf", source, WriteOptions())
    own = replace(source, config=source.config.with_({"model.rwkv": RWKVConfig(mix_rank=8).model_dump()}))
    with pytest.raises(CheckpointError):
        convert.plan_files("neox", own, WriteOptions())

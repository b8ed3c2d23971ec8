"""A model of which one block at a time is in memory computes what the whole model computes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from castalia.checkpoint.file_plan import TargetLayout
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint
from castalia.config.schema import ModelConfig
from castalia.data.loader import Batch
from castalia.errors import CheckpointError
from castalia.loading import build_model
from castalia.model.layers import Linear, linear
from castalia.parallel.executor import Executor
from castalia.plan.stream_plan import EvaluationShape, StreamPlan, evaluation_work, spread
from castalia.storage.extent import extents_of
from castalia.streaming.stream_units import units_of
from castalia.streaming.streamed_model import Scratch, ScratchLinear, StreamedExecutor, StreamedTransformer
from tests.checkpoint.made import FAMILIES, SIZES, changed, made, written

OTHERS = {
    "alibi": ModelConfig(**SIZES, position="alibi"),
    "sinusoidal": ModelConfig(**SIZES, position="sinusoidal", norm="scalenorm"),
    "shared norm": ModelConfig(**SIZES, parallel_residual=True, shared_norm=True, norm="layernorm_no_params"),
    "other kinds": ModelConfig(**SIZES | {"num_layers": 4}, pattern=("mamba", "attention", "amlp"), amlp_size=8),
    "RWKV": ModelConfig(**SIZES | {"num_layers": 4}, pattern=("rwkv", "attention"), embedding_norm=True),
    "norms of heads": ModelConfig(
        **SIZES,
        norm="rmsnorm",
        qk_norm="head",
        head_dim=12,
        norm_placement="both",
        zero_centered_norms=True,
        sliding_window=5,
        window_pattern=(True, False),
        embedding_norm=True,
        embedding_multiplier=3.0,
    ),
    "caps": ModelConfig(**SIZES, attention_softcap=0.2, logit_softcap=0.3, num_kv_heads=2, tie_embeddings=True),
    "norms after": ModelConfig(**SIZES, position="learned", position_offset=2, norm_placement="after", qk_norm="width"),
    "deep": ModelConfig(**SIZES | {"num_layers": 7}, rotary_pct=0.25, parallel_residual=True),
}


def streamed(
    checkpoint: Checkpoint, dtype: torch.dtype, resident: int = 0, head_stays: bool = False
) -> StreamedTransformer:
    cfg = architecture(checkpoint)
    units = units_of(checkpoint, cfg, dtype)
    work = evaluation_work(cfg, EvaluationShape(16, 2, 6, False), dtype.itemsize)
    blocks = spread(resident, cfg.num_layers)
    plan = StreamPlan(units.sizes(), work, 10**9, 2, blocks, head_stays or units.sizes().large_head > 0)
    return StreamedTransformer(cfg, units, plan, checkpoint.path)


def tokens_of(cfg: ModelConfig, rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_logits_and_losses_have_the_bits_of_the_whole_model(kind: str, stored: torch.dtype) -> None:
    checkpoint = made({**FAMILIES, **OTHERS}[kind], dtype=stored, optimizer=False)
    whole, model = build_model(checkpoint), streamed(checkpoint, torch.float32)
    for seed in range(3):  # the buffers are used again
        tokens = tokens_of(whole.cfg, seed=seed)
        assert torch.equal(model(tokens), whole(tokens))
        assert torch.equal(model(tokens, tokens)[0], whole(tokens, tokens)[0])
    model.reader.close()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_a_bias_of_the_head_is_added(stored: torch.dtype) -> None:
    cfg = ModelConfig(**SIZES, parallel_residual=True, shared_norm=True, head_bias=True, logit_softcap=0.3)
    checkpoint = made(cfg, dtype=stored, optimizer=False)
    whole, model = build_model(checkpoint), streamed(checkpoint, torch.float32)
    assert whole.head.bias.abs().max() > 0.01
    tokens = tokens_of(cfg)
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(model(tokens), whole(tokens), **near)
    torch.testing.assert_close(model(tokens, tokens), whole(tokens, tokens), **near)
    torch.testing.assert_close(
        model(tokens, tokens, per_sequence=True), whole(tokens, tokens, per_sequence=True), **near
    )
    model.reader.close()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_in_bf16_mambas_scan_is_read_as_the_whole_model_holds_it(stored: torch.dtype) -> None:
    checkpoint = made(OTHERS["other kinds"], dtype=stored, optimizer=False, scale=4.0)
    whole, model = build_model(checkpoint, dtype=torch.bfloat16), streamed(checkpoint, torch.bfloat16)
    tokens = tokens_of(whole.cfg)
    expected = whole(tokens)
    assert torch.equal(model(tokens), expected)
    model.reader.close()
    for name, parameter in whole.named_parameters():
        if "scan" in name:
            parameter.copy_(parameter.bfloat16())
    assert not torch.equal(whole(tokens), expected)  # so that rounded ones would be seen


LAYOUTS = {
    "native": {},
    "hf": {},
    "neox": {"layout": TargetLayout(tp=2, pp=2)},
}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
@torch.no_grad()
def test_files_of_all_formats_are_streamed_as_they_are(kind: str, to: str, tmp_path: Path) -> None:
    checkpoint = written(made(FAMILIES[kind], dtype=torch.bfloat16), tmp_path / "model", to, **LAYOUTS[to])
    whole, model = build_model(checkpoint), streamed(checkpoint, torch.float32)
    tokens = tokens_of(whole.cfg)
    for _ in range(2):
        assert torch.equal(model(tokens), whole(tokens))
    model.reader.close()


@torch.no_grad()
def test_genuine_folders_are_streamed(fixtures: Path) -> None:
    """Of each kind, with ZeRO and over tensor and pipeline ranks."""
    folders = sorted(path.parent for path in (fixtures / "neox").glob("*/expected_logits.npz"))
    assert len(folders) > 3
    for folder in folders:
        checkpoint = open_checkpoint(folder / "checkpoint")
        whole, model = build_model(checkpoint), streamed(checkpoint, torch.float32)
        tokens = tokens_of(whole.cfg)
        assert torch.equal(model(tokens), whole(tokens)), folder
        model.reader.close()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("resident", "head_stays"), [(0, False), (3, False), (5, True), (7, True)])
@torch.no_grad()
def test_residents_and_passes_change_no_loss(resident: int, head_stays: bool, compute: torch.dtype) -> None:
    """Five micro-batches in passes of two."""
    checkpoint = made(OTHERS["deep"], dtype=torch.float32, optimizer=False)
    whole, model = build_model(checkpoint, dtype=compute), streamed(checkpoint, compute, resident, head_stays)
    tokens = [tokens_of(whole.cfg, seed=seed).numpy() for seed in range(5)]
    batches = [Batch(each, each, each >= 0) for each in tokens]
    found = [float(loss) for _, loss in StreamedExecutor(model, 2).losses(batches)]
    assert found == [float(loss) for _, loss in Executor(whole, 2).losses(batches)]
    assert sorted(model.reader.kept) == sorted({*model.plan.resident, *([7] if model.plan.head_stays else [])})
    model.reader.close()


@torch.no_grad()
def test_a_vocabulary_that_is_padded_differently_is_padded_here_too() -> None:
    checkpoint = made(FAMILIES["gpt_neox"], optimizer=False)
    rows = checkpoint.model["head.weight"].read()[:90]
    cut = changed(checkpoint, head__weight=rows)
    tokens = tokens_of(FAMILIES["gpt_neox"])
    model = streamed(cut, torch.float32)
    assert torch.equal(model(tokens, tokens)[0], build_model(cut)(tokens, tokens)[0])
    model.reader.close()


def test_values_that_are_not_finite_are_named() -> None:
    checkpoint = made(OTHERS["deep"], optimizer=False)
    bad = checkpoint.model["blocks.4.mlp.up.weight"].read()
    bad[3, 5] = torch.nan
    model = streamed(changed(checkpoint, blocks__4__mlp__up__weight=bad), torch.float32)
    with pytest.raises(CheckpointError, match=r"blocks\.4\.mlp\.up\.weight has 1 NaN or infinite"):
        model(tokens_of(model.cfg))
    model.reader.close()


@pytest.mark.parametrize("name", ["embed.weight", "norm.bias"])
def test_values_outside_of_blocks_are_checked_too(name: str) -> None:
    checkpoint = made(OTHERS["deep"], optimizer=False)
    bad = torch.full_like(checkpoint.model[name].read(), torch.inf)
    with pytest.raises(CheckpointError, match=name):
        streamed(changed(checkpoint, **{name.replace(".", "__"): bad}), torch.float32)(tokens_of(OTHERS["deep"]))


def test_damage_is_found_before_anything_is_computed_with_it(tmp_path: Path) -> None:
    checkpoint = written(made(OTHERS["deep"], optimizer=False), tmp_path / "model", "native")
    extent = next(iter(extents_of([checkpoint.model["blocks.3.mlp.down.weight"]])))
    content = bytearray(extent.path.read_bytes())
    content[extent.offset + 100] ^= 1
    extent.path.write_bytes(content)
    model = streamed(open_checkpoint(tmp_path / "model"), torch.float32)
    with pytest.raises(CheckpointError, match="damaged"):
        model(tokens_of(model.cfg))
    model.reader.close()


@pytest.mark.parametrize("shape", [(1024, 4096), (3072, 1024), (4096, 1024), (1500, 700)], ids=str)
@torch.no_grad()
def test_a_weight_that_is_cast_in_slices_gives_the_bits_of_the_whole_weight(shape: tuple[int, int]) -> None:
    rows, columns = shape
    scratch = Scratch(4 * rows * columns, torch.device("cpu"))
    layer = ScratchLinear(Linear(columns, rows), scratch)
    weight, bias = torch.randn(rows, columns).half(), torch.randn(rows).half()
    layer.weight, layer.bias = (torch.nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    threads = torch.get_num_threads()
    try:
        for some in (1, 2, 3):  # with some numbers of threads, slices of some shapes have other last bits
            torch.set_num_threads(some)
            for tokens in (*[1] * 8, 2, 16):
                x = torch.randn(1, tokens, columns)
                assert torch.equal(layer(x), linear(x, weight.float(), bias)), (some, tokens)
    finally:
        torch.set_num_threads(threads)

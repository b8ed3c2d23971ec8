"""Small checkpoints made in memory: every family, with optimizer state, in any dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import AdamState, Checkpoint, Progress
from castalia.config.schema import ModelConfig, RunConfig
from castalia.config.tensor_table import tensor_shapes
from castalia.storage.lazy import InMemory, same_bits

SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 48, "vocab_size": 90}
SIZES["vocab_multiple"] = 32
LLAMA = {
    "norm": "rmsnorm",
    "gated_mlp": True,
    "mlp_size": 56,
    "activation": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_kv_heads": 2,
}
FAMILIES = {
    "gpt_neox": ModelConfig(**SIZES, rotary_pct=0.5, parallel_residual=True),
    "gpt_neox sequential tied": ModelConfig(
        **SIZES, rotary_pct=0.25, tie_embeddings=True, activation="gelu", mlp_size=96
    ),
    "gpt_neox without attention biases": ModelConfig(
        **SIZES, parallel_residual=True, attention_bias=False, norm_eps=1e-6
    ),
    "gpt2": ModelConfig(**SIZES, position="learned", tie_embeddings=True),
    "gpt2 untied": ModelConfig(**SIZES, position="learned", activation="relu", mlp_size=48),
    "llama": ModelConfig(**SIZES, **LLAMA, rotary_base=5e5),
    "llama with biases": ModelConfig(
        **SIZES, **LLAMA | {"attention_bias": True, "mlp_bias": True, "num_kv_heads": None}
    ),
    "mistral": ModelConfig(**SIZES, **LLAMA | {"num_kv_heads": 1}, sliding_window=5),
}

EXPERTS = {"count": 4, "top_k": 2, "width": 40, "gated": True, "norm_topk": True}
MIXTRAL = ModelConfig(**SIZES, **LLAMA, experts=EXPERTS)
QWEN = LLAMA | {"attention_bias": True, "attention_out_bias": False}  # an MLP in the first block, then experts
GLM4_MOE = ModelConfig(
    **SIZES, **QWEN, rotary_pct=0.5, experts=EXPERTS | {"first": 1, "router": "balanced", "shared_width": 80}
)
QWEN2_MOE = ModelConfig(**SIZES, **QWEN, experts=EXPERTS | {"first": 1, "shared_width": 24, "shared_gate": True})


def made(
    model: ModelConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32, optimizer: bool = True, scale: float = 1.0
) -> Checkpoint:
    """Random tensors; norms are near 1. 16-bit weights are the rounded masters."""
    generator = torch.Generator().manual_seed(seed)
    masters = {}
    for name, shape in tensor_shapes(model).items():
        value = torch.randn(*shape, generator=generator) * 0.1 * scale
        masters[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    weights = {name: InMemory(value.to(dtype)) for name, value in masters.items()}
    state = {
        name: AdamState(
            master=weights[name] if dtype == torch.float32 else InMemory(value),
            exp_avg=InMemory(torch.randn(value.shape, generator=generator)),
            exp_avg_sq=InMemory(torch.rand(value.shape, generator=generator)),
            step=7,
        )
        for name, value in masters.items()
    }
    progress = Progress(step=9, skipped=2, tokens=1234, loss_scale={"cur_scale": 2.0**12})
    return Checkpoint("memory", "native", weights, state if optimizer else None, progress, RunConfig(model=model))


def changed(checkpoint: Checkpoint, **tensors: torch.Tensor) -> Checkpoint:
    """With other weights; dots in names are written as `__`."""
    return replace(
        checkpoint, model={**checkpoint.model, **{k.replace("__", "."): InMemory(v) for k, v in tensors.items()}}
    )


def written(checkpoint: Checkpoint, folder: Path, to: str, **options: object) -> Checkpoint:
    """Converted, and opened again."""
    prepared = convert.prepare(checkpoint)
    plan = convert.plan_files(to, prepared, WriteOptions(**options))
    convert.write(plan, folder, "mark", lambda count: None)
    return open_checkpoint(folder)


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Bit for bit: weights, masters, moments, steps; and progress and architecture."""
    assert a.model.keys() == b.model.keys()
    for name in a.model:
        assert a.model[name].dtype == b.model[name].dtype, name
        assert same_bits(a.model[name].read(), b.model[name].read()), name
    assert (a.optimizer is None) == (b.optimizer is None)
    for name in a.optimizer or {}:
        left, right = a.optimizer[name], b.optimizer[name]
        assert left["step"] == right["step"]
        for role in ("master", "exp_avg", "exp_avg_sq"):
            assert same_bits(left[role].read(), right[role].read()), (name, role)
    assert a.progress == b.progress
    assert a.config.model == b.config.model

"""Products in float8: the same values as torch's own product of float8, and training close to bf16's."""

from __future__ import annotations

import pytest
import torch

from castalia.config.float8_matrices import float8_matrices, refuse_float8
from castalia.config.schema import LoraConfig, ModelConfig
from castalia.errors import ConfigError
from castalia.model.float8 import GRADIENTS, VALUES, float8_linear, quantized, scaled_product, set_float8
from castalia.model.init import initialize
from castalia.model.layers import Linear, linear
from castalia.model.transformer import Transformer

BASE = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "vocab_size": 256, "max_positions": 32}
FAMILIES = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.25},
    "llama": {"norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "num_kv_heads": 2, "mlp_size": 176},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtypes", [(VALUES, VALUES), (GRADIENTS, VALUES)], ids=["forward", "backward"])
def test_a_product_is_torchs(dtypes):
    (a, a_scale), (b, b_scale) = (
        quantized(torch.randn(size, 32).bfloat16() * size, dtype) for size, dtype in zip((16, 48), dtypes, strict=True)
    )
    theirs = torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)
    assert torch.equal(scaled_product(a, a_scale, b, b_scale, torch.bfloat16), theirs)


@pytest.mark.parametrize(("dtype", "digits"), [(VALUES, 3), (GRADIENTS, 2)])
def test_values_are_rounded_to_their_digits_whatever_is_largest(dtype, digits):
    x = torch.randn(1000).bfloat16()
    x = x[x.abs() > 0.01]
    values, scale = quantized(x, dtype)
    assert torch.log2(scale) == torch.log2(scale).round()
    rounded = values.float() * scale
    assert ((rounded / x.float() - 1).abs() <= 2.0 ** -(digits + 1)).all()
    beside, other = quantized(torch.cat((x, torch.tensor([50.0]).bfloat16())), dtype)
    assert other != scale and torch.equal(beside[:-1].float() * other, rounded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_the_product_nan(value):
    x, weight = torch.randn(4, 16).bfloat16(), torch.randn(16, 16)
    x[1, 2] = value
    assert float8_linear(x, weight)[1].isnan().all()


def test_zeros_and_no_tokens():
    weight = torch.randn(16, 16)
    assert torch.equal(float8_linear(torch.zeros(4, 16).bfloat16(), weight), torch.zeros(4, 16).bfloat16())
    module = Linear(16, 16)
    module.float8 = True
    assert module(torch.zeros(1, 0, 16).bfloat16()).shape == (1, 0, 16)


def test_all_three_products_are_those_of_the_rounded_operands():
    # 5 tokens, which is no multiple of 16
    x, weight, bias, dy = torch.randn(5, 32).bfloat16(), torch.randn(48, 32), torch.randn(48), torch.randn(5, 48)
    dy, leaves = dy.bfloat16(), [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = float8_linear(x, weight, bias)
    dx, d_weight, d_bias = torch.autograd.grad(y, leaves, dy)
    x8, w8, dy8 = (
        values.float() * scale
        for values, scale in (quantized(x, VALUES), quantized(weight.bfloat16(), VALUES), quantized(dy, GRADIENTS))
    )
    for found, exact in ((y, x8 @ w8.T + bias), (dx, dy8 @ w8), (d_weight, dy8.T @ x8), (d_bias, dy.float().sum(0))):
        assert (found.float() - exact).norm() < 0.005 * exact.norm()
    assert d_weight.dtype == torch.float32


def test_outside_of_training_it_computes_in_bf16():
    module = Linear(32, 16)
    torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
    x, module.float8 = torch.randn(3, 32).bfloat16(), True
    assert torch.equal(module.eval()(x), linear(x, module.weight, module.bias))
    assert torch.equal(module.train()(x), float8_linear(x, module.weight, module.bias))


def test_a_frozen_matrix_with_an_adapter_keeps_no_input():
    module = Linear(32, 16, bias=False)
    module.add_adapter(LoraConfig(rank=4))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.weight.requires_grad_(False)
    module.float8, x = True, torch.randn(6, 32).bfloat16().requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    assert not any(tensor.dtype == VALUES for tensor in saved)
    low = linear(linear(x, module.lora_a), module.lora_b) * module.lora_scale
    torch.testing.assert_close(y, float8_linear(x, module.weight) + low, rtol=0.02, atol=0.1)
    y.sum().backward()
    assert module.weight.grad is None and module.lora_a.grad is not None and x.grad is not None


def steps(cfg: ModelConfig, float8: bool, number: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of training on the same texts, and the gradients of the first step."""
    model = Transformer(cfg, compute_dtype=torch.bfloat16).train()
    initialize(model, cfg, seed=1)
    if float8:
        set_float8(model, float8_matrices(cfg, 1)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    texts, losses, first = torch.randint(0, 256, (4, 32), generator=draw), [], {}
    for _ in range(number):
        chosen = texts[torch.randint(0, 4, (4,), generator=draw)]
        total, count = model(chosen[:, :-1], chosen[:, 1:])
        (total / count).backward()
        losses.append((total / count).item())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_are_close_to_those_in_bf16(family):
    cfg = ModelConfig(**(BASE | FAMILIES[family]))
    (losses, gradients), (plain, exact) = steps(cfg, True, 50), steps(cfg, False, 50)
    apart = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
    assert losses != plain and plain[-1] < 1 < plain[0]
    assert max(apart) < 0.05 and sum(apart) / len(apart) < 0.015
    for name, gradient in gradients.items():
        assert (gradient - exact[name]).norm() < 0.15 * exact[name].norm(), name


def test_which_matrices_multiply_in_float8():
    model = ModelConfig(**BASE, experts={"count": 4, "every": 2})
    dense, mixture = model.layer_kinds.index("dense"), model.layer_kinds.index("moe")
    fitting, others = float8_matrices(model, 1)
    assert fitting[f"blocks.{mixture}.attn.qkv"] == (192, 64) and fitting[f"blocks.{dense}.mlp.down"] == (64, 256)
    assert not any(name.startswith(f"blocks.{mixture}.mlp") for name in fitting) and not others
    fitting, others = float8_matrices(ModelConfig(**BASE), 8)  # 8 columns of attn.out on each rank
    assert fitting["blocks.2.mlp.up"] == (32, 64)
    assert {name.split(".", 2)[2] for name in others} == {"attn.out", "attn.qkv"}
    assert float8_matrices(ModelConfig(**BASE, pattern=("mamba",)), 1) == ({}, [])


def test_a_gpu_without_float8_is_refused():
    refuse_float8("L4", (8, 9))
    with pytest.raises(ConfigError, match=r"capability 8.9 or newer .*A100-80 has 8.0; set precision.compute=bf16"):
        refuse_float8("A100-80", (8, 0))

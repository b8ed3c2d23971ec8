"""Mixtures of experts: the original's choices and logits, a plain loop as the judge, what a choice depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from castalia.checkpoint.formats.neox import read as neox_read
from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.generate.kv_cache import KVCache
from castalia.loading import build_model
from castalia.model.experts import ExpertMLP, balanced, grouped
from castalia.model.init import initialize, seeded_tensor
from castalia.model.transformer import Transformer
from castalia.parallel.activation_checkpointing import apply_activation_checkpointing

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "vocab_size": 64, "vocab_multiple": 1, "max_positions": 32}


def mixture(seed: int = 0, exact: bool = False, **choices: object) -> ExpertMLP:
    experts = ExpertsConfig(**{"count": 4, "top_k": 2, "width": 12, **choices})
    module = ExpertMLP(ModelConfig(**SIZES, activation="gelu", experts=experts), exact)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def naive(module: ExpertMLP, x: torch.Tensor) -> torch.Tensor:
    """One token and one expert at a time."""
    shares, chosen = module.router(x, module.router.weight)
    experts = module.experts
    rows = []
    for token, own, numbers in zip(x, shares, chosen, strict=True):
        parts = []
        for share, e in zip(own, numbers.tolist(), strict=True):
            inner = F.gelu(experts.up[e] @ token if experts.gate is None else experts.gate[e] @ token)
            inner = inner if experts.gate is None else inner * (experts.up[e] @ token)
            parts.append(share * (inner @ experts.down[e]))
        rows.append(torch.stack(parts).sum(0))
        if module.shared is not None:
            gate = 1 if module.shared_gate is None else (module.shared_gate.weight @ token).sigmoid()
            rows[-1] = rows[-1] + module.shared(token) * gate
    return torch.stack(rows)


@pytest.mark.parametrize("variant", ["moe-sinkhorn1-fp32", "moe-topk2-fp32"])
def test_the_originals_choices_and_logits_come_out(variant, fixtures):
    folder = fixtures / "neox-kinds" / variant
    expected = np.load(folder / "expected_logits.npz")
    model = build_model(neox_read.read(folder / "checkpoint" / "global_step5"))
    seen = []
    mlp = model.blocks["0"].mlp
    mlp.router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    tokens = torch.from_numpy(expected["input_ids"])
    for mode in ("eval", "train") if "logits_train" in expected else ("eval",):
        model.train(mode == "train")
        with torch.no_grad():
            logits = model(tokens)
        shares, chosen = seen.pop()
        shape = expected[f"experts_{mode}_2"].shape
        assert np.array_equal(chosen.view(shape).numpy(), expected[f"experts_{mode}_2"])
        np.testing.assert_allclose(shares.view(shape), expected[f"weights_{mode}_2"], atol=1e-6)
        name = "logits" if mode == "eval" else "logits_train"
        assert (logits - torch.from_numpy(expected[name])).abs().max() <= 2e-6


CHOICES = [
    *({}, {"gated": True}, {"top_k": 1}, {"router": "sinkhorn"}, {"count": 9}, {"norm_topk": True}),
    {"router": "balanced", "gated": True, "routed_scale": 1.5, "shared_width": 20},
    {"shared_width": 8, "shared_gate": True},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_values_and_gradients_are_those_of_a_plain_loop(choices):
    module, x = mixture(**choices), torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for compute in (module, lambda rows: naive(module, rows)):
        module.zero_grad()
        rows = x.clone().requires_grad_()
        out = compute(rows)
        out.square().mean().backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        results.append([out.detach(), rows.grad, *(p.grad.clone() for p in trained)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_with_a_bias_for_balancing_it_is_the_mixture_of_deepseek():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    shape = {"hidden_size": 16, "moe_intermediate_size": 12, "n_shared_experts": 2, "n_routed_experts": 8}
    theirs = DeepseekV3MoE(DeepseekV3Config(**shape, num_experts_per_tok=3, n_group=1, topk_group=1))
    ours = mixture(count=8, top_k=3, gated=True, router="balanced", routed_scale=2.5, shared_width=24)
    ours.experts.activation = ours.shared.activation = F.silu
    ours.router.balance.bias.data.mul_(0.2)
    gate_up = torch.cat([ours.experts.gate, ours.experts.up], dim=1)
    theirs.load_state_dict(
        {
            "gate.weight": ours.router.weight, "gate.e_score_correction_bias": ours.router.balance.bias,
            "experts.gate_up_proj": gate_up, "experts.down_proj": ours.experts.down.transpose(1, 2),
            **{f"shared_experts.{n}_proj.weight": getattr(ours.shared, n).weight for n in ("up", "gate", "down")},
        }
    )  # fmt: skip
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        chosen = ours.router(x[0], ours.router.weight)[1]
        ours.router.balance.bias.zero_()
        assert not torch.equal(chosen, ours.router(x[0], ours.router.weight)[1])


def test_with_a_gate_of_the_shared_expert_it_is_the_mixture_of_qwen2():
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    shape = {"hidden_size": 16, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 8}
    for norm in (False, True):
        theirs = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**shape, num_experts_per_tok=3, norm_topk_prob=norm))
        ours = mixture(count=8, top_k=3, gated=True, norm_topk=norm, shared_width=20, shared_gate=True)
        ours.experts.activation = ours.shared.activation = F.silu
        theirs.load_state_dict(
            {
                "gate.weight": ours.router.weight, "shared_expert_gate.weight": ours.shared_gate.weight,
                "experts.gate_up_proj": torch.cat([ours.experts.gate, ours.experts.up], dim=1),
                "experts.down_proj": ours.experts.down.transpose(1, 2),
                **{f"shared_expert.{n}_proj.weight": getattr(ours.shared, n).weight for n in ("up", "gate", "down")},
            }
        )  # fmt: skip
        x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 24), (5, 7)])
def test_groups_of_rows_are_multiplied_as_one_by_one(dtype, sizes):
    """Groups without rows among them; the second sizes have no kernel."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 0, 6, 1, 0])
    x = torch.randn(10, sizes[0], generator=generator).to(dtype).requires_grad_()
    matrices = torch.randn(6, sizes[1], sizes[0], generator=generator).to(dtype).requires_grad_()
    factor = torch.randn(10, sizes[1], generator=generator).to(dtype)
    alone = [rows @ matrix.T for rows, matrix in zip(x.split(counts.tolist()), matrices, strict=True)]
    results = []
    for out in (grouped(x, matrices.transpose(1, 2), counts), torch.cat(alone)):
        results.append([out, *torch.autograd.grad((out * factor).sum(), (x, matrices))])
        assert not results[-1][2][[1, 2, 5]].any() and results[-1][2][[0, 3, 4]].any()
    near = {"atol": 2e-2, "rtol": 1e-2} if dtype != torch.float32 else {}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **near)


def test_experts_without_tokens_get_zero_gradients():
    matrices = torch.randn(3, 4, 5, requires_grad=True)
    out = grouped(torch.randn(6, 4), matrices, torch.tensor([2, 0, 4]))
    out.square().sum().backward()
    assert out.shape == (6, 5) and not matrices.grad[1].any() and matrices.grad[2].any()


def test_sinkhorn_balances_experts_and_its_three_rules_differ_in_iterations():
    logits = 0.5 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1, 8)
    for stop in ("relative", "absolute", "inverted"):
        columns = balanced(logits, stop).sum(0)
        torch.testing.assert_close(columns, torch.full((8,), 1 / 8), rtol=1e-3, atol=0)
    one, three = balanced(logits, "absolute"), balanced(logits, "inverted")
    assert not torch.equal(one, three)
    torch.testing.assert_close(balanced(logits, "relative"), three, rtol=1e-3, atol=0)
    loads, before = (choice.argmax(1).bincount(minlength=8) for choice in (one, logits))
    assert loads.max() < 1.2 * 4096 / 8 and before.max() > 2 * 4096 / 8


@pytest.mark.parametrize("router", ["topk", "sinkhorn"])
def test_in_evaluation_a_token_changes_nothing_before_it(router):
    experts = ExpertsConfig(count=4, router=router)
    cfg = ModelConfig(**SIZES, experts=experts, init_std=0.5, output_init_method="normal")
    model = Transformer(cfg)
    initialize(model, cfg, seed=3)
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % 64
    with torch.no_grad():
        for training in (False, True):
            model.train(training)
            change = (model(tokens) - model(other)).abs().amax(-1)
            assert change[0, 8:].min() > 1e-4
            if not training or router == "topk":
                assert change[0, :8].max() < 1e-5 and change[1].max() < 1e-5


@pytest.mark.parametrize("router", ["topk", "sinkhorn"])
def test_activations_that_are_computed_again_give_the_same_gradients(router):
    cfg = ModelConfig(**SIZES, experts=ExpertsConfig(count=4, router=router))
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for mode in ("none", "selective", "full"):
        model = Transformer(cfg)
        initialize(model, cfg, seed=3)
        apply_activation_checkpointing(model, mode, dropout=False)
        model(tokens, labels=tokens)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


def test_written_token_by_token_logits_are_those_of_the_whole_text():
    cfg = ModelConfig(**SIZES, experts=ExpertsConfig(count=4, top_k=2, every=2), init_std=0.5)
    model = Transformer(cfg).eval()
    initialize(model, cfg, seed=3)
    tokens = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0))
    cache = KVCache(3, 10, torch.device("cpu"))
    with torch.inference_mode():
        parts = [model(part, cache=cache) for part in tokens.split([4] + [1] * 6, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=2e-5, rtol=1e-5)


def test_jitter_acts_in_training_alone():
    module, x = mixture(jitter=0.3), torch.randn(5, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_part_of_the_initial_experts_is_that_part_of_the_whole():
    cfg = ModelConfig(**SIZES, experts=ExpertsConfig(count=4, width=80))
    name, shape = "blocks.0.mlp.experts.down", (4, 80, 16)
    whole = seeded_tensor(cfg, 5, name, shape)
    part = seeded_tensor(cfg, 5, name, shape, (slice(1, 3), slice(60, 80), slice(4, 9)))
    assert torch.equal(part, whole[1:3, 60:80, 4:9]) and not torch.equal(whole[0], whole[1])

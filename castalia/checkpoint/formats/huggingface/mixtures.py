"""Mixtures of experts of Hugging Face's classes: their tensors, and what their classes cannot compute."""

from __future__ import annotations

from typing import Any

from castalia.checkpoint.rules import Chain, Interleave, Rule, Transpose, Unfold
from castalia.config.schema import ExpertsConfig, ModelConfig

# What Mixtral's class fixes: softmax over all experts, the shares of the chosen ones divided by their sum.
MIXTRAL = {"gated": True, "norm_topk": True}


def mixtral_rules(model: ModelConfig) -> list[Rule]:
    """Router and experts of a block; each matrix of an expert is a tensor of its own there, `w2` [h, f]."""
    assert model.experts is not None
    count, layer = model.experts.count, "layers.{i}.block_sparse_moe."
    stacked = (Interleave((model.expert_width,) * count), Unfold(count))  # [f, h] each -> [e f, h] -> [e, f, h]

    def each(name: str) -> str:
        return " ".join(f"{layer}experts.{number}.{name}.weight" for number in range(count))

    return [
        Rule("blocks.{i}.mlp.router.weight", layer + "gate.weight"),
        Rule("blocks.{i}.mlp.experts.gate", each("w1"), Chain(*stacked)),
        Rule("blocks.{i}.mlp.experts.up", each("w3"), Chain(*stacked)),
        Rule("blocks.{i}.mlp.experts.down", each("w2"), Chain(Transpose(), *stacked)),
    ]


def lacking_of_mixtral(experts: ExpertsConfig | None) -> list[str]:
    """The settings of a mixture that Mixtral's class cannot compute, each with the value that it can."""
    if experts is None:
        return ["models without model.experts"]
    needed: dict[str, Any] = {"gated": True, "router": "topk", "shared_width": None, "routed_scale": 1.0}
    needed |= {"first": 0, "every": 1, "jitter": 0.0}
    values = {name: getattr(experts, name) for name in needed} | {"norm_topk": experts.divides_shares}
    wrong = {name: value for name, value in (needed | {"norm_topk": True}).items() if values[name] != value}
    return [f"model.experts.{name}={values[name]} (only {value})" for name, value in wrong.items()]


def written_mixtral(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json for the experts of a block."""
    assert model.experts is not None
    return {
        "num_local_experts": model.experts.count,
        "num_experts_per_tok": model.experts.top_k,
        "intermediate_size": model.expert_width,
        "router_jitter_noise": 0.0,
    }

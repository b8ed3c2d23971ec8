"""Logits equal Hugging Face's model classes on tiny random models, and the original's own logits on its checkpoints."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from castalia.config.schema import ModelConfig, RopeScaling
from castalia.model.transformer import Transformer

SHAPE = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "mlp_size": 80, "vocab_size": 96, "vocab_multiple": 1}
HF_SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 96, "intermediate_size": 80,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
BLOCK_NAMES = {
    "neox": {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.qkv": "attention.query_key_value",
             "attn.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"},
    "gpt2": {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj",
             "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    "llama": {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.out": "self_attn.o_proj",
              "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj"},
}  # fmt: skip
OUTER_NAMES = {
    "neox": {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
    "gpt2": {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"},
    "llama": {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}
LAYERS = {"neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers"}


def theirs(family: str, name: str, state: dict[str, Tensor], cfg: ModelConfig) -> Tensor:
    """The value of our parameter `name` in their state dict."""
    module, _, kind = name.rpartition(".")
    if not name.startswith("blocks."):
        return state[f"{OUTER_NAMES[family][module]}.{kind}"]
    _, layer, part = module.split(".", 2)
    prefix = f"{LAYERS[family]}.{layer}"
    n, kv, d = cfg.num_heads, cfg.kv_heads, cfg.head_size
    if part == "attn.qkv" and family == "llama":
        parts = [state[f"{prefix}.self_attn.{x}_proj.{kind}"].unflatten(0, (kv, -1)) for x in "qkv"]
        return torch.cat(parts, dim=1).flatten(0, 1)
    value = state[f"{prefix}.{BLOCK_NAMES[family][part]}.{kind}"]
    if family == "gpt2" and kind == "weight" and value.ndim == 2:
        value = value.T
    if part == "attn.qkv" and family == "gpt2":
        value = value.unflatten(0, (3, n, d)).transpose(0, 1).flatten(0, 2)
    return value


def copy_of(reference: PreTrainedModel, family: str, cfg: ModelConfig) -> Transformer:
    model = Transformer(cfg)
    state = {name.replace("embed_out", "lm_head"): value for name, value in reference.state_dict().items()}
    model.load_state_dict({name: theirs(family, name, state, cfg) for name in model.state_dict()})
    return model.eval()


def randomized(reference: PreTrainedModel) -> PreTrainedModel:
    """Norms and biases too, so that a misplaced one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in reference.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return reference.eval()


@torch.no_grad()
def assert_same_logits(reference: PreTrainedModel, family: str, cfg: ModelConfig) -> None:
    model = copy_of(randomized(reference), family, cfg)
    tokens = torch.randint(cfg.vocab_size, (2, 48), generator=torch.Generator().manual_seed(2))
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("rotary_pct", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": True}, {"attention_bias": False}])
def test_gpt_neox(parallel, rotary_pct, activation, variant):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": rotary_pct}
    reference = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **HF_SHAPE, use_parallel_residual=parallel, hidden_act=activation, rope_parameters=rope, **variant
        )
    )
    cfg = ModelConfig(
        **SHAPE,
        parallel_residual=parallel,
        rotary_pct=rotary_pct,
        rotary_base=500.0,
        activation={"gelu": "gelu", "gelu_new": "gelu_tanh"}[activation],
        tie_embeddings=variant.get("tie_word_embeddings", False),
        attention_bias=variant.get("attention_bias", True),
    )
    assert_same_logits(reference, "neox", cfg)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_gpt2(activation):
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_inner": 80, "n_positions": 64, "vocab_size": 96}
    reference = GPT2LMHeadModel(GPT2Config(**shape, activation_function=activation))
    ours = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}[activation]
    cfg = ModelConfig(**SHAPE, max_positions=64, position="learned", tie_embeddings=True, activation=ours)
    assert_same_logits(reference, "gpt2", cfg)


ROPE_SCALINGS = {
    "none": (None, {"rope_type": "default"}),
    "linear": (RopeScaling(kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScaling(kind="llama3", factor=8.0, original_positions=32, high_freq_factor=3.0),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
         "high_freq_factor": 3.0},
    ),
    "yarn": (
        RopeScaling(kind="yarn", factor=4.0, original_positions=16, beta_fast=8.0),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
    ),
    "yarn with its own attention factor": (
        RopeScaling(kind="yarn", factor=4.0, original_positions=16, attention_factor=0.8),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_llama(kv_heads, variant, scaling):
    torch.manual_seed(0)
    ours, rope = ROPE_SCALINGS[scaling]
    rope = {"rope_theta": 1000.0, **rope}
    reference = LlamaForCausalLM(
        LlamaConfig(**HF_SHAPE, num_key_value_heads=kv_heads, rms_norm_eps=1e-6, rope_parameters=rope, **variant)
    )
    cfg = ModelConfig(
        **SHAPE,
        num_kv_heads=kv_heads,
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="silu",
        gated_mlp=True,
        rotary_base=1000.0,
        rope_scaling=ours,
        tie_embeddings=variant.get("tie_word_embeddings", False),
        attention_bias=variant.get("attention_bias", False),
        mlp_bias=variant.get("mlp_bias", False),
    )
    assert_same_logits(reference, "llama", cfg)


TOLERANCES = {
    "pp1-mp1-z0-fp32-rotary-par": (torch.float32, 5e-6),
    "pp1-mp2-z0-fp32-rotary-par": (torch.float32, 5e-6),
    "pp2-mp1-z0-fp32-rotary-seqres": (torch.float32, 5e-6),
    "pp1-mp1-z0-fp32-llama": (torch.float32, 5e-6),
    "pp1-mp1-dp2-z1-fp16-rotary-par": (torch.float16, 5e-3),
    "pp1-mp1-dp3-z1-bf16-rotary-par": (torch.bfloat16, 4e-2),
}


@pytest.mark.parametrize("name", TOLERANCES)
@torch.no_grad()
def test_logits_of_the_original(fixtures, name):
    """The original's forward pass in its training precision, from its own weights as it exported them."""
    dtype, tolerance = TOLERANCES[name]
    folder = fixtures / "neox" / name
    config = json.loads((folder / "hf" / "config.json").read_text())
    family = {"gpt_neox": "neox", "llama": "llama"}[config["model_type"]]
    cfg = model_config(config)
    state = load_file(folder / "hf" / "model.safetensors")
    state = {key.replace("embed_out", "lm_head"): value.float() for key, value in state.items()}
    model = Transformer(cfg, compute_dtype=dtype)
    model.load_state_dict({key: theirs(family, key, state, cfg) for key in model.state_dict()})
    expected = np.load(folder / "expected_logits.npz")
    logits = model.eval()(torch.from_numpy(expected["input_ids"])).float()
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=tolerance, rtol=0)


def model_config(config: dict) -> ModelConfig:
    neox = config["model_type"] == "gpt_neox"
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads"),
        mlp_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        vocab_multiple=1,
        rotary_pct=config.get("rotary_pct", 1.0),
        norm="layernorm" if neox else "rmsnorm",
        norm_eps=config["layer_norm_eps" if neox else "rms_norm_eps"],
        activation=config["hidden_act"],
        gated_mlp=not neox,
        parallel_residual=config.get("use_parallel_residual", False),
        attention_bias=neox,
        mlp_bias=neox,
    )

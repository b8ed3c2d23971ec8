"""`finetune.lora` as people who come from PEFT write it."""

from __future__ import annotations

import json

import pytest

from castalia.config.load import load_config
from castalia.config.lora_names import MODULES, OTHER_KEYS
from castalia.errors import ConfigError


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        ("all-linear", ()),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ("attn.qkv", "attn.out")),
        (["query_key_value", "dense", "dense_h_to_4h"], ("attn.qkv", "attn.out", "mlp.up")),
        ("c_proj", ("attn.out", "mlp.down")),
        (["h.3.mlp.c_proj", "attn.qkv", "embed_out"], ("mlp.down", "attn.qkv", "head")),
        (["gate_up_proj"], ("mlp.gate", "mlp.up")),
    ],
)
def test_names_of_transformers_are_our_matrices(names, ours):
    config = load_config([{"finetune": {"lora": {"targets": names}}}])
    assert config.finetune.lora.targets == ours and not config.notes
    assert load_config([], [f"finetune.lora.targets={json.dumps(names)}"]).finetune.lora == config.finetune.lora


def test_every_name_leads_to_a_matrix_of_ours():
    targets = sorted({target for matrices in MODULES.values() for target in matrices})
    load_config([{"finetune": {"lora": {"targets": targets}}}])
    mamba = ["mamba.dt_proj", "mamba.in_x", "mamba.in_z", "mamba.out", "mamba.x_proj"]
    assert targets == ["attn.out", "attn.qkv", "head", *mamba, "mlp.down", "mlp.gate", "mlp.up"]


def test_a_part_of_one_matrix_is_told():
    (note,) = load_config([{"finetune": {"lora": {"targets": ["q_proj", "v_proj"]}}}]).notes
    assert "q_proj and v_proj lie in one matrix here, attn.qkv" in note and "it changes k_proj as well" in note


def test_other_names_are_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match="'wte': is none of 'attn.qkv'.*such as q_proj"):
        load_config([{"finetune": {"lora": {"targets": ["wte"]}}}])


@pytest.mark.parametrize("key", [*OTHER_KEYS, "bnb_4bit_quant_type"])
def test_keys_of_other_programs_are_named(key):
    with pytest.raises(ConfigError) as error:
        load_config([], [f"finetune.lora.{key}=true"])
    assert f"unknown key finetune.lora.{key}: " in str(error.value) and "did you mean" not in str(error.value)


def test_keys_without_a_section():
    with pytest.raises(ConfigError, match=r"QLoRA\) are not built in: the kernels"):
        load_config([], ["load_in_4bit=true"])
    with pytest.raises(ConfigError, match="unknown key bias;"):
        load_config([], ["bias=all"])


def test_rslora_scales_by_the_root_of_the_rank():
    lora = load_config([{"finetune": {"lora": {"rank": 64, "alpha": 16, "rslora": True}}}]).finetune.lora
    assert lora.scale == 2.0 and lora.with_({"rslora": False}).scale == 0.25

"""Exact counts: the published tables, the presets, and the model itself."""

from __future__ import annotations

import math

import pytest

from castalia.config.load import load_config, preset_names
from castalia.config.schema import ModelConfig
from castalia.plan.count import count, neox_count
from castalia.plan.flops import block_flops, kv_cache_bytes, neox_flops, state_bytes
from castalia.plan.memory import checkpoint_bytes

# name: (layers, hidden, heads, kv heads, inner width, vocabulary, its multiple) -> (layer, non-embedding, total)
NEOX = {
    "1-3B": ((24, 2048, 16, None, None, 50257, 128), (50358272, 1208602624, 1414647808)),
    "125M": ((12, 768, 12, None, None, 50257, 128), (7087872, 85056000, 162322944)),
    "13B": ((40, 5120, 40, None, None, 50257, 128), (314639360, 12585584640, 13100697600)),
    "175B": ((96, 12288, 96, None, None, 50257, 128), (1812099072, 173961535488, 175197806592)),
    "19M": ((6, 512, 8, None, None, 50257, 128), (3152384, 18915328, 70426624)),
    "2-7B": ((32, 2560, 32, None, None, 50257, 128), (78676480, 2517652480, 2775208960)),
    "20B": ((44, 6144, 64, None, None, 50277, 256), (453064704, 19934859264, 20554567680)),
    "350M": ((24, 1024, 16, None, None, 50257, 128), (12596224, 302311424, 405334016)),
    "49M": ((10, 640, 10, None, None, 50257, 128), (4923520, 49236480, 113625600)),
    "6-7B": ((32, 4096, 32, None, None, 50257, 128), (201379840, 6444163072, 6856253440)),
    "760M": ((24, 1536, 16, None, None, 50257, 128), (28331520, 679959552, 834493440)),
    "800M": ((16, 2048, 8, None, None, 50257, 128), (50358272, 805736448, 1011781632)),
    "finetuning 6-9B": ((32, 4096, 32, None, None, 50277, 256), (201379840, 6444163072, 6857302016)),
    "pythia 1-4B": ((24, 2048, 16, None, None, 50277, 128), (50358272, 1208602624, 1414647808)),
    "pythia 12B": ((36, 5120, 40, None, None, 50277, 512), (314639360, 11327027200, 11846072320)),
    "pythia 14M": ((6, 128, 4, None, None, 50277, 128), (198272, 1189888, 14067712)),
    "pythia 160M": ((12, 768, 12, None, None, 50277, 128), (7087872, 85056000, 162322944)),
    "pythia 1B": ((16, 2048, 8, None, None, 50277, 128), (50358272, 805736448, 1011781632)),
    "pythia 2-8B": ((32, 2560, 32, None, None, 50277, 128), (78676480, 2517652480, 2775208960)),
    "pythia 31M": ((6, 256, 8, None, None, 50277, 128), (789760, 4739072, 30494720)),
    "pythia 410M": ((24, 1024, 16, None, None, 50277, 128), (12596224, 302311424, 405334016)),
    "pythia 6-9B": ((32, 4096, 32, None, None, 50277, 256), (201379840, 6444163072, 6857302016)),
    "pythia 70M": ((6, 512, 8, None, None, 50277, 128), (3152384, 18915328, 70426624)),
}
LLAMA = {
    "llama 13B": ((40, 5120, 40, None, 13824, 32000, 1), (317204480, 12688184320, 13015864320)),
    "llama 30B": ((60, 6656, 52, None, 17920, 32000, 1), (535049216, 32102959616, 32528943616)),
    "llama 65B": ((80, 8192, 64, None, 22016, 32000, 1), (809517056, 64761372672, 65285660672)),
    "llama 7B": ((32, 4096, 32, None, 11008, 32000, 1), (202383360, 6476271616, 6738415616)),
}
LLAMA_WITH_MLP_BIAS = {  # as the original's files describe them
    "llama2 13B": ((40, 5120, 40, None, 13824, 32000, 1), (317237248, 12689495040, 13017175040)),
    "llama2 70B": ((80, 8192, 64, 8, 28672, 32000, 1), (855719936, 68457603072, 68981891072)),
    "llama2 7B": ((32, 4096, 32, None, 11008, 32000, 1), (202409472, 6477107200, 6739251200)),
    "codellama 34B": ((48, 8192, 64, 8, 11008, 32000, 1), (421574144, 20235567104, 20759855104)),
    "codellama 7B": ((32, 4096, 32, None, 5632, 32016, 1), (136338432, 4362833920, 4625108992)),
}
SWIGLU = {"norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "attention_bias": False}
ROWS = (
    [(name, row, {}) for name, row in NEOX.items()]
    + [(name, row, SWIGLU | {"mlp_bias": False}) for name, row in LLAMA.items()]
    + [(name, row, SWIGLU) for name, row in LLAMA_WITH_MLP_BIAS.items()]
)


def model_of(shape: tuple, **choices: object) -> ModelConfig:
    layers, hidden, heads, kv_heads, width, vocab, multiple = shape
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_size=width,
        vocab_size=vocab,
        vocab_multiple=multiple,
        **choices,
    )


@pytest.mark.parametrize(("shape", "expected", "choices"), [(*row, c) for _, row, c in ROWS], ids=[r[0] for r in ROWS])
def test_table_of_named_configurations(shape, expected, choices) -> None:
    counted = count(model_of(shape, **choices))
    layer = sum(size for kind, size in counted.by_kind.items() if kind.startswith("blocks.")) // shape[0]
    assert (layer, counted.non_embedding, counted.total) == expected


def test_mistral_as_the_original_describes_it_is_one_column_short() -> None:
    """Its file gives gate and up 4779 columns and down 4778, so the original cannot run it; ours has equal widths."""
    ours = model_of((32, 4096, 32, 8, 4779, 32000, 1), **SWIGLU)
    assert count(ours).total - 3_484_072_640 == 32 * 4096


@pytest.mark.parametrize(
    ("preset", "total", "non_embedding"),
    [
        ("gpt2-small", 124439808, 85056000),
        ("gpt2-medium", 354823168, 302311424),
        ("gpt2-large", 774030080, 708390400),
        ("gpt2-xl", 1557611200, 1475561600),
        ("shallow-24x2048", 1315723264, 1208602624),
        ("deep-48x1600", 1559249600, 1475561600),
        ("llama-2-7b", 6738415616, 6476271616),
        ("gpt-neox-20b", 20554567680, 19934859264),
        ("pythia-14m", 14067712, 1189888),
        ("pythia-12b", 11846072320, 11327027200),
        ("neox-175b", 175197806592, 173961535488),
    ],
)
def test_presets_have_their_published_sizes(preset, total, non_embedding) -> None:
    counted = count(load_config(preset).model)
    assert (counted.total, counted.non_embedding) == (total, non_embedding)


DMOE = {
    "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 2048, "pos_emb": "rotary",
    "no_weight_tying": True, "moe_num_experts": 8, "moe_top_k": 1, "max_position_embeddings": 2048,
}  # fmt: skip


def test_of_a_mixture_of_experts_some_parameters_compute_a_token() -> None:
    """GPT-NeoX's 125M-dmoe; its layer has 7,090,176 active parameters of 40,120,320."""
    counted = count(load_config([DMOE], ["model.vocab_size=50257"]).model)
    assert (counted.total, counted.active) == (558_712_320, 162_350_592)
    layer = sum(size for kind, size in counted.by_kind.items() if kind.startswith("blocks.")) // 12
    assert (layer, counted.non_embedding) == (40_120_320, 12 * 40_120_320 + 2 * 768)


def test_a_shared_expert_computes_every_token() -> None:
    experts = {"count": 8, "top_k": 2, "width": 24, "gated": True, "first": 1, "router": "balanced", "shared_width": 48}
    shape = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "vocab_size": 128}
    counted = count(ModelConfig(**shape, experts=experts))
    assert counted.total - counted.active == 2 * 6 * 3 * 24 * 32  # of two blocks, six experts of three matrices
    assert counted.by_kind["blocks.*.mlp.shared.gate.weight"] == 2 * 48 * 32


@pytest.mark.parametrize(
    ("kind", "layer", "total"), [("gmlp", 11_288_832, 212_734_464), ("amlp", 12_668_352, 229_288_704)]
)
def test_gated_layers_have_the_sizes_of_the_originals_config(kind, layer, total) -> None:
    """GPT-NeoX's gmlp_small, and the same with aMLP."""
    keys = {key: value for key, value in DMOE.items() if not key.startswith("moe_")} | {"pos_emb": "none"}
    counted = count(load_config([keys | {"attention_config": [[[kind], "all"]]}], ["model.vocab_size=50257"]).model)
    blocks = sum(size for name, size in counted.by_kind.items() if name.startswith("blocks."))
    assert (blocks, counted.total) == (12 * layer, total)


@pytest.mark.parametrize(
    ("layers", "hidden", "layer", "total"),
    [(24, 768, 3_771_648, 130_726_656), (64, 2560, 41_244_160, 2_773_649_920)],
)
def test_mamba_has_the_sizes_of_the_originals_configs(layers, hidden, layer, total) -> None:
    """GPT-NeoX's mamba-130M and mamba-2.8B, which have learned positions for lack of a key."""
    keys = {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": 12, "seq_length": 2048, "norm": "rmsnorm",
        "max_position_embeddings": 2048, "attention_config": [[["mamba"], layers]], "mamba_inner_func_fusion": True,
    }  # fmt: skip
    model = load_config([keys], ["model.vocab_size=50257"]).model
    blocks = sum(size for name, size in count(model).by_kind.items() if name.startswith("blocks."))
    assert (blocks, count(model).total) == (layers * layer, total)
    r, d, h = model.mamba_rank, model.mamba_width, hidden
    reference = 2 * (3 * d * h + d * (r + 32) + d * r) + 8 * d + 7 * 16 * d
    assert block_flops(model, 2048, "mamba") == pytest.approx(reference, rel=0.01)
    if layers == 24:
        assert neox_flops(model, 2048) == pytest.approx(7.831e8, rel=1e-4)
    assert (kv_cache_bytes(model), state_bytes(model)) == (0, layers * d * (3 * 2 + 16 * 4))


def test_rwkv_has_the_sizes_of_the_originals_config() -> None:
    """GPT-NeoX's rwkv/170M, which does not start there for lack of `dim_att`."""
    keys = {
        "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 2048, "norm": "rmsnorm",
        "max_position_embeddings": 2048, "attention_config": [[["rwkv"], 12]], "no_weight_tying": True,
    }  # fmt: skip
    model = load_config([keys], ["model.vocab_size=50257"]).model
    blocks = sum(size for name, size in count(model).by_kind.items() if name.startswith("blocks."))
    assert (blocks, count(model).total) == (12 * 8_024_064, 175_129_344)
    h, wide = 768, model.rwkv_width
    assert wide == 2688
    reference = 2 * (6 * h * h + 2 * h * wide + 448 * h) + 7 * h * 64
    assert block_flops(model, 2048, "rwkv") == pytest.approx(reference, rel=0.01)
    assert neox_flops(model, 2048) == pytest.approx(1.027e9, rel=1e-3)
    assert (kv_cache_bytes(model), state_bytes(model)) == (0, 12 * (2 * h * 2 + 12 * 64 * 64 * 4))


def test_fixture_configs_have_the_sizes_of_the_table(fixtures) -> None:
    totals = {"125M": 162322944, "350M": 405334016, "1-3B": 1414647808}
    for name, total in totals.items():
        config = load_config(fixtures / "configs" / f"{name}.yml", ["model.vocab_size=50257"])
        assert count(config.model).total == total, name
    totals = {"20B": 20554567680, "pythia_14M": 14067712, "pythia_70M": 70426624, "pythia_1-4B": 1414647808}
    totals |= {"pythia_12B": 11846072320, "finetuning_configs_6-9B": 6857302016}
    for name, total in totals.items():
        config = load_config(fixtures / "configs" / f"{name}.yml", ["model.vocab_size=50277"])
        assert count(config.model).total == total, name
    llama = load_config(fixtures / "configs" / "llama2_7B.yml", ["model.vocab_size=32000"])
    assert count(llama.model).total == 6739251200


@pytest.mark.parametrize(
    ("preset", "printed"),
    [
        ("gpt-neox-20b", 20556201984),
        ("pythia-6.9b", 6858096640),
        ("pythia-12b", 11849420800),
        ("pythia-1b", 1011781632),
    ],
)
def test_the_sum_over_ranks_that_the_original_prints(preset, printed) -> None:
    config = load_config(preset)
    assert neox_count(config.model, config.parallel.tp, config.parallel.pp) == printed


def test_the_20b_slim_weights_are_38_29_gib() -> None:
    config = load_config("gpt-neox-20b")
    original = neox_count(config.model, 2, 4)
    slim = checkpoint_bytes(count(config.model).total, 0, original, fp32=False)["neox_slim"]
    assert slim == 41_112_403_968
    assert round(slim / 2**30, 2) == 38.29


def test_a_folder_of_2_gb_is_a_whole_12_x_768_checkpoint_and_no_20b() -> None:
    config = load_config("neox-125m", ["model.vocab_multiple=256"])
    original = neox_count(config.model, tp=2, pp=4)
    assert original == 162_519_552 + 56_832
    kib = checkpoint_bytes(count(config.model).total, 0, original, fp32=False)["neox_full"] / 1024
    assert math.ceil(kib) == 2_222_724
    assert abs(kib / 2_223_080 - 1) < 1e-3


def test_ratios_of_the_deep_and_the_shallow_model() -> None:
    ratios = {name: load_config(name).model for name in ("deep-48x1600", "shallow-24x2048")}
    assert [round(m.hidden_size / m.num_layers) for m in ratios.values()] == [33, 85]


def test_unused_norms_and_tied_copies_count_in_the_original() -> None:
    base = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "vocab_size": 16, "vocab_multiple": 1}
    shared = ModelConfig(**base, parallel_residual=True, shared_norm=True)
    assert neox_count(shared) - count(shared).total == 2 * 2 * 8
    tied = ModelConfig(**base, position="learned", max_positions=4, tie_embeddings=True)
    assert neox_count(tied, pp=2) - count(tied).total == (16 + 4) * 8


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_counts_like_the_model_on_the_meta_device(preset) -> None:
    import torch

    from castalia.model.transformer import Transformer

    model = load_config(preset).model
    few = model.model_copy(update={"num_layers": 2})  # building 96 layers of modules takes a second
    with torch.device("meta"):
        parameters = dict(Transformer(few).named_parameters())
    blocks = sum(p.numel() for name, p in parameters.items() if name.startswith("blocks."))
    outside = sum(p.numel() for name, p in parameters.items() if not name.startswith("blocks."))
    assert count(model).total == blocks // 2 * model.num_layers + outside

"""NeoX's configs mean here what they were meant to mean there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from castalia.config.batch import batch_plan
from castalia.config.load import dump_config, load_config
from castalia.config.neox.write import to_neox, trainable
from castalia.config.schema import MuPConfig, ProfileConfig, RunConfig, WandbConfig
from castalia.errors import ConfigError

CONFIGS = [
    "1-3B",
    "125M",
    "20B",
    "350M",
    "cpu_mock_config",
    "finetuning_configs_6-9B",
    "llama2_7B",
    "local_setup",
    "pythia_1-4B",
    "pythia_12B",
    "pythia_14M",
    "pythia_70M",
    "slurm_125M",
    "text_generation",
]
MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
FORMER = {"moe_loss_coeff": 0.2, "moe_type": "megablocks", "expert_interval": 2, "mlp_type": "regular"}
ADAM = {"type": "Adam", "params": {"lr": 0.001}}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads mappings as if each were a file `0.yml`, `1.yml`, ... followed by overrides."""
    monkeypatch.chdir(tmp_path)

    def load(*files: dict[str, object], overrides: tuple[str, ...] = ()) -> RunConfig:
        for number, values in enumerate(files):
            Path(f"{number}.yml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_config([f"{number}.yml" for number in range(len(files))], overrides)

    return load


def refusal(load, *files, overrides=()) -> str:
    with pytest.raises(ConfigError) as error:
        load(*files, overrides=overrides)
    return str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_public_config_is_accepted_and_survives_dumping(fixtures, tmp_path, name):
    config = load_config(fixtures / "configs" / f"{name}.yml")
    (tmp_path / "dump.yml").write_text(dump_config(config))
    assert load_config(tmp_path / "dump.yml") == config


def test_no_public_config_is_left_out(fixtures):
    assert sorted(path.stem for path in (fixtures / "configs").iterdir()) == sorted(CONFIGS)


def test_every_checkpoints_config_is_accepted(fixtures):
    files = sorted(fixtures.glob("neox/*/checkpoint/global_step5/configs/config.yml"))
    assert files
    for file in files:
        config = load_config(file)
        assert config.model.num_layers == 2
        assert config.train.steps == 10


def test_the_20b_config(fixtures):
    config = load_config(fixtures / "configs" / "20B.yml")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.mlp_width) == (44, 6144, 64, 24576)
    assert (model.parallel_residual, model.shared_norm, model.tie_embeddings) == (True, False, False)
    assert (model.activation, model.rotary_size, model.vocab_multiple) == ("gelu_tanh", 24, 256)
    assert (config.parallel.tp, config.parallel.pp, config.parallel.zero) == (2, 4, 1)
    assert batch_plan(config, dp=12) == (1536, 4, 32)
    assert (config.precision.compute, config.precision.loss_scale.initial) == ("fp16", 4096.0)
    assert config.checkpoint.resume == config.checkpoint.dir == "./20B_checkpoints"
    assert config.checkpoint.starts_if_empty
    assert config.origins["optimizer.lr"].endswith("20B.yml:44")


def test_the_llama_config(fixtures):
    model = load_config(fixtures / "configs" / "llama2_7B.yml").model
    assert (model.norm, model.norm_eps, model.activation, model.gated_mlp) == ("rmsnorm", 1e-5, "silu", True)
    assert (model.mlp_width, model.attention_bias, model.mlp_bias) == (11008, False, True)


def test_overlays_do_not_reset_what_earlier_files_set(fixtures):
    folder = fixtures / "configs"
    base, both = load_config(folder / "125M.yml"), load_config([folder / "125M.yml", folder / "local_setup.yml"])
    assert both.model == base.model
    assert both.optimizer == base.optimizer
    assert both.data.path == "data/enwik8/enwik8_text_document"
    text = load_config([folder / "125M.yml", folder / "text_generation.yml"])
    assert text.generate.max_tokens == 102
    assert text.train == base.train


def test_what_a_file_leaves_out_means_what_it_means_in_neox(load):
    config = load({**MODEL, "optimizer": ADAM, "train_iters": 10})
    model = config.model
    assert (model.position, model.activation, model.tie_embeddings, model.init_passes) == ("learned", "gelu", True, 2)
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.999), 0.1)
    assert (config.schedule.style, config.schedule.warmup, config.schedule.min_lr) == ("linear", 0.01, 0.0)
    assert (config.precision.compute, config.log.every, config.eval.batches) == ("fp32", 100, 100)
    assert config.origins["optimizer.betas"] == "NeoX default"


def test_neox_defaults_do_not_touch_what_our_own_file_describes(load):
    ours = {"model": {"num_layers": 4, "hidden_size": 64, "num_heads": 4}, "optimizer": {"lr": 0.5}}
    config = load(ours, {"data_path": "corpus"}, overrides=("train_iters=5",))
    assert config == load(ours, {"data": {"path": "corpus"}, "train": {"steps": 5}})


def test_ours_and_neox_mix_and_the_later_wins(load):
    neox, ours = {**MODEL, "optimizer": ADAM, "train_iters": 10}, {"optimizer": {"lr": 0.5}, "train": {"steps": 20}}
    assert (load(neox, ours).optimizer.lr, load(neox, ours).train.steps) == (0.5, 20)
    assert (load(ours, neox).optimizer.lr, load(ours, neox).train.steps) == (0.001, 10)
    config = load(neox, overrides=("optimizer.lr=0.1", "optimizer.params.eps=1e-6", "train-iters=30"))
    assert (config.optimizer.lr, config.optimizer.eps, config.train.steps) == (0.1, 1e-6, 30)


def test_blocks_of_several_files_are_merged(load):
    first = {"optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95]}}}
    config = load(first, {"optimizer": {"type": "Adam", "params": {"lr": 0.002}}})
    assert (config.optimizer.lr, config.optimizer.betas) == (0.002, (0.9, 0.95))
    assert config.origins["optimizer.lr"] == "1.yml:4, replacing 0.yml:4"


def test_stale_keys_and_bare_exponents_are_accepted_with_a_note(load, tmp_path):
    (tmp_path / "stale.yml").write_text('{"gas": 1, "optimizer": {"type": "Adam", "params": {"lr": 6e-4}},}')
    config = load_config(tmp_path / "stale.yml")
    assert config.optimizer.lr == 6e-4
    assert any("gas: 1 has no effect here: a leftover" in note for note in config.notes)
    assert any("6e-4 is read as the number 0.0006" in note for note in config.notes)


def test_of_its_keys_given_twice_the_last_one_counts_with_a_note(tmp_path):
    """As in GPT-NeoX's rwkv/170M.yml."""
    path = tmp_path / "twice.yml"
    path.write_text('{"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2,\n"num_layers": 3}')
    config = load_config(path)
    assert config.model.num_layers == 3
    said = "twice.yml:2: num_layers is already given on line 1: as in GPT-NeoX the last one counts"
    assert any(said in note for note in config.notes)


def test_former_keys_are_known_with_what_they_became(load):
    config = load(MODEL | {"save-interval": 7, "train_data_paths": ["text"], "label_data_paths": ["labels"], **FORMER})
    assert config.checkpoint.every == 7 and config.data.train[0].labels == "labels"
    notes = "\n".join(config.notes)
    assert "save-interval is called checkpoint_factor today" in notes
    assert "moe_loss_coeff: 0.2 has no effect here: GPT-NeoX gave up DeepSpeed's experts" in notes
    assert not any(f": {key}" in notes for key in ("moe_type", "expert_interval", "mlp_type"))  # all at their defaults
    with pytest.raises(ConfigError, match="mlp_type: 'llama' is refused: `llama` became activation: swiglu"):
        load(MODEL | {"mlp_type": "llama"})
    with pytest.raises(ConfigError, match="checkpoint_factor is already given at 0.yml:4"):
        load(MODEL | {"save_interval": 7, "checkpoint_factor": 8})
    with pytest.raises(ConfigError, match=r"0.yml:4 \(label_data_paths\): train_label_data_paths belongs to"):
        load(MODEL | {"label_data_paths": ["labels"]})


def test_clipping_at_the_default_clips_and_says_so(load):
    config = load({"gradient_clipping": 1.0})
    assert config.optimizer.clip_norm == 1.0
    assert "clips here: GPT-NeoX leaves clipping off" in config.notes[0]
    assert "is left off, as in GPT-NeoX" in load({"gradient_clipping": 1.0, "neox_exact": True}).notes[0]
    assert load({"gradient_clipping": 0}).optimizer.clip_norm is None
    assert load({"clip_grad": 0.5}).optimizer.clip_norm == 0.5


def test_loading_is_explicit(load):
    assert load({"load": "a"}).checkpoint.resume == "a"
    assert load({"load": "a", "finetune": True}).checkpoint.init_from == "a"
    assert load({"load": "a", "finetune": True}).checkpoint.resume is None
    assert load({"load": "a", "save": "a"}).checkpoint.starts_if_empty
    assert not load({"load": "a", "save": "b"}).checkpoint.starts_if_empty
    assert "finetune: True has nothing to start from" in refusal(load, {"finetune": True})
    assert load({"finetune": True}, overrides=("checkpoint.init_from=a",)).checkpoint.init_from == "a"


@pytest.mark.parametrize(
    ("keys", "compute"),
    [
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"type": "bfloat16", "enabled": True}}, "bf16"),
        ({"precision": "bfloat16"}, "bf16"),
        ({"precision": "fp16", "fp16": {"enabled": True}}, "fp16"),
        ({"precision": "fp32"}, "fp32"),
        ({"data_path": "x"}, "auto"),
    ],
)
def test_precision(load, keys, compute):
    assert load(keys).precision.compute == compute


def test_a_later_file_changes_the_precision_and_one_file_may_not_contradict_itself(load):
    assert load({"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}).precision.compute == "bf16"
    assert "contradicts fp16 (0.yml:1)" in refusal(load, {"fp16": {"enabled": True}, "precision": "fp32"})


def test_loss_scale(load):
    block = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "hysteresis": 3, "min_loss_scale": 2}
    scale = load({"fp16": block}).precision.loss_scale
    assert (scale.static, scale.initial, scale.hysteresis, scale.minimum, scale.window) == (None, 4096.0, 3, 2.0, 1000)
    assert load({"fp16": {"enabled": True, "loss_scale": 128}}).precision.loss_scale.static == 128.0


@pytest.mark.parametrize(
    ("keys", "name", "gated"),
    [
        ({"activation": "gelu"}, "gelu", False),
        ({"activation": "GELU", "bias_gelu_fusion": True}, "gelu_tanh", False),
        ({"activation": "gelu", "bias_gelu_fusion": True, "onnx_safe": True}, "gelu", False),
        ({"activation": "swish"}, "silu", False),
        ({"activation": "geglu", "intermediate_size": 192}, "gelu", True),
        ({"activation": "bilinear", "intermediate_size": 192}, "identity", True),
        ({"activation": "glu", "intermediate_size": 192}, "sigmoid", True),
    ],
)
def test_activations(load, keys, name, gated):
    model = load({**MODEL, **keys}).model
    assert (model.activation, model.gated_mlp) == (name, gated)


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 256),
        ({"expansion_factor": 3}, 192),
        ({"intermediate_size": 100}, 100),
        ({"activation": "swiglu", "intermediate_size": 300}, 100),
        ({"activation": "swiglu", "intermediate_size": 192, "mlp_multiple_of": 8}, 64),
        ({"activation": "swiglu", "mlp_multiple_of": 32}, 96),
    ],
)
def test_mlp_widths(load, keys, width):
    assert load({**MODEL, **keys}).model.mlp_width == width


def test_mlp_widths_that_do_not_fit_together_are_refused(load):
    text = refusal(load, {**MODEL, "activation": "swiglu", "intermediate_size": 14336})
    assert "matrices of 9558 and 4778 columns that do not fit together; use intermediate_size: 43008" in text
    assert "0.yml:5" in text


def test_experts_have_widths_of_their_own(load):
    moe = {**MODEL, "moe_num_experts": 4, "moe_expert_interval": 2, "moe_top_k": 2, "moe_router_type": "TopK"}
    model = load(moe).model
    assert model.layer_kinds == ("moe", "dense") * 2 and (model.expert_width, model.mlp_width) == (256, 256)
    assert load({**moe, "hidden_size": 72}).model.expert_width == 512  # rounded up, where an MLP has 288
    config = load({**moe, "activation": "swiglu", "intermediate_size": 192})
    assert (config.model.expert_width, config.model.mlp_width, config.model.gated_mlp) == (192, 64, True)
    assert not config.model.experts.gated and any(
        "is applied without a gate in experts" in note for note in config.notes
    )
    assert load({**MODEL, "moe_num_experts": 4}).model.experts.router == "sinkhorn"
    off = load({**MODEL, "moe_num_experts": 1, "moe_top_k": 2})
    assert off.model.experts is None and "moe_top_k: 2 has no effect here: moe_num_experts is 1" in off.notes[0]
    assert "model.experts.router: 'hash': is none of" in refusal(load, {**moe, "moe_router_type": "hash"})


def test_attention_layers(load):
    for config in ([[["flash"], 4]], [[["global", "flash"], "all"]], ["global"] * 4, [[["global"], 2], [["flash"], 2]]):
        assert load({**MODEL, "attention_config": config}) == load(MODEL)
    assert "is refused: local, sliding layers" in refusal(
        load, {**MODEL, "attention_config": [[["local", "sliding"], "all"]]}
    )
    assert "names 6 layers, num_layers (0.yml:1) is 4" in refusal(load, {**MODEL, "attention_config": [[["flash"], 6]]})
    config = load({**MODEL, "attention_config": [[["flash"], 4]]}, {"num_layers": 2})
    assert config.model.num_layers == 2
    assert "as all are alike, it is taken for 2" in config.notes[0]


def test_layers_without_attention_take_the_place_of_others(load):
    mixed = load({**MODEL, "attention_config": [[["gmlp", "flash"], 2]], "gmlp_attn_dim": 16})
    assert (mixed.model.pattern, mixed.model.layer_kinds) == (("gmlp", "attention"), ("gmlp", "dense") * 2)
    assert "only amlp layers have a small attention" in mixed.notes[0]
    assert "names 6 layers" in refusal(load, {**MODEL, "attention_config": [[["gmlp", "flash"], 3]]})
    small = load({**MODEL, "attention_config": [[["amlp"], "all"]], "gmlp_attn_dim": 16})
    assert (small.model.pattern, small.model.amlp_size) == (("amlp",), 16)
    mamba = {**MODEL, "attention_config": [[["mamba"], "all"]]}
    assert (load(mamba).model.pattern, load(mamba).model.mamba_width) == (("mamba",), 128)
    assert load({**mamba, "expansion_factor": 3}).model.mamba_width == 192
    wide = load({**mamba, "intermediate_size": 80}).model
    assert (wide.mamba_width, wide.mlp_size) == (80, None)
    both = load({**MODEL, "attention_config": [[["mamba", "flash"], 2]], "intermediate_size": 80}).model
    assert (both.mamba_width, both.mlp_width) == (80, 80)
    narrow = {**MODEL, "attention_config": [[["rwkv"], "all"]]}
    sizes = load({**narrow, "dim_att": 64}).model
    assert (sizes.pattern, sizes.rwkv, sizes.rwkv_width) == (("rwkv",), None, 224)
    assert load({**narrow, "intermediate_size": 100}).model.rwkv_width == 96  # GPT-NeoX rounds down to a multiple of 32
    assert load({**narrow, "expansion_factor": 2}).model.rwkv_width == 128
    assert "no layer is rwkv" in load({**MODEL, "dim_att": 64}).notes[0]
    assert "have their own" in load({**narrow, "activation": "silu"}).notes[0]
    for key, said in (("dim_att", "unless it is hidden_size"), ("intermediate_size", "no width")):
        with pytest.raises(ConfigError, match=said):
            load({**narrow, key: 31})
    assert "no layer is mamba" in load({**MODEL, "mamba_use_bias_in_linears": True}).notes[0]
    lengths = {"seq_length": 32, "max_position_embeddings": 64, "attention_config": [[["gmlp"], "all"]]}
    assert "the size of their spatial matrix" in refusal(load, {**MODEL, **lengths, "pos_emb": "learned"})
    assert load({**MODEL, **lengths, "pos_emb": "none"}).model.max_positions == 32


def test_the_vocabularys_multiple_is_fixed_when_it_is_translated(load):
    neox = {**MODEL, "make_vocab_size_divisible_by": 64, "model_parallel_size": 2}
    assert load(neox).model.vocab_multiple == 128
    assert load(neox, overrides=("parallel.tp=4",)).model.vocab_multiple == 128
    assert load({**MODEL}, overrides=("parallel.tp=2",)).model.vocab_multiple == 128


def test_pipeline_sizes_0_and_1_are_one_stage_with_other_initial_weights(load):
    for size, passes, stages in ((0, 2, 1), (1, 1, 1), (2, 1, 2)):
        config = load({**MODEL, "pipe_parallel_size": size})
        assert (config.model.init_passes, config.parallel.pp) == (passes, stages)


def test_optimizers(load):
    optimizer = load({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.2}}}).optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 0.1, 0.2)
    for kind, ours in (("cpu_torch_adam", "adamw"), ("Lion", "lion"), ("sgd", "sgd"), ("muon", "muon")):
        assert load({"optimizer": {"type": kind, "params": {"lr": 0.1}}}).optimizer.name == ours
    assert load({"optimizer": {"type": "lion", "params": {"lr": 0.1}}}).optimizer.betas == (0.9, 0.99)
    sgd = load({"optimizer": {"type": "sgd", "params": {"lr": 0.1, "momentum": 0.8, "nesterov": False}}}).optimizer
    assert (sgd.momentum, load({"optimizer": {"type": "sgd", "params": {"lr": 1}}}).optimizer.momentum) == (0.8, 0.0)
    for kind in ("sm3", "madgrad_wd", "onebitadam", "lamb"):
        found = refusal(load, {"optimizer": {"type": kind, "params": {"lr": 1}}})
        assert f"optimizer is refused: {kind}: " in found
        assert "use one of adam, " in found
    assert "eps: 0.1 is not built in for sgd" in refusal(load, {"optimizer": {"type": "sgd", "params": {"eps": 0.1}}})
    assert "the parameter freeze_step: 3 is not built in" in refusal(
        load, {"optimizer": {"type": "Adam", "params": {"lr": 1, "freeze_step": 3}}}
    )
    contradiction = {"optimizer": {"type": "Adam", "params": {"lr": 1, "weight_decay": 0}}, "weight_decay": 0.1}
    assert "is contradicted by optimizer.params.weight_decay" in refusal(load, contradiction)
    assert load({"lr": 0.1}).optimizer.lr == 0.1
    assert load({"optimizer": ADAM}, {"lr": 0.1}).optimizer.lr == 0.1


def test_save_schedules(load):
    linear = load({"checkpoint_factor": 500, "extra_save_iters": [0, 1, 2]}).checkpoint
    assert (linear.every, linear.log_base, linear.steps) == (500, None, (0, 1, 2))
    log = load({"checkpoint_factor": 1.5, "checkpoint_scale": "log"}).checkpoint
    assert (log.every, log.log_base) == (None, 1.5)
    assert "checkpoint.every: 1.5: is not a whole number" in refusal(load, {"checkpoint_factor": 1.5})


def test_data_lists(load):
    keys = {"train_data_paths": ["a", "b"], "train_data_weights": [1.0, 2], "train_label_data_paths": ["c", "d"]}
    sources = load(keys).data.train
    assert [(s.path, s.weight, s.labels) for s in sources] == [("a", 1.0, "c"), ("b", 2.0, "d")]
    assert "has 1 entries, train_data_paths has 2" in refusal(load, {**keys, "train_data_weights": [1.0]})
    assert "belongs to valid_data_paths, which is not given" in refusal(load, {"valid_data_weights": [1.0]})


def test_the_rest_of_the_joint_keys(load):
    assert load({"tokenizer_type": "spmtokenizer", "vocab_file": "m"}).tokenizer.kind == "neox_sentencepiece"
    assert load({"vocab_file": "v", "merge_file": "m"}).tokenizer.kind == "gpt2"
    other = load({"vocab_file": "v.json", "merge_file": "m"}, overrides=("tokenizer_type=HFTokenizer",))
    assert (other.tokenizer.path, other.tokenizer.merges) == ("v.json", None)
    assert any("merge_file: 'm' has no effect here: HFTokenizer reads no merges" in note for note in other.notes)
    assert "tokenizer_type: 'Foo' is none of" in refusal(load, {"tokenizer_type": "Foo"})
    model = load({**MODEL, "hidden_dropout": 0.1, "gpt_j_residual": True, "gpt_j_tied": True}).model
    assert (model.hidden_dropout, model.embedding_dropout, model.shared_norm) == (0.1, 0.1, True)
    assert "it needs gpt_j_residual" in load({**MODEL, "gpt_j_tied": True}).notes[0]
    assert load({**MODEL, "norm": "RMSNorm"}).model.norm_eps == 1e-8
    assert load({"zero_optimization": {"stage": 2}}).parallel.zero == 2
    assert "needs a stage" in refusal(load, {"zero_optimization": {"cpu_offload": True}})
    assert load({"lr_decay_fraction": 0.5}).schedule.decay_fraction == 0.5
    assert "lr_decay_iters is given" in load({"lr_decay_fraction": 0.5, "lr_decay_iters": 5}).notes[0]
    assert load({"override_lr_scheduler": True}).checkpoint.schedule_from == "config"
    both = {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True}
    assert "exclude each other" in refusal(load, both)
    assert "is not a whole number" in refusal(load, {**MODEL, "pipe_parallel_size": True})


def test_the_batch_is_inferred_where_the_original_refuses(load):
    config = load({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4})
    assert batch_plan(config) == (32, 4, 8)
    config = load({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "global_num_gpus": 2})
    assert batch_plan(config, dp=1) == (16, 4, 4)


def test_mup(load):
    keys = {**MODEL, "use_mup": True, "mup_attn_temp": 2, "mup_embedding_mult": 10.0, "mup_rp_embedding_mult": 0.5}
    mup = load({**keys, "mup_output_temp": 4.0, "mup_init_scale": 3.0}).model.mup
    assert (mup.attention_temperature, mup.embedding_multiplier, mup.position_multiplier) == (2.0, 10.0, 0.5)
    assert (mup.output_temperature, mup.init_scale, mup.base_width) == (4.0, 3.0, None)
    assert load({**MODEL, "use_mup": True}).model.mup == MuPConfig()
    assert load({**MODEL, "use_mup": False}).model.mup is None
    off = load({**MODEL, "mup_init_scale": 3.0})
    assert off.model.mup is None
    assert any("mup_init_scale: 3.0 has no effect here: use_mup is off" in note for note in off.notes)
    shapes = {**MODEL, "use_mup": True, "base_shapes_file": "base-shapes"}
    assert "base_shapes_file: 'base-shapes' cannot be read: give model.mup.base_width" in refusal(load, shapes)
    based = load(shapes, overrides=("model.mup.base_width=32",)).model
    assert based.width_multiplier == based.hidden_size / 32


def test_wandb(load):
    keys = {"wandb_group": "g", "wandb_run_name": "r", "wandb_team": "t", "wandb_host": "https://w.example"}
    wandb = load({**MODEL, "use_wandb": True, **keys, "wandb_project": "p"}).log.wandb
    assert wandb == WandbConfig(project="p", group="g", name="r", team="t", host="https://w.example")
    assert load({**MODEL, "use_wandb": True}).log.wandb.project == "neox"
    for off in ({}, {"use_wandb": False}):
        config = load({**MODEL, **off, "wandb_project": "p"})
        assert config.log.wandb is None
        assert any("wandb_project: 'p' has no effect here: use_wandb is off" in note for note in config.notes)
    block = {"enabled": True, "project": "p", "team": "t", "group": "g"}
    assert load({**MODEL, "wandb": block}).log.wandb == WandbConfig(project="p", group="g", team="t")
    assert load({**MODEL, "wandb": {**block, "enabled": False}}).log.wandb is None


def test_monitors(load):
    assert load({**MODEL, "csv_monitor": {"enabled": True, "output_path": "logs"}}).log.csv
    assert load({**MODEL, "tensorboard": {"enabled": True, "output_path": "tb"}}).log.tensorboard == "tb"
    both = load({**MODEL, "tensorboard": {"enabled": True}, "tensorboard_dir": "here"})
    assert both.log.tensorboard == "here"


@pytest.mark.parametrize("key", ["log_grad_norm", "log_param_norm", "log_grad_pct_zeros"])
def test_statistics_of_layers(load, key):
    assert load({**MODEL, key: True, "log_interval": 7}).log.layers_every == 7
    assert load({**MODEL, key: False, "log_interval": 7}).log.layers_every is None


@pytest.mark.parametrize("key", ["profile", "memory_profiling"])
def test_profiles(load, key):
    config = load({**MODEL, key: True, "profile_step_start": 3, "memory_profiling_path": "here"})
    assert config.log.profile == ProfileConfig(start=3, stop=12, dir="here")
    off = load({**MODEL, "profile_step_stop": 40})
    assert off.log.profile is None
    assert any("profile_step_stop: 40 has no effect here: profile is off" in note for note in off.notes)


def test_a_warm_up_in_steps_is_written_as_the_share_that_neox_knows():
    words = ["model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "train.steps=200"]
    config = load_config([], [*words, "schedule.decay_steps=100", "schedule.warmup_steps=5"])
    keys = to_neox(trainable(config))
    assert keys["warmup"] == 0.05
    assert load_config([keys]).schedule.warmup_length(100) == 5

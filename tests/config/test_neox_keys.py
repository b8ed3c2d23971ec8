"""The table of NeoX's arguments: complete, with the original's defaults, and each row does what it says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from castalia.config.batch import size_at
from castalia.config.fields import FIELDS
from castalia.config.load import load_config
from castalia.config.neox.keys import FORMER, KEYS
from castalia.config.schema import Source
from castalia.errors import ConfigError

MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}


def of_kind(kind: str) -> list[str]:
    return [key for key, row in KEYS.items() if row.kind == kind]


def load(tmp_path: Path, **keys: object):
    path = tmp_path / "neox.yml"
    path.write_text(yaml.safe_dump(keys))
    return load_config(path)


def other_than(key: str) -> object:
    """A value that asks for something else than the default."""
    default = KEYS[key].default
    if key == "checkpoint":
        return {"tag_validation": "Warn"}  # any other value is taken for our section of this name
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return "something"


def test_the_table_has_321_rows():
    assert len(KEYS) == 321
    assert not FORMER.keys() & KEYS.keys()


def test_rows_and_defaults_are_those_of_the_reference(fixtures):
    table = fixtures.parent / "reference" / "neox-arguments.tsv"
    if not table.is_file():
        pytest.skip(f"needs the list of arguments beside the fixtures: {table}")
    with table.open(encoding="utf-8") as file:
        rows = {row["name"]: row["default"] for row in csv.DictReader(file, delimiter="\t")}
    assert KEYS.keys() == rows.keys()
    for name, default in rows.items():
        if not default.endswith("()"):  # the commit of the original's checkout
            assert repr(KEYS[name].default) == default or KEYS[name].default == yaml.safe_load(default), name


def test_every_target_exists():
    for key in of_kind("to"):
        assert KEYS[key].target in FIELDS, key
    for key in of_kind("joint"):
        first = KEYS[key].target.split(",")[0].split(" or ")[0]
        assert first in FIELDS or first == "precision.compute" or key in ("num_unique_layers", "dim_att"), key


@pytest.mark.parametrize("key", [key for key in of_kind("idle") if key != "tokenizer"])  # that is our section
def test_a_key_without_effect_says_so_and_changes_nothing(tmp_path, key):
    config = load(tmp_path, **MODEL, **{key: other_than(key)})
    assert config == load(tmp_path, **MODEL)
    assert [note for note in config.notes if f" {key}" in note and KEYS[key].target in note]
    assert f"neox.yml:{1 + sorted([*MODEL, key]).index(key)}: " in config.notes[0]


@pytest.mark.parametrize("key", of_kind("refused"))
def test_a_refused_key_is_accepted_while_it_is_off(tmp_path, key):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, **MODEL, **{key: other_than(key)})
    for part in ("neox.yml:", key, KEYS[key].target, "remove the key"):
        assert part in str(error.value)
    for off in (KEYS[key].default, None, False, {"enabled": False}):
        config = load(tmp_path, **MODEL, **{key: off})
        assert config == load(tmp_path, **MODEL)
        assert config.notes == ()


# key -> (NeoX's value, our value); the key's target is in the table
HONOURED = {
    "train_batch_size": (32, 32),
    "train_micro_batch_size_per_gpu": (4, 4),
    "sequence_parallel": (True, True),
    "num_layers": (6, 6),
    "hidden_size": (128, 128),
    "num_attention_heads": (8, 8),
    "num_kv_heads": (2, 2),
    "seq_length": (128, 128),
    "sliding_window_width": (16, 16),
    "max_position_embeddings": (4096, 4096),
    "use_qk_layernorm": (True, True),
    "pos_emb": ("Rotary", "rotary"),
    "no_weight_tying": (True, False),
    "init_method_std": (0.01, 0.01),
    "rotary_pct": (0.5, 0.5),
    "rotary_emb_base": (500000, 500000.0),
    "init_method": ("Wang_Init", "wang_init"),
    "output_layer_init_method": ("normal", "normal"),
    "gpt_j_residual": (True, True),
    "use_bias_in_attn_linear": (False, False),
    "use_bias_in_mlp": (False, False),
    "attention_dropout": (0.1, 0.1),
    "lr_decay_style": ("exponential", "exponential"),
    "lr_decay_iters": (50, 50),
    "min_lr": (1e-5, 1e-5),
    "warmup": (0.1, 0.1),
    "tensorboard_dir": ("tb", "tb"),
    "peak_theoretical_tflops": (312, 312.0),
    "log_interval": (5, 5),
    "eod_mask_loss": (True, True),
    "global_num_gpus": (8, 8),
    "seed": (7, 7),
    "iteration": (500, 500),
    "data_path": ("corpus", "corpus"),
    "split": ("90,5,5", "90,5,5"),
    "weight_by_num_documents": (True, True),
    "weighted_sampler_alpha": (0.3, 0.3),
    "pack_impl": ("pack_until_overflow", "pack_until_overflow"),
    "allow_chopped": (False, False),
    "save": ("runs/a", "runs/a"),
    "extra_save_iters": ([0, 1, 2], (0, 1, 2)),
    "keep_last_n_checkpoints": (3, 3),
    "no_save_optim": (True, False),
    "no_load_optim": (True, False),
    "train_iters": (100, 100),
    "train_epochs": (2, 2),
    "eval_iters": (3, 3),
    "eval_interval": (0, None),
    "vocab_file": ("tokenizer.json", "tokenizer.json"),
    "merge_file": ("merges.txt", "merges.txt"),
    "exit_interval": (40, 40),
    "weight_decay": (0.05, 0.05),
    "checkpoint_activations": (True, "full"),
    "text_gen_type": ("interactive", "interactive"),
    "temperature": (0.7, 0.7),
    "top_p": (0.9, 0.9),
    "top_k": (40, 40),
    "maximum_tokens": (10, 10),
    "prompt_end": ("\n\n", "\n\n"),
    "sample_input_file": ("in.txt", "in.txt"),
    "num_samples": (5, 5),
    "eval_tasks": (["lambada_openai"], ["lambada_openai"]),
    "eval_results_prefix": ("out/first", "out/first"),
}


def test_every_honoured_row_has_an_example():
    assert HONOURED.keys() == set(of_kind("to"))


@pytest.mark.parametrize("key", HONOURED)
def test_an_honoured_key_arrives(tmp_path, key):
    theirs, ours = HONOURED[key]
    config = load(tmp_path, **{**MODEL, key: theirs})
    assert value_at(config, KEYS[key].target) == ours
    assert config.origins[KEYS[key].target].endswith(f"neox.yml:{1 + sorted({*MODEL, key}).index(key)}")


WANDB = {"use_wandb": True}
PROFILE = {"profile": True}
GELU = {"activation": "gelu"}
FP16 = {"type": "fp16", "enabled": True}
PAIRWISE, UNPACKED = {"dataset_impl": "pairwise"}, {"pack_impl": "unpacked"}
PAIRS = {"dataset_impl": "pairwise", "pos_train_data_paths": ["a"], "neg_train_data_paths": ["b"]}
PAIR = Source(path="a", rejected={"path": "b"})
DPO, KTO = {"train_impl": "dpo", **UNPACKED}, {"train_impl": "kto", **UNPACKED}


def paths_of_pairs(split: str, labels: str) -> dict[str, object]:
    paths = {f"pos_{split}_data_paths": ["a"], f"neg_{split}_data_paths": ["b"]}
    return PAIRWISE | paths | {f"{side}_{split}_label_data_paths": [side] for side in ("pos", "neg") if labels}


def pair_of(labels: str) -> Source:
    if not labels:
        return PAIR
    return Source(path="a", labels="pos", rejected={"path": "b", "labels": "neg"})


CURRICULUM = {
    "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 16, "max_difficulty": 2048,
    "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 100, "difficulty_step": 8, "root_degree": 2},
}  # fmt: skip


# key -> (its value and the keys beside it that it needs, our path, what arrives there). One joint effect of each key.
JOINT = {
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 4}, "train.accumulation", 4),
    "optimizer": ({"optimizer": {"type": "Lion", "params": {"lr": 0.1}}}, "optimizer.name", "lion"),
    "fp16": ({"fp16": {**FP16, "hysteresis": 5}}, "precision.loss_scale.hysteresis", 5),
    "bf16": ({"bf16": {"enabled": True}}, "precision.compute", "bf16"),
    "gradient_clipping": ({"gradient_clipping": 0.5}, "optimizer.clip_norm", 0.5),
    "zero_optimization": ({"zero_optimization": {"stage": 2}}, "parallel.zero", 2),
    "curriculum_learning": ({"curriculum_learning": CURRICULUM}, "data.seq_length_warmup.multiple", 8),
    "tensorboard": ({"tensorboard": {"enabled": True, "output_path": "tb"}}, "log.tensorboard", "tb"),
    "wandb": ({"wandb": {"enabled": True, "team": "t"}}, "log.wandb.team", "t"),
    "csv_monitor": ({"csv_monitor": {"enabled": True}}, "log.csv", True),
    "pipe_parallel_size": ({"pipe_parallel_size": 2}, "parallel.pp", 2),
    "model_parallel_size": ({"model_parallel_size": 2}, "model.vocab_multiple", 256),
    "precision": ({"precision": "bfloat16"}, "precision.compute", "bf16"),
    "intermediate_size": ({"intermediate_size": 96}, "model.mlp_size", 96),
    "mlp_multiple_of": ({"intermediate_size": 96, "mlp_multiple_of": 64}, "model.mlp_size", 128),
    "expansion_factor": ({"expansion_factor": 2.0}, "model.mlp_size", 128),
    "norm": ({"norm": "scalenorm"}, "model.norm", "scalenorm"),
    "layernorm_epsilon": ({"layernorm_epsilon": 1e-3}, "model.norm_eps", 1e-3),
    "rms_norm_epsilon": ({"norm": "rmsnorm", "rms_norm_epsilon": 1e-3}, "model.norm_eps", 1e-3),
    "scalenorm_epsilon": ({"norm": "scalenorm", "scalenorm_epsilon": 1e-3}, "model.norm_eps", 1e-3),
    "make_vocab_size_divisible_by": ({"make_vocab_size_divisible_by": 64}, "model.vocab_multiple", 64),
    "activation": ({"activation": "SwiGLU"}, "model.gated_mlp", True),
    "bias_gelu_fusion": ({**GELU, "bias_gelu_fusion": True}, "model.activation", "gelu_tanh"),
    "onnx_safe": ({**GELU, "bias_gelu_fusion": True, "onnx_safe": True}, "model.activation", "gelu"),
    "gpt_j_tied": ({"gpt_j_residual": True, "gpt_j_tied": True}, "model.shared_norm", True),
    "lr": ({"lr": 0.5}, "optimizer.lr", 0.5),
    "lr_decay_fraction": ({"lr_decay_fraction": 0.5}, "schedule.decay_fraction", 0.5),
    "override_lr_scheduler": ({"override_lr_scheduler": True, "load": "a"}, "checkpoint.schedule_from", "config"),
    "use_checkpoint_lr_scheduler": (
        {"use_checkpoint_lr_scheduler": True, "load": "a"}, "checkpoint.schedule_from", "checkpoint"
    ),
    "use_wandb": (WANDB, "log.wandb.project", "neox"),
    "wandb_group": ({**WANDB, "wandb_group": "g"}, "log.wandb.group", "g"),
    "wandb_run_name": ({**WANDB, "wandb_run_name": "n"}, "log.wandb.name", "n"),
    "wandb_team": ({**WANDB, "wandb_team": "t"}, "log.wandb.team", "t"),
    "wandb_project": ({**WANDB, "wandb_project": "p"}, "log.wandb.project", "p"),
    "wandb_host": ({**WANDB, "wandb_host": "https://w.example"}, "log.wandb.host", "https://w.example"),
    "log_grad_pct_zeros": ({"log_grad_pct_zeros": True, "log_interval": 7}, "log.layers_every", 7),
    "log_param_norm": ({"log_param_norm": True, "log_interval": 7}, "log.layers_every", 7),
    "log_grad_norm": ({"log_grad_norm": True, "log_interval": 7}, "log.layers_every", 7),
    "memory_profiling": ({"memory_profiling": True}, "log.profile.start", 10),
    "memory_profiling_path": ({**PROFILE, "memory_profiling_path": "here"}, "log.profile.dir", "here"),
    "profile": (PROFILE, "log.profile.stop", 12),
    "profile_step_start": ({**PROFILE, "profile_step_start": 3}, "log.profile.start", 3),
    "profile_step_stop": ({**PROFILE, "profile_step_stop": 30}, "log.profile.stop", 30),
    "tokenizer_type": ({"tokenizer_type": "CharLevelTokenizer"}, "tokenizer.kind", "char"),
    "train_data_paths": ({"train_data_paths": ["a"]}, "data.train", (Source(path="a"),)),
    "train_label_data_paths": (
        {"train_data_paths": ["a"], "train_label_data_paths": ["b"]}, "data.train", (Source(path="a", labels="b"),)
    ),
    "train_data_weights": (
        {"train_data_paths": ["a"], "train_data_weights": [2.0]}, "data.train", (Source(path="a", weight=2.0),)
    ),
    "valid_data_paths": ({"valid_data_paths": ["a"]}, "data.valid", (Source(path="a"),)),
    "valid_label_data_paths": (
        {"valid_data_paths": ["a"], "valid_label_data_paths": ["b"]}, "data.valid", (Source(path="a", labels="b"),)
    ),
    "valid_data_weights": (
        {"valid_data_paths": ["a"], "valid_data_weights": [2.0]}, "data.valid", (Source(path="a", weight=2.0),)
    ),
    "test_data_paths": ({"test_data_paths": ["a"]}, "data.test", (Source(path="a"),)),
    "test_label_data_paths": (
        {"test_data_paths": ["a"], "test_label_data_paths": ["b"]}, "data.test", (Source(path="a", labels="b"),)
    ),
    "test_data_weights": (
        {"test_data_paths": ["a"], "test_data_weights": [2.0]}, "data.test", (Source(path="a", weight=2.0),)
    ),
    "load": ({"load": "a"}, "checkpoint.resume", "a"),
    "finetune": ({"load": "a", "finetune": True}, "checkpoint.init_from", "a"),
    "checkpoint_scale": ({"checkpoint_scale": "log", "checkpoint_factor": 2.0}, "checkpoint.log_base", 2.0),
    "checkpoint_factor": ({"checkpoint_factor": 500}, "checkpoint.every", 500),
    "hidden_dropout": ({"hidden_dropout": 0.1}, "model.embedding_dropout", 0.1),
    "clip_grad": ({"clip_grad": 0.5}, "optimizer.clip_norm", 0.5),
    "use_mup": ({"use_mup": True}, "model.mup.init_scale", 1.0),
    "mup_init_scale": ({"use_mup": True, "mup_init_scale": 2.0}, "model.mup.init_scale", 2.0),
    "mup_attn_temp": ({"use_mup": True, "mup_attn_temp": 2.0}, "model.mup.attention_temperature", 2.0),
    "mup_output_temp": ({"use_mup": True, "mup_output_temp": 2.0}, "model.mup.output_temperature", 2.0),
    "mup_embedding_mult": ({"use_mup": True, "mup_embedding_mult": 2.0}, "model.mup.embedding_multiplier", 2.0),
    "mup_rp_embedding_mult": ({"use_mup": True, "mup_rp_embedding_mult": 2.0}, "model.mup.position_multiplier", 2.0),
    "moe_num_experts": ({"moe_num_experts": 4}, "model.experts.count", 4),
    "moe_expert_interval": ({"moe_num_experts": 4, "moe_expert_interval": 2}, "model.experts.every", 2),
    "moe_top_k": ({"moe_num_experts": 4, "moe_top_k": 2}, "model.experts.top_k", 2),
    "moe_router_type": ({"moe_num_experts": 4, "moe_router_type": "topk"}, "model.experts.router", "topk"),
    "moe_jitter_eps": (
        {"moe_num_experts": 4, "moe_router_type": "topk", "moe_jitter_eps": 0.1}, "model.experts.jitter", 0.1
    ),
    "attention_config": ({"attention_config": [[["global", "gmlp"], 2]]}, "model.pattern", ("attention", "gmlp")),
    "mamba_use_bias_in_conv": (
        {"attention_config": [[["mamba"], "all"]], "mamba_use_bias_in_conv": False}, "model.mamba.conv_bias", False
    ),
    "mamba_use_bias_in_linears": (
        {"attention_config": [[["mamba"], "all"]], "mamba_use_bias_in_linears": True}, "model.mamba.linear_bias", True
    ),
    "gmlp_attn_dim": ({"attention_config": [[["amlp"], "all"]], "gmlp_attn_dim": 16}, "model.amlp_size", 16),
    "sample_output_file": ({"sample_output_file": "out.txt"}, "generate.output_file", "out.txt"),
    "train_impl": ({"train_impl": "rm", **UNPACKED}, "train.objective", "reward"),
    "dataset_impl": ({**PAIRS, "dataset_impl": "pairwise"}, "data.train", (PAIR,)),
    "dpo_beta": ({**DPO, "dpo_beta": 0.3}, "preference.beta", 0.3),
    "dpo_reference_free": ({**DPO, "dpo_reference_free": True}, "preference.reference_free", True),
    "kto_beta": ({**KTO, "kto_beta": 0.3}, "preference.beta", 0.3),
    "kto_desirable_weight": ({**KTO, "kto_desirable_weight": 2.0}, "preference.desirable_weight", 2.0),
    "kto_undesirable_weight": ({**KTO, "kto_undesirable_weight": 2.0}, "preference.undesirable_weight", 2.0),
    "z_loss": ({"train_impl": "rm", **UNPACKED, "z_loss": 0.1}, "train.z_loss", 0.1),
    "precompute_model_name": (
        {**DPO, **PAIRS, "precompute_model_name": "m"},
        "data.train",
        (Source(path="a", references="a_m", rejected={"path": "b", "references": "b_m"}),),
    ),
    "train_reward_data_paths": (
        {"train_data_paths": ["a"], "train_reward_data_paths": ["b"]}, "data.train", (Source(path="a", rewards="b"),)
    ),
    "valid_reward_data_paths": (
        {"valid_data_paths": ["a"], "valid_reward_data_paths": ["b"]}, "data.valid", (Source(path="a", rewards="b"),)
    ),
    "test_reward_data_paths": (
        {"test_data_paths": ["a"], "test_reward_data_paths": ["b"]}, "data.test", (Source(path="a", rewards="b"),)
    ),
    **{
        f"{side}_{split}_{labels}data_paths": (paths_of_pairs(split, labels), f"data.{split}", (pair_of(labels),))
        for side in ("pos", "neg")
        for split in ("train", "valid", "test")
        for labels in ("", "label_")
    },
}  # fmt: skip
REFUSALS = {  # keys that choose nothing here: one value is right, the others are refused
    "num_unique_layers": (4, 2, "layers that share their weights are not built in"),
    "base_shapes_file": (None, "shapes.yml", "give model.mup.base_width"),
    "dim_att": (64, 32, "unless it is hidden_size"),
}


def value_at(config: object, path: str) -> object:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def test_every_joint_row_has_an_example():
    assert JOINT.keys() | REFUSALS.keys() == set(of_kind("joint"))


@pytest.mark.parametrize("key", JOINT)
def test_a_joint_key_arrives_with_its_companions(tmp_path, key):
    keys, path, expected = JOINT[key]
    assert value_at(load(tmp_path, **MODEL, **keys), path) == expected
    without = {name: value for name, value in keys.items() if name != key}
    try:
        config = load(tmp_path, **MODEL, **without)
    except ConfigError as error:  # its companions make no sense without it
        assert f"belongs to {key}" in str(error)
    else:
        assert value_at(config, path) != expected


@pytest.mark.parametrize("key", REFUSALS)
def test_a_key_with_one_right_value_refuses_the_others(tmp_path, key):
    right, wrong, text = REFUSALS[key]
    base = {**MODEL, "use_mup": key == "base_shapes_file"}
    base |= {"attention_config": [[["rwkv"], "all"]]} if key == "dim_att" else {}
    assert load(tmp_path, **base, **{key: right}) == load(tmp_path, **base)
    with pytest.raises(ConfigError, match=text):
        load(tmp_path, **base, **{key: wrong})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_impl": "reinforce"}, "train_impl: 'reinforce' is refused"),
        ({"dataset_impl": "online"}, "dataset_impl: 'online' is refused: online training on generated texts"),
        (
            {**PAIRS, "neg_train_data_paths": ["b", "c"]},
            "neg_train_data_paths has 2 entries, pos_train_data_paths has 1",
        ),
    ],
)
def test_tuning_that_is_not_built_in_is_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **MODEL, **keys)


def test_keys_of_another_objective_are_told_of(tmp_path):
    config = load(tmp_path, **MODEL, **DPO, kto_beta=0.5, train_data_paths=["a"], **PAIRS)
    assert any("kto_beta: 0.5 has no effect here: it belongs to train_impl: kto" in note for note in config.notes)
    assert any("train_data_paths has no effect here: dataset_impl is pairwise" in note for note in config.notes)
    assert config.data.train == (PAIR,)


STRANGE = (
    -1,
    True,
    "abc",
    [],
    [["a"]],
    {},
    {"enabled": True},
    [[["global"], "all"]],
    [[[], 3]],
    10**30,
    {"stage": "x"},
)


@pytest.mark.parametrize("key", [*of_kind("joint"), *of_kind("to")])
def test_strange_values_end_in_a_config_or_in_a_message(tmp_path, key):
    """No value of any key may end in anything but a config or a ConfigError that names the file."""
    base = {**MODEL, "activation": "swiglu", "fp16": {"enabled": True}, "train_iters": 5}
    for value in STRANGE:
        for others in (base, {}):
            try:
                load(tmp_path, **{**others, key: value})
            except ConfigError as error:
                assert "neox.yml:" in str(error)


def test_a_curriculum_gives_the_lengths_of_the_original(tmp_path):
    config = load(tmp_path, **MODEL, curriculum_learning=CURRICULUM)
    warmup = config.data.seq_length_warmup
    assert warmup is not None and warmup.model_dump() == {"start": 16, "steps": 100, "multiple": 8, "root": 2}
    lengths = [size_at(warmup, step, 2048) for step in range(200)]
    # Of step 1: floor(sqrt(1 / 100) * 2032 + 16) = 219, of step 2: 303; then less what is over a multiple of 8.
    assert lengths[:2] == [216, 296] and lengths[98:] == [2032, *[2048] * 101] and lengths == sorted(lengths)
    linear = {**CURRICULUM, "schedule_type": "fixed_linear"}
    warmup = load(tmp_path, **MODEL, curriculum_learning=linear).data.seq_length_warmup
    assert warmup is not None and warmup.root == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curriculum_type": "vocab"}, "curriculum_type: 'vocab' with schedule_type: 'fixed_root' is not built in"),
        ({"schedule_type": "fixed_discrete"}, "schedule_type: 'fixed_discrete' is not built in"),
        (
            {"max_difficulty": 1024},
            "max_difficulty: 1024 is not the sequences' length; set it and seq_length, now 2048",
        ),
        ({"schedule_config": {"total_curriculum_step": 9}}, "needs difficulty_step"),
    ],
)
def test_other_curricula_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ConfigError, match="curriculum_learning") as error:
        load(tmp_path, **MODEL, curriculum_learning=CURRICULUM | change)
    assert message in str(error.value)
    assert load(tmp_path, **MODEL, curriculum_learning=CURRICULUM | change | {"enabled": False}) == load(
        tmp_path, **MODEL
    )

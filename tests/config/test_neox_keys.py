"""The table of NeoX's arguments: complete, with the original's defaults, and each row does what it says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from castalia.config.fields import FIELDS
from castalia.config.load import load_config
from castalia.config.neox_keys import KEYS, STALE
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
    assert not STALE.keys() & KEYS.keys()


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
        assert first in FIELDS or first == "precision.compute" or key in ("attention_config", "num_unique_layers"), key


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
}


def test_every_honoured_row_has_an_example():
    assert HONOURED.keys() == set(of_kind("to"))


@pytest.mark.parametrize("key", HONOURED)
def test_an_honoured_key_arrives(tmp_path, key):
    theirs, ours = HONOURED[key]
    config = load(tmp_path, **{**MODEL, key: theirs})
    value: object = config
    for name in KEYS[key].target.split("."):
        value = getattr(value, name)
    assert value == ours
    assert config.origins[KEYS[key].target].endswith(f"neox.yml:{1 + sorted({*MODEL, key}).index(key)}")


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

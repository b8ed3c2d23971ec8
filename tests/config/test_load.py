"""Files, presets and overrides become one config; every value knows its place, every mistake has a message."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castalia.config.load import dump_config, load_config, preset_names
from castalia.config.schema import RunConfig
from castalia.config.yaml_files import mapping_from, to_yaml
from castalia.errors import ConfigError

MODEL = "model: {num_layers: 2, hidden_size: 64, num_heads: 4}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working directory, so that messages name it briefly."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        Path(name).write_text(text)
        return name

    return write


def refusal(files, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(files, overrides)
    return str(error.value).splitlines()


def test_values_know_their_file_and_line(write):
    file = write("a.yml", "# a comment\nmodel:\n  num_layers: 2\n  hidden_size: 64\n  num_heads: 4\nseed: 5\n")
    config = load_config(file)
    assert config.model.hidden_size == 64
    assert config.origins == {
        "model.num_layers": "a.yml:3",
        "model.hidden_size": "a.yml:4",
        "model.num_heads": "a.yml:5",
        "seed": "a.yml:6",
    }


def test_the_later_file_wins_and_both_places_are_shown(write):
    write("a.yml", "train: {steps: 100, batch_size: 8}\n")
    write("b.yml", "\ntrain:\n  steps: 200\n")
    config = load_config(["a.yml", "b.yml"], ["train.batch_size=16"])
    assert (config.train.steps, config.train.batch_size) == (200, 16)
    assert config.origins["train.steps"] == "b.yml:3, replacing a.yml:1"
    assert config.origins["train.batch_size"] == "command line, replacing a.yml:1"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("data: {path: corpus}", "train_data_paths: [other]"),
        ("data_path: corpus", "data: {train: [{path: other}]}"),
        ("data_path: corpus", "train-data-paths: [other]"),
    ],
)
def test_one_corpus_and_a_list_of_corpora_replace_each_other(write, first, second):
    config = load_config([write("a.yml", first), write("b.yml", second)])
    assert config.data.path is None
    assert [source.path for source in config.data.train] == ["other"]
    assert config.origins["data.train"] == "b.yml:1, replacing data.path of a.yml:1"
    assert load_config(["b.yml", "a.yml"]).data.path == "corpus"
    assert load_config(["b.yml", "a.yml"]).data.train == ()
    assert load_config(["b.yml"], ["data.train=null"]).data.train == ()


def test_sources_may_be_plain_paths(write):
    write("a.yml", "data: {train: [a, {path: b, weight: 2}], valid: c}\n")
    data = load_config("a.yml").data
    assert [(source.path, source.weight) for source in data.train] == [("a", 1.0), ("b", 2.0)]
    assert data.valid[0].path == "c"


def test_a_null_section_and_its_values_replace_each_other(write):
    write("a.yml", MODEL + "model_extra: 1\n".replace("model_extra: 1\n", ""))
    config = load_config("a.yml", ["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"])
    assert config.model.rope_scaling.factor == 2.0
    assert load_config("a.yml", ["model.rope_scaling.kind=linear", "model.rope_scaling=null"]).model == (
        load_config("a.yml").model
    )


def test_numbers_that_yaml_takes_for_text_are_read_with_a_note(write):
    file = write("a.yml", "optimizer:\n  lr: 6e-4\ntrain: {steps: 1e3}\n")
    config = load_config(file, ["schedule.min_lr=1E-5"])
    assert (config.optimizer.lr, config.train.steps, config.schedule.min_lr) == (6e-4, 1000, 1e-5)
    assert [note.split(" is read")[0] for note in config.notes] == [
        "a.yml:2: optimizer.lr: 6e-4",
        "a.yml:3: train.steps: 1e3",
    ]
    config = load_config(write("b.yml", '{"optimizer": {"type": "Adam", "params": {"lr": 0.0006, "eps": 1.0e_8}}}'))
    assert config.optimizer.eps == 1e-8 and "1.0e_8 is read as the number 1e-08" in config.notes[0]


def test_a_run_folder_a_preset_and_a_name_without_ending_are_configs(write, tmp_path):
    assert load_config("Pythia-14M").model.num_layers == 6
    (tmp_path / "run").mkdir()
    write("run/config.yml", "seed: 7\n")
    write("mine.yml", "seed: 8\n")
    assert load_config("run").seed == 7
    assert load_config("mine").seed == 8


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_dumping(write, name):
    config = load_config(name)
    assert config.model.vocab_size
    assert load_config(write("dump.yml", dump_config(config))) == config


MISTAKES = [
    ("train:\n  stepz: 3\n", "a.yml:2: unknown key train.stepz; did you mean train.steps?"),
    ("train: {lr: 3}\n", "a.yml:1: unknown key train.lr; did you mean optimizer.lr?"),
    ("train_iterz: 3\n", "a.yml:1: unknown key train_iterz; did you mean train_iters"),
    ("keep: 3\n", "a.yml:1: unknown key keep; did you mean checkpoint.keep_last or checkpoint.keep_every"),
    ("learning_rate: 3\n", "a.yml:1: unknown key learning_rate; did you mean optimizer.lr?"),
    ("xyzzy: 3\n", "a.yml:1: unknown key xyzzy; the keys of a config are seed"),
    ("data:\n  train: [{path: x, wieght: 2}]\n", "a.yml:2: unknown key data.train.0.wieght"),
    ("train:\n\n  steps: many\n", "a.yml:3: train.steps: 'many': is not a whole number; a whole number above 0"),
    ("train: {steps: 2.5}\n", "a.yml:1: train.steps: 2.5: is not a whole number"),
    ("train: {steps: true}\n", "a.yml:1: train.steps: True: is not a whole number"),
    ('train: {steps: "200"}\n', "a.yml:1: train.steps: '200': is quoted text, not a number: remove the quotes"),
    ("optimizer: {lr: 0}\n", "a.yml:1: optimizer.lr: 0: is not greater than 0; a number above 0 (default 0.0003)"),
    ("optimizer: {betas: [0.9]}\n", "a.yml:1: optimizer.betas.1 is missing"),
    ("train: {device: gpu}\n", "a.yml:1: train.device: 'gpu': is none of 'auto', 'cpu', 'cuda' or 'mps'"),
    ("log: {every: .inf}\n", "a.yml:1: log.every: inf: is no"),
    ("optimizer: {lr: .nan}\n", "a.yml:1: optimizer.lr: nan: is not"),
    ("train: 3\n", "a.yml:1: train: 3 is not a section; write `train:` and indent its keys below it"),
    (
        "model: {num_layers: 2, num_heads: 4}\n",
        "a.yml:1: model.hidden_size is missing (a whole number above 0 and of at most 16777216: width of "
        "the hidden state)",
    ),
    ("seed: 1\ntrain: {steps: 1,\n  steps: 2}\n", "a.yml:3: train.steps is already given on line 2; keep one"),
    ("seed: 1\nseed: 2\n", "a.yml:2: seed is already given on line 1; keep one"),
    ('"num-layers": 2\nnum_layers: 3\n', "a.yml:2: num_layers is already given at a.yml:1; keep one"),
    ("train: {steps: 3}\ntrain_iters: 3\n", "train.steps is already given at a.yml:"),
    ("train: {steps: 3, epochs: 1}\n", "a.yml:1: train.epochs and train.steps (a.yml:1) exclude each other"),
    ("data: {path: x, train: [y]}\n", "a.yml:1: data.train and data.path (a.yml:1) exclude each other"),
    ("train: {steps: 3\nseed: 4\n", "a.yml:2: not valid YAML:"),
    ("- 1\n- 2\n", "a.yml:1: holds no keys; a config is a mapping"),
    ("? [a, b]\n: 3\n", "a.yml:1: a key must be a word"),
    ("seed: !!python/name:os.system\n", "a.yml:1: seed:"),
    ("train: {<<: 3}\n", "a.yml:1: << merges mappings, such as *defaults"),
    ("train: &t {<<: *t}\n", "a.yml: an anchor (&name) holds an alias (*name) of itself"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_each_mistake_has_its_message(write, text, message):
    lines = refusal(write("a.yml", text))
    assert any(message in line for line in lines), lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "command line: 'train.steps' is not an override; write key=value"),
        ("train.stepz=3", "command line: unknown key train.stepz; did you mean train.steps?"),
        ("train.steps=x", "command line: train.steps: 'x': is not a whole number"),
        ("train.steps=[1", "command line: train.steps=[1: not valid YAML"),
        ("optimizer.params.lr=x", "command line: optimizer needs a type and params"),
    ],
)
def test_mistakes_on_the_command_line(override, message):
    assert any(message in line for line in refusal([], [override]))


def test_merge_keys_give_what_nobody_before_them_says(write):
    text = "log: {<<: [{every: 2, csv: true}, {every: 4, csv: false}], csv: false}\n"
    log = load_config(write("a.yml", MODEL + text)).log
    assert (log.every, log.csv) == (2, False)
    train = "train:\n  steps: 5\n  <<: &shared\n    steps: 3\n    batch_size: 4\n"
    config = load_config(write("b.yml", train))
    assert (config.train.steps, config.train.batch_size) == (5, 4)
    assert config.origins["train.steps"] == "b.yml:2" and config.origins["train.batch_size"] == "b.yml:5"


def test_all_mistakes_are_told_at_once(write):
    file = write("a.yml", MODEL + "train: {stepz: 1}\noptimizer: {lr: x}\nactivation: tanhh\nautotuning_run: x\n")
    lines = refusal(file, ["seed=0"])
    assert len(lines) == 5
    assert sum("a.yml:" in line for line in lines) == 4


def test_contradictions_are_told_together_with_unknown_keys(write):
    file = write("a.yml", "model: {num_layers: 2, hidden_size: 66, num_heads: 4}\ntrain: {stepz: 1}\n")
    lines = refusal(file)
    assert any("unknown key" in line for line in lines)
    assert any("model.hidden_size=66 does not divide" in line for line in lines)


def test_missing_files_name_presets_that_are_close(write, tmp_path):
    assert refusal("pythia-14")[0].startswith(
        "pythia-14: no such file, and no preset has this name; presets: pythia-14m"
    )
    assert refusal("125M.yml")[0].endswith("presets: neox-125m")
    assert "29 presets, such as" in refusal("nothing-like-it")[0]
    assert (
        "holds no config.yml" in refusal(str(tmp_path))[0] and f"castalia start {tmp_path}" in refusal(str(tmp_path))[0]
    )
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal("binary.yml")[0]


def test_a_later_smaller_batch_lowers_the_micro_batch(write):
    file = write("a.yml", "train: {batch_size: 64, micro_batch_size: 32}\n")
    config = load_config(file, ["train.batch_size=16"])
    assert (config.train.batch_size, config.train.micro_batch_size) == (16, None)
    assert "train.micro_batch_size=32 gives way to the smaller train.batch_size=16 (command line)" in config.notes[0]
    assert load_config(file, ["train.batch_size=32"]).train.micro_batch_size == 32
    assert "does not divide" in refusal(write("b.yml", "train: {batch_size: 16, micro_batch_size: 32}\n"))[0]


def test_origins_and_notes_survive_a_copy_and_do_not_count_in_comparisons(write):
    config = load_config(write("a.yml", "seed: 1e1\n"))
    copy = config.model_copy(update={"seed": 11})
    assert copy.origins == config.origins
    assert copy.notes == config.notes != ()
    assert config == RunConfig(seed=10)
    assert hash(config) == hash(RunConfig(seed=10))
    assert config != copy


def test_a_run_may_start_in_the_folder_that_it_resumes_from():
    assert load_config([], ["checkpoint.dir=runs/a", "checkpoint.resume=runs/a/"]).checkpoint.starts_if_empty
    assert not load_config([], ["checkpoint.dir=runs/a", "checkpoint.resume=runs/b"]).checkpoint.starts_if_empty
    assert not load_config([], ["checkpoint.dir=runs/a"]).checkpoint.starts_if_empty


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(1, 2**31),
        "neox_exact": st.booleans(),
        "data.seq_length": st.integers(1, 4096),
        "data.train": st.lists(
            st.fixed_dictionaries({"path": st.text("ab/ :#'\"\n", min_size=1), "weight": st.floats(1e-9, 1e9)}),
            min_size=1,
        ),
        "optimizer.lr": st.floats(1e-9, 10.0),
        "optimizer.clip_norm": st.none() | st.floats(1e-3, 10.0),
        "tokenizer.path": st.none() | st.text(min_size=1),
        "train.batch_size": st.integers(1, 10**6),
        "checkpoint.steps": st.lists(st.integers(0, 10**6)),
        "generate.prompt_end": st.sampled_from(["\n", "", "yes", "1e3", "null", "- a: b"]),
    },
)


def as_yaml(values: dict[str, object]) -> RunConfig:
    """The config of these values without going through a file."""
    nested: dict[str, dict[str, object]] = {}
    if values.get("neox_exact"):  # which decides what is left open
        values = {"data.holdout": "contiguous", "data.shuffled_passes": None} | values
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        nested.setdefault(section, {})[name] = value
    return RunConfig.model_validate(nested.pop("", {}) | nested)


@given(VALUES)
@settings(max_examples=60)
def test_dumping_and_loading_is_the_identity(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / "dump.yml"
    config = as_yaml(values)
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@given(VALUES.filter(bool), VALUES.filter(bool))  # a file without keys is no config
@settings(max_examples=60)
def test_loading_two_files_is_loading_their_union(tmp_path_factory, first, second):
    folder = tmp_path_factory.getbasetemp()
    files = []
    for name, values in (("first.yml", first), ("second.yml", second)):
        nested: dict[str, object] = {}
        for path, value in values.items():
            section, _, key = path.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[key] = value
        (folder / name).write_text(to_yaml(nested), encoding="utf-8")
        files.append(folder / name)
    assert load_config(files) == as_yaml(first | second)


def test_an_empty_section_is_one_with_its_defaults(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("log: {profile: {}}\nfinetune: {lora: {rank: 4}}\noptimizer: {}\n")
    config = load_config(file, ["finetune.lora={}"])
    assert config.log.profile is not None and config.log.profile.start == 10
    assert config.finetune.lora is not None and config.finetune.lora.rank == 4
    assert load_config([config], ["finetune.lora=null"]).finetune.lora is None
    assert load_config([], []).finetune.lora is None


def test_keys_that_a_program_chose_have_the_origin_that_it_names():
    chosen = mapping_from({"train": {"steps": 5}, "seed": 7, "finetune": {}}, "its default")
    config = load_config([chosen], ["seed=8"])
    assert (config.train.steps, config.seed) == (5, 8)
    assert config.origins["train.steps"] == "its default"
    assert config.origins["seed"] == "command line, replacing its default"
    with pytest.raises(ConfigError, match="^its default: train.steps: -1"):
        load_config([mapping_from({"train": {"steps": -1}}, "its default")])

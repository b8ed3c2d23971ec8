"""NeoX and Megatron-DeepSpeed folders that we write: as the originals write them, and exact in every layout."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import combinations, pairwise
from math import nextafter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.formats.deepspeed.write import cut_stages
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import Checkpoint, Progress
from castalia.config.load import load_config
from castalia.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExpertsConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RopeScaling,
    ScheduleConfig,
    Source,
    TokenizerConfig,
    TrainConfig,
)  # fmt: skip
from castalia.data.dataset_writer import DatasetWriter
from castalia.data.tokenizer import train_bpe
from castalia.errors import CheckpointError
from castalia.examine.verify import verify
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import InMemory
from castalia.storage.torch_file import open_pt
from castalia.storage.unpickle import Inert
from tests.checkpoint.made import assert_same, made, written
from tests.checkpoint.neox_rules import BLOCKS, CHOICES, INTEGERS, LISTS, TEXTS, mistakes

NEOX = [
    "pp0-mp1-dp2-z1-fp16-rotary-par", "pp0-mp1-z0-fp16-rotary-par", "pp0-mp1-z0-fp32-rotary-par",
    "pp1-mp1-dp2-z1-bf16-learned-tied", "pp1-mp1-dp2-z1-fp16-rotary-par", "pp1-mp1-dp2-z1-fp32-rotary-par-nowd",
    "pp1-mp1-dp3-z1-bf16-rotary-par", "pp1-mp1-z0-fp32-learned-tied", "pp1-mp1-z0-fp32-llama",
    "pp1-mp1-z0-fp32-rotary-par", "pp1-mp2-z0-fp32-rotary-par", "pp2-mp1-z0-fp32-rotary-seqres",
    "v1-pp1-mp1-dp2-z1-fp16-rotary-par",
]  # fmt: skip
KINDS = ["moe-sinkhorn1-fp32", "moe-topk2-fp32"]  # of layers, in a folder of their own
MEGATRON = ["megds-pp1-mp1-dp2-z1-bf16", "megds-pp1-mp1-z0-fp32"]
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_heads": 8, "max_positions": 16}
SIZES |= {"vocab_size": 120, "vocab_multiple": 8}
MODELS = {
    "parallel": ModelConfig(**SIZES, rotary_pct=0.5, parallel_residual=True),
    "sequential tied": ModelConfig(**SIZES, position="learned", tie_embeddings=True, activation="gelu", mlp_size=48),
    "llama": ModelConfig(
        **SIZES, norm="rmsnorm", gated_mlp=True, mlp_size=24, activation="silu", num_kv_heads=4, attention_bias=False,
        mlp_bias=False,
    ),
    "gated, biases": ModelConfig(**SIZES, gated_mlp=True, mlp_size=16, activation="silu", num_kv_heads=2, qk_norm=True),
    "shared norm": ModelConfig(**SIZES, position="alibi", parallel_residual=True, shared_norm=True),
    "without parameters": ModelConfig(**SIZES, position="sinusoidal", norm="layernorm_no_params", attention_bias=False),
}  # fmt: skip
OLD = ("parallel", "sequential tied wide", "shared norm")
MODELS["sequential tied wide"] = MODELS["sequential tied"].model_copy(update={"mlp_size": None})
SMALL = MODELS["parallel"].model_copy(update={"num_layers": 1})
BIASES = ("attn.out.bias", "mlp.down.bias")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a reader of another format does not learn, or what is no part of the checkpoint's content.
RANDOM = {"random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states"}


def write(source: Checkpoint, folder: Path, to: str = "neox", era: str = "head", **layout: int) -> Checkpoint:
    """Converted, and opened again."""
    plan = convert.plan_files(to, convert.prepare(source), WriteOptions(TargetLayout(**layout), era))
    convert.write(plan, folder, "mark", lambda count: None, inside="global_step9")
    return open_checkpoint(folder)


def differences(theirs: Any, ours: Any, where: str) -> list[str]:
    """Where two opened files differ in keys, their order aside, in order where it counts, in types or values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = theirs.keys() - RANDOM
        found = [f"{where}: {key} is there once" for key in keys ^ ours.keys()]
        if "param_shapes" in where or "param_slice" in where or where.endswith("/module"):
            found += [f"{where}: order"] if [key for key in theirs if key in keys] != list(ours) else []
        return found + [d for key in keys & ours.keys() for d in differences(theirs[key], ours[key], f"{where}/{key}")]
    if isinstance(theirs, (list, tuple)) and type(theirs) is type(ours) and len(theirs) == len(ours):
        return [d for i, pair in enumerate(zip(theirs, ours, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    if isinstance(theirs, FileTensor) and isinstance(ours, FileTensor):
        same = theirs.dtype == ours.dtype and theirs.shape == ours.shape and torch.equal(theirs.read(), ours.read())
        return [] if same else [f"{where}: tensors"]
    if isinstance(theirs, Inert) and isinstance(ours, Inert):
        return differences([theirs.name, theirs.args, theirs.fields], [ours.name, ours.args, ours.fields], where)
    return [] if theirs == ours else [f"{where}: {theirs!r} {ours!r}"]


def rewritten(variant: str, to: str, fixtures: Path, folder: Path) -> tuple[list[str], Checkpoint, Checkpoint]:
    """A genuine checkpoint written again in its own layout: what differs, what was read, what is read again."""
    collection = "neox-kinds" if variant in KINDS else "neox"
    original = fixtures / collection / variant / "checkpoint" / "global_step5"
    source = open_checkpoint(original)
    known = source.facts
    layout = {"tp": known.tp, "pp": known.pp if known.pipeline_files else 0, "dp": known.dp}
    zero = 1 if "-z1-" in variant else 0
    result = write(source, folder, to, "v1" if variant.startswith("v1") else "head", zero=zero, **layout)
    files = sorted(path.name for path in original.glob("*.pt"))
    assert files == sorted(path.name for path in Path(result.path).glob("*.pt"))
    found = [d for n in files for d in differences(open_pt(original / n), open_pt(Path(result.path) / n), n)]
    return found, source, result


@pytest.mark.parametrize("variant", [*NEOX, *KINDS])
def test_genuine_neox_files_are_reproduced(variant: str, fixtures: Path, tmp_path: Path) -> None:
    """Key by key and bit by bit, except for the states of random generators and options of DeepSpeed's own."""
    found, source, result = rewritten(variant, "neox", fixtures, tmp_path / "a")
    own = ("steps_per_print", "bucket_size", "allgather_partitions", "overlap_comm", "reduce_scatter", "contiguous_gr")
    found = [each for each in found if not ("/ds_config" in each and any(name in each for name in own))]
    if (
        "z0-fp32" in variant or variant in KINDS
    ):  # only the last parameter of a group has the true step there, all have it here
        found = [each for each in found if not each.endswith("/step: 0 5")]
    assert [each for each in found if "ds_version" not in each] == []
    assert_same(source, result)
    configs = [load_config(Path(each.path) / "configs" / "config.yml") for each in (source, result)]
    for section in ("model", "data", "optimizer", "schedule", "parallel", "precision", "seed"):
        assert getattr(configs[0], section) == getattr(configs[1], section)


@pytest.mark.parametrize("variant", MEGATRON)
def test_genuine_megatron_files_are_reproduced(variant: str, fixtures: Path, tmp_path: Path) -> None:
    """The program's arguments aside, and the schedule, which the loop that wrote these did not have."""
    found, source, result = rewritten(variant, "megatron-deepspeed", fixtures, tmp_path / "a")
    unknown = ("/args", "/lr: ", "/lr_scheduler: ", "ds_config", "ds_version", "/step: 0 5", "global_samples")
    assert [each for each in found if not any(name in each for name in unknown)] == []
    assert_same(source, replace(result, progress=replace(result.progress, schedule=None)))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_layout_comes_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    era = data.draw(st.sampled_from(["head", "head", "v1"]))
    kind = data.draw(st.sampled_from(OLD if era == "v1" else sorted(MODELS)))
    model = MODELS[kind]
    zero = data.draw(st.sampled_from([0, 1]))
    dtypes = sorted(DTYPES) if era == "head" else ["fp16"] if zero else ["fp16", "fp32"]
    dtype = DTYPES[data.draw(st.sampled_from(dtypes))]
    tp = data.draw(st.sampled_from([size for size in (1, 2, 4, 8) if model.kv_heads % size == 0]))
    pp, dp = (
        data.draw(st.sampled_from([0, 1, 2, 4] if era == "head" else [0, 1, 2])),
        data.draw(st.sampled_from([1, 2, 3])),
    )
    progress = Progress(step=9, skipped=2, tokens=2048 * 4)
    source = replace(divisible(made(model, dtype=dtype)), progress=progress)
    result = write(source, tmp_path_factory.mktemp("neox") / "a", era=era, tp=tp, pp=pp, dp=dp, zero=zero)
    assert (result.facts.tp, result.facts.pp, result.facts.dp) == (tp, max(1, pp), dp)
    assert result.facts.era == era or not model.gated_mlp
    assert_exact(source, result)


def divisible(source: Checkpoint) -> Checkpoint:
    """With summed biases that no division by a power of two rounds, in fp16 either."""
    model, state = dict(source.model), dict(source.optimizer)
    for name in [name for name in model if name.endswith(BIASES)]:
        value = (state[name]["master"].read() * 64).round() / 64
        model[name] = InMemory(value.to(model[name].dtype))
        state[name] = {**state[name], "master": model[name] if value.dtype == model[name].dtype else InMemory(value)}
    return replace(source, model=model, optimizer=state)


def assert_exact(source: Checkpoint, result: Checkpoint) -> None:
    """All but the size of the vocabulary, which belongs to the tokenizer, and the scaler, which a made one lacks."""
    vocabulary = {"vocab_size": source.config.model.vocab_size, "vocab_multiple": source.config.model.vocab_multiple}
    assert result.config.model.padded_vocab_size == source.config.model.padded_vocab_size
    model = result.config.model.model_copy(
        update={**vocabulary, "init_passes": 1, "mlp_size": source.config.model.mlp_size}
    )
    config = source.config.model_copy(update={"model": model})
    progress = replace(result.progress, loss_scale=None, schedule=None)
    assert_same(source, replace(result, config=config, progress=progress))
    for name in (
        "position",
        "rotary_size",
        "norm",
        "norm_eps",
        "activation",
        "parallel_residual",
        "shared_norm",
        "mlp_width",
    ):
        assert getattr(result.config.model, name) == getattr(source.config.model, name), name


TRAINING = {
    "data": DataConfig(train=(Source(path="corpus"),), seq_length=16),
    "train": TrainConfig(steps=40, batch_size=8, micro_batch_size=1),
    "eval": EvalConfig(every=None),
    "checkpoint": CheckpointConfig(steps=(3,)),
    "optimizer": OptimizerConfig(lr=1e-3),
    "precision": PrecisionConfig(compute="fp16"),
}


def run(model: ModelConfig, dtype: torch.dtype = torch.float16, **changes: Any) -> Checkpoint:
    """A checkpoint of a training run, the tokenizer's file included."""
    source = divisible(made(model, dtype=dtype))
    config = source.config.model_copy(update={**TRAINING, **changes})
    return replace(source, config=config, progress=Progress(step=9, skipped=2, tokens=7 * 8 * 16))


def files_of(
    source: Checkpoint, folder: Path, to: str = "neox", era: str = "head", **layout: int
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Of a folder that is to be: the config's keys, the first model state, what the optimizer files hold."""
    options = WriteOptions(TargetLayout(**layout), era, folder=folder / "global_step9")
    outputs = {o.name: o for o in convert.plan_files(to, convert.prepare(source), options).outputs}
    folder.mkdir(exist_ok=True)

    def opened(name: str) -> Any:
        file = folder / Path(name).name
        outputs[name].write(file, lambda count: None)
        return file.read_bytes() if file.suffix != ".pt" else open_pt(file)

    keys = yaml.safe_load(opened("configs/config.yml")) if to == "neox" else {}
    shards = [opened(name)["optimizer_state_dict"] for name in outputs if name.endswith("optim_states.pt")]
    return keys, opened("mp_rank_00_model_states.pt"), shards


def written_for(source: Checkpoint, folder: Path, to: str = "neox", era: str = "head", **layout: int) -> Checkpoint:
    """As the command does: the files know their folder."""
    inside = folder / "global_step9"
    plan = convert.plan_files(to, convert.prepare(source), WriteOptions(TargetLayout(**layout), era, folder=inside))
    convert.write(plan, folder, "mark", lambda count: None, inside=inside.name)
    return open_checkpoint(folder)


@pytest.mark.parametrize(("kind", "dtype"), list(zip(sorted(MODELS), ["fp16", "bf16", "fp32"] * 3, strict=False)))
def test_neox_accepts_the_config_as_it_is_written(kind: str, dtype: str, tmp_path: Path) -> None:
    """By its own rules: types, required keys, the batch, and the arguments that its checkpoints store."""
    engine = train_bpe(["In the beginning was the word"] * 3, 260)
    engine.save(tmp_path / "words")
    words = TokenizerConfig(path=str(tmp_path / "words" / "tokenizer.json"))
    model = MODELS[kind].model_copy(update={"vocab_size": 260})
    source = run(model, DTYPES[dtype], tokenizer=words, precision=PrecisionConfig(compute=dtype))
    keys, state, _ = files_of(source, tmp_path / "out", tp=2, pp=2, dp=2, zero=1)
    assert mistakes(keys, state["args"]) == []
    assert keys["load"] == keys["save"] == str(tmp_path / "out") and keys["tokenizer_type"] == "HFTokenizer"
    assert keys["vocab_file"] == str(tmp_path / "out" / "global_step9" / "tokenizer" / "tokenizer.json")
    slim, _, _ = files_of(replace(source, optimizer=None), tmp_path / "slim", tp=2)
    assert slim["finetune"] is True and slim["load"] == str(tmp_path / "slim")


def test_the_first_release_is_told_what_it_takes_for_granted_otherwise(tmp_path: Path) -> None:
    """Its head is cut by the hidden size, its weight decay is 0.01, and it does not start with keys of later ones."""
    given = {"log": LogConfig(every=100), "data": DataConfig(seq_length=8, packing="unpacked", allow_chopped=False)}
    source = run(MODELS["parallel"], DTYPES["fp16"], **given)
    keys, _, _ = files_of(source, tmp_path / "a", era="v1", tp=2, zero=1)
    assert keys["output_layer_parallelism"] == "column" and keys["weight_decay"] == 0.1 and keys["log_interval"] == 100
    assert not keys.keys() & {"pack_impl", "allow_chopped", "use_bias_in_mlp", "use_qk_layernorm"}


def test_tokenizers_without_files_are_named(tmp_path: Path) -> None:
    for kind, name in (("char", "CharLevelTokenizer"), ("bytes", "GPT2BPETokenizer")):  # NeoX has no bytes
        keys, state, _ = files_of(run(SMALL, tokenizer=TokenizerConfig(kind=kind)), tmp_path / kind)
        assert keys.get("tokenizer_type", "GPT2BPETokenizer") == state["args"]["tokenizer_type"] == name
        assert "vocab_file" not in keys


def test_the_rules_of_neox_are_those_of_its_list_of_arguments(fixtures: Path) -> None:
    table = fixtures.parent / "reference" / "neox-arguments.tsv"
    if not table.is_file():
        pytest.skip(f"needs the list of arguments beside the fixtures: {table}")
    with table.open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert {name for name in INTEGERS if rows[name]["type"] != "int"} == set()
    assert {name for name in LISTS if rows[name]["type"] != "list"} == set()
    assert {name for name in TEXTS if rows[name]["type"] != "str"} == set()
    assert {name for name in BLOCKS if rows[name]["type"] != "dict"} == set()
    for name, choices in CHOICES.items():
        assert choices | {"infer"} >= set(rows[name]["allowed"].split("|")) >= choices


@pytest.mark.parametrize("kind", ["zero", "flat", "bf16"])
@pytest.mark.parametrize(
    ("release", "norm", "era", "written", "in_files"),
    [
        (None, 1.0, "head", nextafter(1.0, 2.0), nextafter(1.0, 2.0)),  # 1.0 is what its config hands on to nobody
        (None, 0.5, "head", 0.5, 0.5),
        (None, None, "head", 0.0, 0.0),
        ("head", 1.0, "head", 1.0, 0.0),  # a run of the original, which did not clip
        ("head", 0.5, "head", 0.5, 0.5),
        ("head", 1.0, "v1", 0.0, 0.0),
        ("v1", 1.0, "v1", 1.0, 1.0),
        ("v1", 1.0, "head", nextafter(1.0, 2.0), nextafter(1.0, 2.0)),
    ],
)
def test_neox_clips_as_the_run_did(
    release: str | None, norm: float | None, era: str, written: float, in_files: float, kind: str, tmp_path: Path
) -> None:
    if kind == "bf16" and era == "v1":
        return  # the first release has none
    source = run(
        MODELS["parallel"], DTYPES["bf16" if kind == "bf16" else "fp16"], optimizer=OptimizerConfig(clip_norm=norm)
    )
    source = replace(source, release=release)
    keys, state, shards = files_of(source, tmp_path / "a", era=era, zero=int(kind == "zero"))
    assert keys["gradient_clipping"] == written
    if era == "head":
        assert state["ds_config"].get("gradient_clipping", 0.0) == in_files
    found = [shard["clip_grad"] for shard in shards if "clip_grad" in shard]  # old ZeRO has no place for it
    assert found == [in_files] * len(found) and (found or kind != "bf16")
    if kind == "flat":
        assert state["optimizer"]["clip_grad"] == in_files


def test_what_was_never_clipped_stays_so_on_the_way_through_other_formats(fixtures: Path, tmp_path: Path) -> None:
    variant = fixtures / "neox" / "pp1-mp1-dp2-z1-fp16-rotary-par" / "checkpoint"
    for middle in ("native", "hf"):
        keys, state, _ = files_of(written(open_checkpoint(variant), tmp_path / middle, middle), tmp_path / "back")
        assert keys["gradient_clipping"] == 1.0 and "gradient_clipping" not in state["ds_config"]
        assert state["optimizer"]["clip_grad"] == 0.0


@pytest.mark.parametrize(("old", "new"), [(1, 4), (3, 2)])
def test_moments_follow_the_micro_batches_that_a_pipeline_engine_sums(old: int, new: int, tmp_path: Path) -> None:
    """The first moment grows with their number, the second with its square, whatever lies between."""
    config = TrainConfig(steps=40, batch_size=24, micro_batch_size=24 // old)
    source = run(SMALL, torch.float32, train=config, precision=PrecisionConfig(compute="fp32"))
    first = written_for(source, tmp_path / "first", pp=1)
    assert first.summed_micro_batches == old
    train = TrainConfig(steps=40, batch_size=24, micro_batch_size=24 // new)
    middle = first
    for to in ("native", "hf"):
        middle = written(middle, tmp_path / f"{to}{middle.format}", to)
        assert middle.summed_micro_batches == old
    middle = replace(middle, config=middle.config.model_copy(update={"train": train}))
    second = written_for(middle, tmp_path / "second", pp=1, tp=2)
    plain = written_for(middle, tmp_path / "plain", pp=0, dp=2, zero=1)
    assert (second.summed_micro_batches, plain.summed_micro_batches) == (new, 1)
    assert verify(middle, second).holds and verify(first, plain).holds
    for name, state in source.optimizer.items():
        for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            for result, number in ((first, old), (second, new), (plain, 1)):
                expected, found = state[kind].read() * number**power, result.optimizer[name][kind].read()
                assert torch.allclose(found, expected, rtol=1e-6, atol=0), (name, kind, number)


def test_a_change_of_the_moments_is_said(tmp_path: Path) -> None:
    source = run(MODELS["parallel"], train=TrainConfig(steps=40, batch_size=8, micro_batch_size=2))
    notes = convert.plan_files("neox", source, WriteOptions(TargetLayout(pp=1))).notes
    assert [note for note in notes if note.startswith("Adam's moments are multiplied by 4 and its square")]
    assert not [n for n in convert.plan_files("neox", source, WriteOptions(TargetLayout(pp=0))).notes if "moments" in n]
    again = write(source, tmp_path / "a", pp=1)
    assert not [n for n in convert.plan_files("neox", again, WriteOptions(TargetLayout(pp=2))).notes if "moments" in n]


def test_other_data_that_neox_would_go_on_with_are_said(tmp_path: Path) -> None:
    prefix = str(tmp_path / "words")
    with DatasetWriter(prefix, "uint16") as writer:
        for number in range(20):
            writer.add([number] * 8)  # 160 tokens; a step reads 8 samples of 16

    def notes(steps: int, **data: Any) -> str:
        source = run(SMALL, data=DataConfig(seq_length=16, **data), train=TrainConfig(steps=steps, batch_size=8))
        planned = convert.plan_files("neox", source, WriteOptions(TargetLayout())).notes
        return "\n".join(note for note in planned if note.startswith("data."))

    by_hash, orders = "data.holdout=hash holds out", "data.shuffled_passes=16: NeoX shuffles all passes"
    whole = {"path": prefix, "split": "1, 0, 0"}
    assert by_hash in notes(19, path=prefix) and orders not in notes(19, **whole)
    assert notes(19, **whole, holdout="contiguous") == ""  # 19 x 8 x 16 tokens are 15.2 passes
    assert "this run takes more of them" in notes(21, **whole, holdout="contiguous")
    assert notes(21, **whole, holdout="contiguous", shuffled_passes=None) == ""
    sources = {"train": (Source(path=prefix),), "valid": (Source(path=prefix),)}
    assert notes(19, **sources) == "" and "this run takes more of them" in notes(21, **sources)
    assert "its data are not here" in notes(21, path="gone", holdout="contiguous")


def test_a_runs_own_notes_stay_out_of_the_originals_files(tmp_path: Path) -> None:
    rates = {"start_lr": 1e-3, "warmup_iter": 0.5, "end_iter": 40, "decay_style": "cosine", "min_lr": 0.0}
    source = run(MODELS["sequential tied"])
    source = replace(source, progress=replace(source.progress, schedule={**rates, "release": "head", "x": 1}))
    for to in ("neox", "megatron-deepspeed"):
        state = files_of(source, tmp_path / to, to)[1]
        stored = state["lr_scheduler"]
        assert not {"release", "summed_bias_ranks", "summed_micro_batches", "x"} & stored.keys()
        assert len(stored) == (6 if to == "neox" else 8)
    args = state["args"].fields
    assert (args["lr_warmup_fraction"], stored["warmup_steps"]) == (0.5 / 40, 0.5 * 8)


def test_megatrons_schedule_counts_samples(tmp_path: Path) -> None:
    """`AnnealingLR`, whose steps DeepSpeed's pipeline engine makes as large as the batch."""
    schedule = ScheduleConfig(style="linear", warmup_steps=4, decay_steps=30, min_lr=1e-5)
    source = run(MODELS["sequential tied"], schedule=schedule, optimizer=OptimizerConfig(lr=1e-3, clip_norm=1.0))
    result = written_for(source, tmp_path / "a", "megatron-deepspeed", dp=2, zero=1)
    state = open_pt(Path(result.path) / "mp_rank_00_model_states.pt")
    assert state["lr_scheduler"] == {
        "max_lr": 1e-3, "warmup_steps": 4 * 8, "num_steps": 7 * 8, "warmup_tokens": 0, "num_tokens": 7 * 8 * 16,
        "decay_style": "linear", "decay_steps": 30 * 8, "min_lr": 1e-5,
    }  # fmt: skip
    args = state["args"].fields
    assert (args["lr_warmup_iters"], args["lr_decay_iters"], args["lr_warmup_fraction"]) == (4, 30, None)
    assert (args["clip_grad"], args["consumed_train_samples"]) == (1.0, 56)
    assert result.progress.schedule == {
        "start_lr": 1e-3, "warmup_iter": 4, "num_iters": 7, "decay_style": "linear", "end_iter": 30, "min_lr": 1e-5,
    }  # fmt: skip
    assert result.summed_micro_batches == 4
    for section in ("optimizer", "schedule"):
        assert getattr(result.config, section) == getattr(source.config, section)
    assert result.config.train.steps == 40 and result.config.precision.compute == "fp16"


def test_megatron_finds_the_end_of_documents_in_the_written_tokenizer(tmp_path: Path) -> None:
    """It opens the folder with `AutoTokenizer` and fails without an `eos_token`, which tokenizer.json does not name."""
    engine = train_bpe(["In the beginning was the word"] * 3, 260)
    engine.save(tmp_path / "words")
    words = TokenizerConfig(path=str(tmp_path / "words" / "tokenizer.json"))
    model = MODELS["sequential tied"].model_copy(update={"vocab_size": 260})
    result = written_for(run(model, tokenizer=words), tmp_path / "a", "megatron-deepspeed")
    args = open_pt(Path(result.path) / "mp_rank_00_model_states.pt")["args"].fields
    folder = Path(args["tokenizer_name_or_path"])
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "words" / "tokenizer.json").read_bytes()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token"] == "<|endoftext|>" and args["tokenizer_type"] == "PretrainedFromHF"


def test_small_biases_of_fp16_round(tmp_path: Path) -> None:
    """By less than half of the smallest number on each rank; the masters stay exact."""
    source = made(MODELS["parallel"], dtype=torch.float16, scale=0.001)
    assert [
        note for note in convert.plan_files("neox", source, WriteOptions(TargetLayout(tp=4))).notes if "rounds" in note
    ]
    result = write(source, tmp_path / "a", tp=4)
    proof = verify(source, result)
    assert proof.holds and 0 < proof.rounded <= 8 and "has rounded, as it must" in str(proof)
    for name in source.model:
        error = (source.model[name].read().double() - result.model[name].read()).abs().max()
        assert error <= (4 * 2**-25 if name.endswith(BIASES) else 0)
        assert torch.equal(source.optimizer[name]["master"].read(), result.optimizer[name]["master"].read())


def test_weights_cast_to_fp16_are_proved_against_their_masters(tmp_path: Path) -> None:
    """Casting rounds once, dividing small biases over the ranks a second time."""
    source = made(MODELS["parallel"], scale=0.001)
    proof = verify(source, write(convert.prepare(source, torch.float16), tmp_path / "a", tp=4))
    assert proof.holds and 0 < proof.rounded <= 8


@pytest.mark.parametrize("kind", ["parallel", "sequential tied"])
def test_an_uneven_bias_and_vocabulary(kind: str, tmp_path: Path) -> None:
    """On three ranks the rows grow by zeros, and summed biases may differ in the last bit."""
    model = MODELS[kind].model_copy(update={"num_heads": 6, "hidden_size": 48, "mlp_size": None})
    source = made(model)
    plan = convert.plan_files("neox", source, WriteOptions(TargetLayout(tp=2, pp=1)))
    assert not [note for note in plan.notes if "rows" in note or "rounds" in note]
    result = write(source, tmp_path / "a", tp=3, pp=2)
    assert verify(source, result).holds
    embedding, before = result.model["embed.weight"].read(), source.model["embed.weight"].read()
    assert embedding.shape[0] % 3 == 0 and torch.equal(embedding[:120], before) and not embedding[120:].any()
    for name, ref in source.model.items():
        if name.endswith(BIASES):
            assert (ref.read() - result.model[name].read()).abs().max() <= ref.read().abs().max() * 2**-22
        elif name not in ("embed.weight", "head.weight"):
            assert torch.equal(ref.read(), result.model[name].read())


def test_layer_files_are_plain_for_torch(tmp_path: Path) -> None:
    result = write(made(MODELS["llama"], dtype=torch.bfloat16), tmp_path / "a", tp=2, pp=2)
    files = sorted(Path(result.path).glob("layer_*"))
    assert len(files) == 2 * (4 + 3)
    layer = torch.load(files[2], weights_only=True)
    assert list(layer) == [
        "input_layernorm.scale", "attention.query_key_value.weight", "attention.dense.weight",
        "post_attention_layernorm.scale", "mlp.linear1.weight", "mlp.linear2.weight",
    ]  # fmt: skip
    assert {tensor.dtype for tensor in layer.values()} == {torch.bfloat16}
    assert (tmp_path / "a" / "latest").read_bytes() == b"global_step9"


def test_the_same_every_time_and_without_optimizer(tmp_path: Path) -> None:
    source = made(MODELS["parallel"], dtype=torch.float16)
    folders = [Path(write(source, tmp_path / name, tp=2, pp=2, dp=2, zero=1).path) for name in "ab"]
    for path in folders[0].rglob("*"):
        assert path.is_dir() or path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes()
    slim = write(replace(source, optimizer=None), tmp_path / "slim", tp=2, pp=2, dp=2, zero=1)
    assert slim.optimizer is None and not list(Path(slim.path).glob("*zero*"))
    assert torch.equal(slim.model["head.weight"].read(), source.model["head.weight"].read())


def test_a_tied_embedding_is_first_on_both_ends(tmp_path: Path) -> None:
    result = write(made(MODELS["sequential tied"], dtype=torch.bfloat16), tmp_path / "a", pp=2, dp=1)
    for rank in (0, 1):
        shapes = open_pt(Path(result.path) / f"mp_rank_{rank:02d}_model_states.pt")["param_shapes"][0]
        first = ["tied_modules.embed.word_embeddings.weight", "tied_modules.embed.position_embeddings.weight"]
        assert list(shapes)[:2] == first and len([name for name in shapes if name.startswith("tied")]) == 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"rope_scaling": RopeScaling(kind="linear", factor=2.0)}, {}, r"NeoX cannot hold model\.rope_scaling"),
        ({"activation": "sigmoid"}, {}, r"NeoX cannot hold model\.activation=sigmoid"),
        ({"qk_norm": "head"}, {}, r"NeoX cannot hold model\.qk_norm=head"),
        ({"experts": ExpertsConfig(count=4, router="balanced")}, {}, r"NeoX cannot hold model\.experts\.router=bal"),
        ({"norm": "rmsnorm", "rms_eps_inside": False}, {}, r"NeoX cannot hold model\.rms_eps_inside=False"),
        ({"embedding_dropout": 0.1}, {}, r"NeoX cannot hold model\.embedding_dropout=0.1"),
        ({"num_kv_heads": 2}, {"layout": TargetLayout(tp=4)}, "2 key/value heads do not divide over tp=4"),
        ({"num_kv_heads": 2}, {"era": "v1"}, r"the first release has no model\.num_kv_heads=2"),
        ({}, {"layout": TargetLayout(pp=4), "era": "v1"}, "leave one of pp=4 stages without layers"),
        ({}, {"layout": TargetLayout(pp=6)}, "4 blocks are too few for pp=6"),
        ({}, {"layout": TargetLayout(zero=1), "era": "v1"}, "the first release has no float32 files with ZeRO"),
    ],
)
def test_what_neox_cannot_hold_is_named(change: dict, options: dict, message: str) -> None:
    source = made(MODELS["parallel"].model_copy(update=change))
    with pytest.raises(CheckpointError, match=message):
        convert.plan_files("neox", source, WriteOptions(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_embeddings": False}, r"model\.tie_embeddings=False \(only True\)"),
        ({"parallel_residual": True}, r"model\.parallel_residual=True"),
        ({"activation": "relu"}, r"model\.activation=relu \(only gelu or gelu_tanh\)"),
    ],
)
def test_what_megatron_cannot_hold_is_named(change: dict, message: str) -> None:
    source = made(MODELS["sequential tied"].model_copy(update=change))
    with pytest.raises(CheckpointError, match=f"Megatron-DeepSpeed cannot hold .*{message}"):
        convert.plan_files("megatron-deepspeed", source, WriteOptions())


@pytest.mark.parametrize(
    ("gated", "dtype", "layout"),
    [
        (False, "fp32", {"tp": 2, "pp": 2}),
        (True, "bf16", {"tp": 2, "pp": 3, "dp": 2}),
        (False, "fp16", {"tp": 4, "dp": 3, "zero": 1}),
    ],
)
def test_megatron_layouts_come_back(layout: dict, dtype: str, gated: bool, tmp_path: Path) -> None:
    model = MODELS["sequential tied"].model_copy(update={"gated_mlp": gated, "activation": "gelu"})
    source = replace(made(model, dtype=DTYPES[dtype]), progress=Progress(step=9, skipped=2, tokens=4096))
    result = write(source, tmp_path / "a", "megatron-deepspeed", **layout)
    assert result.format == "megatron-deepspeed"
    assert_exact(source, result)


def test_state_that_has_no_place_is_refused(tmp_path: Path) -> None:
    source = made(MODELS["parallel"])
    steps = {name: {**state, "step": 8 if name == "head.weight" else 7} for name, state in source.optimizer.items()}
    with pytest.raises(CheckpointError, match=r"Adam steps of the tensors differ \(\[7, 8\]\)"):
        convert.plan_files("neox", replace(source, optimizer=steps), WriteOptions())
    name = "blocks.1.mlp.up.weight"
    other = {**source.optimizer, name: {**source.optimizer[name], "master": InMemory(source.model[name].read() + 1)}}
    with pytest.raises(CheckpointError, match=f"{name} is not equal to its fp32 master"):
        write(replace(source, optimizer=other), tmp_path / "a")


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [6, 11])
@pytest.mark.parametrize("era", ["head", "v1"])
def test_stages_are_balanced(layers: int, stages: int, era: str) -> None:
    weights = [0, 1, *[1] * layers, 1, 0, 0]
    ranges = cut_stages(weights, stages, era)
    assert all(ranges) and [position for each in ranges for position in each] == list(range(len(weights)))
    heaviest = max(sum(weights[position] for position in each) for each in ranges)
    possible = [(0, *cuts, len(weights)) for cuts in combinations(range(1, len(weights)), stages - 1)]
    assert heaviest == min(max(sum(weights[a:b]) for a, b in pairwise(cuts)) for cuts in possible)


def test_the_20b_models_stages() -> None:
    """Stages of the first release are filled up, those of today are even."""
    weights = [0, 1, *[1] * 44, 1, 0, 0]
    assert [sum(weights[i] for i in each) for each in cut_stages(weights, 4, "v1")] == [12, 12, 12, 10]
    assert sorted(sum(weights[i] for i in each) for each in cut_stages(weights, 4, "head")) == [11, 11, 12, 12]

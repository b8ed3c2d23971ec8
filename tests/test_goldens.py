"""What users see and get, compared with what is recorded: configs, plans, error texts, converted files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.tensors import AdamState, Checkpoint
from castalia.cli.config import changes, explain
from castalia.cli.main import build
from castalia.config.fields import FIELDS, SECTIONS
from castalia.config.load import load_config, preset_names
from castalia.config.neox.keys import FORMER, KEYS
from castalia.config.schema import FinetuneConfig, LoraConfig, MuPConfig, OptimizerConfig, RunConfig
from castalia.config.tensor_table import all_shapes, in_order, local_size, tp_dim
from castalia.errors import CheckpointError, ConfigError
from castalia.model.init import neox_matrices, seeded_tensor
from castalia.plan.devices import parse_gpus
from castalia.plan.run_plan import Hardware, RunFacts, report
from castalia.storage.lazy import InMemory
from castalia.train.optimizer import make_optimizer
from tests.checkpoint.made import FAMILIES, made
from tests.error_texts import error_texts
from tests.goldens import Goldens

ROOT = Path(__file__).parents[1]
OURS = [*preset_names(), *(f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.yml")))]
CASES = {  # of each family: target, dtype of the weights, layout
    "hf fp32": ("hf", torch.float32, TargetLayout()),
    "hf bf16": ("hf", torch.bfloat16, TargetLayout()),
    "native fp32": ("native", torch.float32, TargetLayout()),
    "native bf16": ("native", torch.bfloat16, TargetLayout()),
    "neox fp32 tp2": ("neox", torch.float32, TargetLayout(tp=2)),
    "neox bf16 pp2 dp2 zero1": ("neox", torch.bfloat16, TargetLayout(pp=2, dp=2, zero=1)),
    "neox fp16 pp0": ("neox", torch.float16, TargetLayout(pp=0)),
    "megatron bf16 tp2 dp2 zero1": ("megatron-deepspeed", torch.bfloat16, TargetLayout(tp=2, dp=2, zero=1)),
}


def output(*words: str) -> str:
    """What a verb says in a terminal."""
    result = CliRunner().invoke(build(words[0]), list(words))
    return result.output if result.exception is None else f"{type(result.exception).__name__}: {result.exception}\n"


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Origins name files as they were given: by names that are the same on each machine."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def digest(content: str | bytes) -> str:
    return sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def test_effective_values_of_our_configs(golden: Goldens) -> None:
    """What differs from a default in each preset and config; the defaults themselves are the same for all."""
    lines = ["# every default", *output("config", "show", "neox_exact=false").splitlines()]
    with inside(ROOT):
        for name in OURS:
            lines += [f"# {name}", *chosen_values(name)]
    golden.check_lines("configs", [" ".join(line.split()) for line in lines])


def chosen_values(name: str) -> list[str]:
    """What `config show` says beside the defaults."""
    return [line for line in output("config", "show", name).splitlines() if not line.startswith("  ")]


def test_effective_values_of_genuine_configs(golden: Goldens, fixtures: Path) -> None:
    found = sorted((fixtures / "configs").glob("*.yml"))
    assert found
    for path in [*found, *sorted(fixtures.glob("*/*/checkpoint/*/configs/*.yml"))]:
        with inside(path.parent):
            values = [line for line in chosen_values(path.name) if line.startswith("* ")]
            said = notes_or_refusal(path.name)
        golden.check("genuine_configs", str(path.relative_to(fixtures)), digest("\n".join([*values, *said])))


def notes_or_refusal(name: str) -> list[str]:
    """All that is said of a config's keys, which `config show` shortens."""
    try:
        return load_config(name).notes
    except ConfigError as error:
        return [str(error)]


def test_explanation_of_every_key(golden: Goldens) -> None:
    found = {}
    for key in sorted({*FIELDS, *SECTIONS, *KEYS, *FORMER}):
        with redirect_stdout(StringIO()) as shown:
            explain(key)
        found[key] = digest(shown.getvalue())[:12]
    golden.check("explanations", "config explain", found)


@pytest.mark.parametrize("gpus", [None, "8xH100", "96x40GB"])
def test_plans(golden: Goldens, gpus: str | None) -> None:
    hardware = None
    if gpus:
        number, device, _ = parse_gpus(gpus)
        hardware = Hardware(number, device)
    for name in preset_names():
        words = ["train.batch_size=96", "data.path=corpus", "train.steps=1000"]
        if load_config(name).model.vocab_size is None:
            words.append("model.vocab_size=50257")
        golden.check(
            "plans", f"{name} {gpus}", numbers(report(load_config(name, words), RunFacts(), hardware).as_json())
        )


def numbers(plan: dict[str, Any]) -> dict[str, Any]:
    """The totals, which a review reads, and a digest of each part with all of its numbers."""
    totals = {
        "total parameters": plan["parameters"]["total"],
        "bytes of a rank": plan["memory"]["largest"],
        "bytes of a host": plan["host_memory"]["total"],
        "seconds of a step": plan["time"] and plan["time"]["seconds_per_step"],
    }
    return totals | {name: digest(repr(part))[:8] for name, part in plan.items()}


def test_error_texts(golden: Goldens) -> None:
    golden.check_lines("errors", error_texts())


TENSOR_FAMILIES = FAMILIES | {
    "qk norm": FAMILIES["gpt_neox"].model_copy(update={"qk_norm": True}),
    "scalenorm": FAMILIES["gpt_neox"].model_copy(update={"norm": "scalenorm", "shared_norm": True}),
    "norms without parameters": FAMILIES["gpt_neox"].model_copy(update={"norm": "layernorm_no_params"}),
    "reward model": FAMILIES["llama"].model_copy(update={"reward_head": True}),
    "muP": FAMILIES["gpt2 untied"].model_copy(update={"mup": MuPConfig(base_width=8, init_scale=1.5)}),
    "muP with wang_init": FAMILIES["llama"].model_copy(
        update={"mup": MuPConfig(base_width=16), "init_method": "small_init", "output_init_method": "wang_init"}
    ),
}


@pytest.mark.parametrize("family", TENSOR_FAMILIES)
def test_facts_of_every_tensor(golden: Goldens, family: str) -> None:
    """Shape, split, initial values, and the optimizer's groups."""
    model = TENSOR_FAMILIES[family]
    shapes = all_shapes(model, FinetuneConfig(lora=LoraConfig(rank=4)))
    facts = {}
    for name in in_order(list(shapes)):
        shape = shapes[name]
        init = digest(seeded_tensor(model, 7, name, shape).numpy().tobytes())[:12]
        facts[name] = f"{list(shape)} split {tp_dim(name)}, {local_size(name, shape, 2)} of 2 ranks, init {init}"
    neox = model.model_copy(update={"init": "neox"})
    for name, matrix in neox_matrices(neox, 7) if not model.reward_head else ():
        facts[name] += f", neox {float(matrix.std()):.4g}"
    parameters = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    for optimizer in ("adamw", "muon", "sgd"):
        made = make_optimizer(
            parameters,
            OptimizerConfig(name=optimizer, weight_decay=0.1, layer_decay=0.5),
            summed_bias_ranks=2,
            width_multiplier=model.width_multiplier,
            num_layers=model.num_layers,
        )
        names = {parameter: name for name, parameter in parameters.items()}
        for group in made.param_groups:
            kind = "momentum" if "momentum" in group else "adam"
            for parameter in group["params"]:
                facts[names[parameter]] += (
                    f", {optimizer} by {kind} {group['weight_decay']:.4g} {group['lr_scale']:.4g}"
                )
    golden.check("tensors", family, facts)


def exact(source: Checkpoint) -> Checkpoint:
    """Values that are the same on every CPU: whole numbers over a power of two, which its dtypes hold as they are."""
    draw = torch.Generator().manual_seed(0)

    def held(like: Any, dtype: torch.dtype, least: int = -120) -> InMemory:
        return InMemory((torch.randint(least, 120, tuple(like.shape), generator=draw) / 512).to(dtype))

    model = {name: held(ref, ref.dtype) for name, ref in source.model.items()}
    state = {
        name: AdamState(
            master=InMemory(ref.read().float()),
            exp_avg=held(ref, torch.float32),
            exp_avg_sq=held(ref, torch.float32, 0),
            step=7,
        )
        for name, ref in model.items()
    }
    return replace(source, model=model, optimizer=state)


def written_files(source: Checkpoint, to: str, folder: Path, layout: TargetLayout) -> dict[str, str] | str:
    """The first digits of each file's digest, or why this model cannot be written so."""
    try:
        plan = convert.plan_files(to, convert.prepare(source), WriteOptions(layout=layout))
    except CheckpointError as error:
        return str(error)
    convert.write(plan, folder, "mark", lambda count: None)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest(lasting(path))[:16] for path in files}


def lasting(path: Path) -> bytes:
    """A file's content without versions of programs, and of a config without the defaults, which have a record."""
    content = path.read_bytes()
    if path.name not in ("manifest.json", "castalia.json"):
        return content
    value = json.loads(content)
    told = {name: part for name, part in value.items() if name not in ("versions", "crc32")}
    return json.dumps(told | {"config": changes(RunConfig.model_validate(value["config"]))}).encode()


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_files(golden: Goldens, family: str, tmp_path: Path) -> None:
    for number, (case, (to, dtype, layout)) in enumerate(CASES.items()):
        source = exact(made(FAMILIES[family], dtype=dtype))
        golden.check("conversions", f"{family}: {case}", written_files(source, to, tmp_path / str(number), layout))


def test_files_converted_from_genuine_checkpoints(golden: Goldens, fixtures: Path, tmp_path: Path) -> None:
    variants = sorted(path.parent for path in (fixtures / "neox").glob("*/checkpoint"))
    assert len(variants) >= 15
    with inside(fixtures):
        for variant in variants:
            source = open_checkpoint(f"neox/{variant.name}/checkpoint", tokenizer="neox/data/tok.json")
            for to in ("native", "hf", "neox"):
                found = written_files(source, to, tmp_path / variant.name / to, TargetLayout())
                golden.check("genuine_conversions", f"{variant.name}: {to}", found)

"""`castalia convert`: a checkpoint in another format, with its optimizer state, and the proof that it is the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.bars import progress
from castalia.cli.render import say
from castalia.strict_json import to_json
from castalia.units import file_size, plural

if TYPE_CHECKING:
    import torch

    from castalia.checkpoint.file_plan import Plan, TargetLayout
    from castalia.checkpoint.tensors import Checkpoint
    from castalia.examine.verify import Proof


GGUF_TYPES: dict[str, Literal["f32", "f16", "bf16", "q8_0"]] = {  # ggml's name of each dtype
    "fp32": "f32", "fp16": "f16", "bf16": "bf16", "bfloat16": "bf16", "float16": "f16", "f32": "f32", "f16": "f16",
    "q8_0": "q8_0",
}  # fmt: skip
HOLD = {"gguf": "GGUF holds a model and its tokenizer", "rwkv": "RWKV's own files hold a model"}  # and nothing else


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a run, or a checkpoint of any format")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="the folder to be written; of gguf and rwkv, the file")],
    to: Annotated[
        Literal["native", "hf", "neox", "megatron-deepspeed", "peft", "gguf", "rwkv"],
        typer.Option(help="the format of DST; peft: adapters alone, which all others merge"),
    ],
    layout: Annotated[
        str | None, typer.Option(help="ranks of the files, as tp=2,pp=4,dp=8,zero=1; pp=0: no pipeline layout")
    ] = None,
    era: Annotated[Literal["v1", "head"] | None, typer.Option(help="of NeoX's files; default: head")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "f32", "f16", "q8_0"] | None,
        typer.Option(
            help="of the weights; default: as stored; of a run's own checkpoints: as the run computes. f32 and f16 are "
            "other names of fp32 and fp16; q8_0, for gguf: 8 bits and a scale for 32 values"
        ),
    ] = None,
    allow_inf: Annotated[
        bool, typer.Option("--allow-inf", help="let values that are too large for --dtype become infinite")
    ] = False,
    optimizer: Annotated[bool, typer.Option("--optimizer/--no-optimizer", help="with masters and moments")] = True,
    trainer: Annotated[
        bool,
        typer.Option("--trainer", help="hf: the optimizer in the files of transformers' Trainer; all steps of SRC"),
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="run both on probe tokens and compare all tensors")] = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="most that --verify may use, such as 4GB; default: as little as it can"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written, and stop")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace DST")] = False,
    all_steps: Annotated[bool, typer.Option("--all-steps", help="one folder in DST for each step of SRC")] = False,
    steps: Annotated[str | None, typer.Option(help="with --all-steps: only these, as 0,1,2,4")] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    config: Annotated[str | None, typer.Option(help="training config, where none lies with the files")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file, where SRC has none")] = None,
    base: Annotated[str | None, typer.Option(help="the model of an adapter that does not name it")] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="gguf: print a Modelfile for Ollama")] = False,
    gqa_rows: Annotated[Literal["old", "new"] | None, typer.Option(help="NeoX: order of grouped queries")] = None,
    rms_eps: Annotated[Literal["inside", "outside"] | None, typer.Option(help="NeoX: place of the epsilon")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object at the end, all else on standard error")] = False,
) -> None:
    """Write a checkpoint in another format: weights, optimizer state, step, config and tokenizer.

    \b
    Examples:
      castalia convert runs/first model-hf --to hf --verify
      castalia convert runs/first model-neox --to neox --layout tp=2,pp=2
      castalia convert runs/first trainer --to hf --trainer
      castalia convert runs/first model.gguf --to gguf --dtype q8_0 --verify

    DST appears when it is complete. If the command is interrupted, run it again: it continues where it stopped.
    """
    from castalia.checkpoint import convert
    from castalia.checkpoint.file_plan import WriteOptions
    from castalia.checkpoint.formats import TARGETS, TRAINER_FOLDER
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.cli.streaming import memory_bytes
    from castalia.errors import ConfigError

    form = TARGETS[to]
    if to != "gguf" and (modelfile or dtype == "q8_0"):
        raise ConfigError(f"{'--modelfile' if modelfile else '--dtype q8_0'} is for --to gguf: leave it out")
    if form.file and modelfile and (all_steps or as_json):
        raise ConfigError("--modelfile is printed for one file, and not in JSON: leave out --all-steps and --json")
    if not form.ranks and (layout or era):
        raise ConfigError(f"--to {to} has no ranks and no eras: leave out --layout and --era")
    if memory and not verify:
        raise ConfigError("--memory is what --verify may use; to write takes little of itself: leave it out")
    budget = memory_bytes(memory)
    if all_steps and step is not None:
        raise ConfigError("--all-steps and --step exclude each other; choose steps with --steps")
    if trainer:
        if to != "hf" or not optimizer or dtype not in (None, "fp32", "f32"):
            raise ConfigError(
                "--trainer is for --to hf, with the optimizer state and fp32 weights, as the Trainer has no masters "
                "beside them: leave out --no-optimizer and --dtype"
            )
        all_steps = all_steps or (step is None and bool(_steps_in(source)))
    if steps and not all_steps:
        raise ConfigError("--steps chooses among --all-steps; for one step use --step")
    options = WriteOptions(layout=parse_layout(layout), era=era or "head", trainer=trainer)
    hints: dict[str, Any] = {"config": config, "tokenizer": tokenizer, "base": base}
    hints |= {"gqa_rows": gqa_rows, "rms_eps": rms_eps}

    said: set[str] = set()

    def one(checkpoint: Checkpoint, folder: Path, inside: str = "") -> dict[str, Any]:
        """Plan, write, prove. Returns what was done, for --json."""
        convert.check_destination(Path(checkpoint.path), folder, force, form.file)
        wish = "fp32" if trainer else dtype
        keeps = optimizer and not form.file
        chosen, note = (torch_dtype(wish), "") if wish else convert.own_precision(checkpoint, to, keeps)
        wanted = replace(options, folder=(folder / inside).resolve())
        if to == "gguf" and (wish or chosen):  # norms and biases stay in fp32
            wanted = replace(wanted, gguf_type=GGUF_TYPES[wish or str(chosen).removeprefix("torch.")])
            chosen = torch_dtype("fp32")
        prepared = convert.prepare(checkpoint, chosen, keeps)
        notes = (note,) if note else ()
        if form.file and optimizer and checkpoint.optimizer is not None:
            notes = (*notes, f"{HOLD[to]}: optimizer state and progress are left out")
        plan = convert.plan_files(to, prepared, wanted)
        plan = replace(plan, notes=tuple(note for note in (*notes, *plan.notes) if note not in said))
        said.update(plan.notes)  # a series says once what holds for all its steps
        _describe(checkpoint, plan, folder, inside, with_files=dry_run)
        if verify:
            from castalia.examine.verify import probe_plan

            probe_plan(checkpoint, memory=budget)  # refuses too little before anything is written
        if not dry_run:
            write_plan(plan, folder, convert.identity(prepared, wanted, plan), inside, force, allow_inf, bool(budget))
        proof = _verify(checkpoint, folder, budget, plan.held) if verify and not dry_run else None
        if modelfile:
            from castalia.checkpoint.formats.gguf.modelfile import modelfile_of

            print(modelfile_of(checkpoint, folder), end="")
        return {
            "step": checkpoint.progress.step,
            "path": str(folder),
            "written": not dry_run,
            "files": [] if plan.file else [str(Path(inside, output.name)) for output in plan.outputs],
            "bytes": plan.num_bytes,
            "notes": [*checkpoint.notes, *checkpoint.state_notes, *plan.notes],
            "verified": proof and asdict(proof) | {"holds": proof.holds},
        }

    def each() -> Iterator[dict[str, Any]]:
        """What was done for each checkpoint."""
        if not all_steps:
            checkpoint = open_checkpoint(source, step=step, adapters=form.on_base, **hints)
            yield one(checkpoint, target, form.step_folder.format(step=checkpoint.progress.step) if form.nested else "")
            return
        wanted = _numbers(steps) if steps else None
        folders = convert.steps_of(Path(source), wanted, _steps_in(source))
        for place, (number, folder) in enumerate(folders.items(), 1):
            say(f"step {number}, {place} of {len(folders)}")
            name = (TRAINER_FOLDER if trainer else form.step_folder).format(step=number)
            # Complete steps are passed over, so that an interrupted command continues with the others.
            if (target / name).exists() and not force and not convert.is_unfinished(target / name):
                say(f"{target / name} is there already")
                yield {"step": number, "path": str(target / name), "written": False}
            else:
                yield one(open_checkpoint(folder, adapters=form.on_base, **hints), target / name)
            if not dry_run and not form.file:
                convert.name_latest(target)  # after each step: an interrupted conversion opens, too

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        done = list(each())
    if as_json:
        print(to_json({"source": source, "target": str(target), "format": to, "checkpoints": done}, indent=1))


def _steps_in(source: str) -> dict[int, Path]:
    """The folders of the steps of a series; empty for a single checkpoint. Raises ConfigError where two are of one."""
    from castalia.checkpoint.opener import find_steps
    from castalia.errors import ConfigError
    from castalia.series.members import find_series, folder_of

    if Path(source).is_dir() and (steps := find_steps(source)):
        return steps
    members = [member for member in find_series([source]) if member.path != Path(source)]
    if len({member.step for member in members}) < len(members):
        raise ConfigError(f"{source} holds several checkpoints of one step: {', '.join(each.name for each in members)}")
    return {member.step: folder_of(member.path) for member in members}


def _describe(checkpoint: Checkpoint, plan: Plan, target: Path, inside: str, with_files: bool) -> None:
    from castalia.checkpoint.restore import describe

    say(f"{describe(checkpoint)} -> {target}: {plural(len(plan.outputs), 'file')}, {file_size(plan.num_bytes)}")
    for note in (*checkpoint.notes, *checkpoint.state_notes, *plan.notes):
        say(f"  note: {note}")
    for output in plan.outputs if with_files and not plan.file else ():
        print(f"  {Path(inside, output.name)}  {file_size(output.num_bytes)}")


def write_plan(
    plan: Plan, target: Path, mark: str, inside: str, force: bool, allow_inf: bool, spare: bool = False
) -> None:
    """Write the files with a bar, and say what was written. `spare`: give freed memory back, which is slower."""
    from castalia.checkpoint import convert
    from castalia.machine import keep_freed_memory

    if not spare:
        keep_freed_memory()  # each piece is as large as the one before
    started = time.monotonic()
    with progress(plan.num_bytes, in_bytes=True) as advance:
        try:
            kept = convert.write(plan, target, mark, advance, inside=inside, force=force, allow_inf=allow_inf)
        except KeyboardInterrupt:
            print("interrupted; the same command continues after the files that are complete", file=sys.stderr)
            raise
    for name, count in convert.infinite_values(plan).items():
        say(f"  note: {name}: {count} values were too large for their new dtype and became infinite")
    seconds = time.monotonic() - started
    again = f" ({kept} files were complete already)" if kept else ""
    say(f"wrote {target} in {seconds:.1f} s, {file_size(plan.num_bytes / max(seconds, 1e-9))}/s{again}")


def _verify(checkpoint: Checkpoint, target: Path, memory: int | None, held: Checkpoint | None) -> Proof:
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.errors import CheckpointError
    from castalia.examine.verify import verify

    proof = verify(
        checkpoint, open_checkpoint(target), memory, held
    )  # read back from its files, as others will read it
    say(str(proof))
    if not proof.holds:
        raise CheckpointError(f"{target} is written, but it is not the same model: {proof.difference or 'see above'}")
    return proof


def parse_layout(text: str | None) -> TargetLayout:
    """`tp=2,pp=4,dp=8,zero=1`; what is left out is one rank, without ZeRO."""
    from castalia.checkpoint.file_plan import TargetLayout
    from castalia.errors import ConfigError

    values: dict[str, int] = {}
    for entry in (text or "").split(",") if text else ():
        name, _, number = (word.strip() for word in entry.partition("="))
        least = 0 if name in ("pp", "zero") else 1  # pp=0: no pipeline layout
        if name not in ("tp", "pp", "dp", "zero") or not number.isdigit() or int(number) < least:
            raise ConfigError(f"--layout {text}: {entry!r} is not understood; write for instance tp=2,pp=4,dp=8,zero=1")
        values[name] = int(number)
    if values.get("zero", 0) > 1:
        raise ConfigError(
            f"--layout {text}: files of ZeRO stage {values['zero']} are not written; use zero=0 or zero=1"
        )
    return TargetLayout(**values)  # type: ignore[arg-type]


def _numbers(text: str) -> list[int]:
    from castalia.errors import ConfigError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise ConfigError(f"--steps {text}: give numbers separated by commas")
    return [int(word) for word in words]


def torch_dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype for fp32, bf16 or fp16; None for None."""
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.float32}
    return names[name] if name else None

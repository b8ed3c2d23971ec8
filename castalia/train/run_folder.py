"""The run's folder: who may write into it, and what makes it complete."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.opener import detect
from castalia.config.batch import pass_multiple
from castalia.config.load import TOKENIZER, dump_config
from castalia.config.schema import RunConfig, Source, TokenizerConfig
from castalia.errors import ConfigError, TrainingError
from castalia.files import write_text
from castalia.observe.metrics import read_events, read_metrics


def run_folder(config: RunConfig) -> Path:
    """Where the run lives. Raises ConfigError if nothing says so."""
    if config.checkpoint.dir:
        return Path(config.checkpoint.dir)
    resume = Path(config.checkpoint.resume or "")
    for folder in (resume, resume.parent, resume.parent.parent):  # a run, its checkpoints, one of them
        if config.checkpoint.resume and is_run(folder):
            return folder
    raise ConfigError("checkpoint.dir is not set: name the folder of the run, for example checkpoint.dir=runs/first")


def continues_in_place(config: RunConfig, folder: Path) -> bool:
    """Whether the run goes on in the folder that it resumes from."""
    if config.checkpoint.resume is None:
        return False
    source, target = Path(config.checkpoint.resume).resolve(), folder.resolve()
    return source == target or target in source.parents


class LauncherJob(NamedTuple):
    """What starts a run, as its events tell it."""

    job: str | None  # the launcher that is running, which starts processes again when one dies
    scheduled: str | None  # the scheduler's job, which starts launchers again when a machine goes
    asked: str  # tells one config from another: a scheduler's job may start several runs


def this_job(launcher: str | None, config: RunConfig) -> LauncherJob:
    """The job of this process; `config` is what its command asks for."""
    asked = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # of torchrun --rdzv-id
    slurm = os.environ.get("SLURM_JOB_ID")
    scheduled = f"slurm {slurm}" if slurm else None if run == "none" else run
    return LauncherJob(launcher, scheduled, hashlib.blake2b(asked.encode(), digest_size=16).hexdigest())


def was_started_by(job: LauncherJob, folder: Path) -> bool:
    """Whether the run in the folder was last started by this job, which is starting it again."""
    starts = [event for event in read_events(folder) if event["event"] == "start"]
    last = starts[-1] if starts else {}
    if job.job is not None and last.get("job") == job.job:
        return True
    same = (last.get("scheduled"), last.get("asked")) == (job.scheduled, job.asked)
    return job.scheduled is not None and same


def is_run(folder: Path) -> bool:
    return (folder / "config.yml").is_file()


def require_run(folder: Path) -> None:
    if not is_run(folder):
        raise TrainingError(f"{folder} holds no run: it has no config.yml")


def holds_checkpoint(folder: Path) -> bool:
    """Whether anything in the folder looks like a checkpoint of any format, whole or not."""
    if not folder.is_dir():
        return False
    named = any((folder / name).exists() for name in ("latest", "checkpoints/latest"))
    steps = any(folder.glob("global_step*")) or any(folder.glob("step_*")) or bool(saved_steps(folder / "checkpoints"))
    return named or steps or detect(folder) is not None


def refuse_second_start(folder: Path) -> None:
    """Raises TrainingError if a new run would begin in a folder that holds one; what died before a step is none."""
    if not holds_checkpoint(folder) and not (is_run(folder) and any(read_metrics(folder))):
        return
    steps = saved_steps(folder / "checkpoints")
    last = f", saved last at step {max(steps)}" if steps else ""
    raise TrainingError(
        f"{folder} holds a run{last}. To go on with it: castalia train {folder} (or checkpoint.resume={folder}). "
        "To begin a new one: set another checkpoint.dir, or move this folder away."
    )


def complete_config(
    config: RunConfig, folder: Path, has_tokenizer: bool, batch_size: int, began_from: str | None = None
) -> RunConfig:
    """The config that goes on from anywhere: data by absolute paths, the tokenizer by the copy in the run.

    A resumed run still says which weights it `began_from`, whose adapters it may train.
    It goes on with any number of ranks, too: the step's batch is settled, and accumulation follows from it.
    """
    return config.with_(
        {
            "data.path": _absolute(config.data.path),
            "data.cache_dir": _absolute(config.data.cache_dir),
            "data.pass_multiple": pass_multiple(config, batch_size),  # the same passes with other micro-batches
            **{f"data.{split}": _absolute_sources(getattr(config.data, split)) for split in ("train", "valid", "test")},
            "tokenizer": TokenizerConfig(path=TOKENIZER) if has_tokenizer else config.tokenizer,
            "checkpoint.dir": str(folder),
            "checkpoint.resume": None,
            "checkpoint.step": None,
            "checkpoint.init_from": config.checkpoint.init_from or began_from,
            "train.batch_size": batch_size,
            "train.accumulation": None if config.train.micro_batch_size else config.train.accumulation,
        }
    )


def write_config(folder: Path, config: RunConfig) -> None:
    write_text(folder / "config.yml", dump_config(config))


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _absolute_sources(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(Source(**_absolute_prefixes(source.model_dump())) for source in sources)


def _absolute_prefixes(values: dict[str, Any]) -> dict[str, Any]:
    """A source's values; all of its texts are prefixes of corpora."""
    changed: dict[str, Any] = {name: os.path.abspath(value) for name, value in values.items() if isinstance(value, str)}
    if values.get("rejected"):
        changed["rejected"] = _absolute_prefixes(values["rejected"])
    return values | changed

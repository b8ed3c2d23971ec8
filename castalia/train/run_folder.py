"""The folder of a run: who may write into it, and the config in it, from which the run can be resumed anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.opener import detect
from castalia.config.batch import pass_multiple
from castalia.config.load import INTERVENTIONS, TOKENIZER, dump_config
from castalia.config.schema import RunConfig, Source, TokenizerConfig
from castalia.errors import ConfigError, TrainingError
from castalia.files import write_bytes, write_text
from castalia.observe.metrics import read_events, read_metrics


def run_folder(config: RunConfig) -> Path:
    """The folder of a config's run. Raises ConfigError if neither checkpoint.dir nor checkpoint.resume names it."""
    if config.checkpoint.dir:
        return Path(config.checkpoint.dir)
    resume = Path(config.checkpoint.resume or "")
    for folder in (resume, resume.parent, resume.parent.parent):  # a run, its checkpoints, one of them
        if config.checkpoint.resume and is_run(folder):
            return folder
    raise ConfigError("checkpoint.dir is not set: name the folder of the run, for example checkpoint.dir=runs/first")


def continues_in_place(config: RunConfig, folder: Path) -> bool:
    """Whether the run resumes a checkpoint that lies in its own folder."""
    if config.checkpoint.resume is None:
        return False
    source, target = Path(config.checkpoint.resume).resolve(), folder.resolve()
    return source == target or target in source.parents


class LauncherJob(NamedTuple):
    """What started a run, as its "start" event records it."""

    job: str | None  # of the running launcher, which restarts processes when one dies
    scheduled: str | None  # of the scheduler, which restarts launchers when a machine fails
    asked: str  # a digest of the config, because a scheduler's job may start several runs


def this_job(launcher: str | None, config: RunConfig) -> LauncherJob:
    """The job of this process, whose command asks for `config`."""
    asked = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return LauncherJob(launcher, _scheduled(), hashlib.blake2b(asked.encode(), digest_size=16).hexdigest())


def _scheduled() -> str | None:
    """What a scheduler's job is called, each time that it starts."""
    if slurm := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {slurm}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # of torchrun --rdzv-id
    if run != "none":
        return run
    # A pod of an indexed Job of Kubernetes calls itself JOB-INDEX, whichever pods it replaces. Other pods draw a name.
    job, dash, index = os.environ.get("HOSTNAME", "").rpartition("-")
    return f"kubernetes {job}" if dash and index == os.environ.get("JOB_COMPLETION_INDEX") else None


def was_started_by(job: LauncherJob, folder: Path) -> bool:
    """Whether the folder's run was last started by this job: then it is being restarted."""
    starts = [event for event in read_events(folder) if event["event"] == "start"]
    last = starts[-1] if starts else {}
    if job.job is not None and last.get("job") == job.job:
        return True
    same = (last.get("scheduled"), last.get("asked")) == (job.scheduled, job.asked)
    return job.scheduled is not None and same


def restart_line(job: LauncherJob, step: int) -> str:
    """What a run that its launcher or scheduler has started again says first: how often, why, and from where."""
    count, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    again = f"started again by {job.scheduled or 'the launcher'}"
    what = f"restart {count} of {most}, because a process died" if count != "0" else again
    return f"{what}: the run {f'continues after step {step:,}' if step else 'begins anew'}"


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run."""
    return (folder / "config.yml").is_file()


def require_run(folder: Path) -> None:
    """Raises TrainingError if the folder holds no run."""
    if not is_run(folder):
        raise TrainingError(f"{folder} holds no run: it has no config.yml")


def holds_checkpoint(folder: Path) -> bool:
    """Whether the folder holds what may be a checkpoint of any format, complete or not."""
    if not folder.is_dir():
        return False
    named = any((folder / name).exists() for name in ("latest", "checkpoints/latest"))
    steps = any(folder.glob("global_step*")) or any(folder.glob("step_*")) or bool(saved_steps(folder / "checkpoints"))
    return named or steps or detect(folder) is not None


def origin(run: Path) -> tuple[int, Path] | None:
    """The step that a branch began after, and the checkpoint of another run that it began with; None for other runs.

    The checkpoint may be gone.
    """
    first = next((event for event in read_events(run) if event["event"] == "start"), None)
    if first is None or not first.get("step") or not first.get("source"):
        return None
    return int(first["step"]), Path(first["source"])


def refuse_second_start(folder: Path) -> None:
    """Raises TrainingError if the folder holds a run. A run that died before its first step does not count."""
    if not holds_checkpoint(folder) and not (is_run(folder) and any(read_metrics(folder))):
        return
    steps = saved_steps(folder / "checkpoints")
    last = f", saved last at step {max(steps)}" if steps else ""
    raise TrainingError(
        f"{folder} holds a run{last}. To continue it: castalia train {folder} (or checkpoint.resume={folder}). "
        "To begin a new one: set another checkpoint.dir, or move this folder away."
    )


def complete_config(
    config: RunConfig, folder: Path, has_tokenizer: bool, batch_size: int, began_from: str | None = None
) -> RunConfig:
    """The config from which the run can be resumed in any directory and on any number of ranks.

    Data have absolute paths; tokenizer and interventions are the copies in the run's folder. The batch size is settled,
    from which accumulation follows on each number of ranks. A resumed run still names the weights that it `began_from`,
    because it may train their adapters.
    """
    return config.with_(
        {
            "data.path": _absolute(config.data.path),
            "data.intervene": INTERVENTIONS if config.data.intervene else None,
            "data.cache_dir": _absolute(config.data.cache_dir),
            "data.pass_multiple": pass_multiple(config, batch_size),  # the same passes with other micro-batches
            **{f"data.{split}": _absolute_sources(getattr(config.data, split)) for split in ("train", "valid", "test")},
            "data.stages": tuple(
                stage.model_copy(update={"train": _absolute_sources(stage.train)}) for stage in config.data.stages
            ),
            "tokenizer": TokenizerConfig(path=TOKENIZER) if has_tokenizer else config.tokenizer,
            "checkpoint.dir": str(folder),
            "checkpoint.resume": None,
            "checkpoint.step": None,
            "checkpoint.init_from": config.checkpoint.init_from or began_from,
            "train.batch_size": batch_size,
            "train.accumulation": None if config.train.micro_batch_size else config.train.accumulation,
        }
    )


def keep_interventions(path: str, folder: Path) -> None:
    """Copies the file of interventions into the run's folder, of which they are a record."""
    target = folder / INTERVENTIONS
    if not (target.exists() and target.samefile(path)):
        write_bytes(target, Path(path).read_bytes())


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes config.yml, which makes the folder a run."""
    write_text(folder / "config.yml", dump_config(config))


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _absolute_sources(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(Source(**_absolute_prefixes(source.model_dump())) for source in sources)


def _absolute_prefixes(values: dict[str, Any]) -> dict[str, Any]:
    """A source's values with absolute paths: all of its strings are prefixes of corpora."""
    changed: dict[str, Any] = {name: os.path.abspath(value) for name, value in values.items() if isinstance(value, str)}
    if values.get("rejected"):
        changed["rejected"] = _absolute_prefixes(values["rejected"])
    return values | changed

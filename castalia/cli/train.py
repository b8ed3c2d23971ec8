"""`castalia train`: start, fine-tune or resume a run."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from os.path import exists
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.machine import importing_torch
from castalia.strict_json import to_json

if TYPE_CHECKING:
    from castalia.config.schema import RunConfig

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="print the header in full: every setting, choice and restored value")
]
RESTARTS = 3  # how often the processes of --nproc are started again when one dies


def command(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...] | RUN", help="files, presets, overrides; or a run")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="everything up to and including one step, and a report; writes nothing")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="number of processes on this machine, one for each rank")
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="with --nproc: a folder for what each process prints, each start and rank apart")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="begin a branch of RUN in this folder, at checkpoint.step=N or its last step")
    ] = None,
    verbose: Verbose = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="one object at the end, as `status` has it; all else on standard error")
    ] = False,
) -> None:
    """Train, fine-tune or resume a run.

    \b
    Examples:
      castalia train run.yml checkpoint.dir=runs/third
      castalia train runs/first

    CONFIG is a YAML file (ours or GPT-NeoX's) or the name of a preset; later ones and KEY=VALUE win. RUN is the folder
    of a run, which continues from its last checkpoint; with --output, in a folder of its own and with other settings.

    A run needs a model, data (data.path, which `castalia data prepare` makes), a tokenizer (tokenizer.path), a batch,
    an end (train.steps) and a folder (checkpoint.dir); set optimizer.lr next. `castalia config check CONFIG` lists what
    is missing, and `castalia config explain KEY` says what a key does.
    """
    from castalia.errors import ConfigError
    from castalia.train.start_checks import find_obstacles, refuse

    configs = configs if output is None else branch_words(configs, output)
    config = read_config(configs)
    if log_dir and (nproc or 1) == 1:
        raise ConfigError("--log-dir is for the processes that --nproc starts; torchrun has --log-dir DIR --tee 3")
    if nproc is not None and nproc > 1:
        from castalia.parallel.launcher import relaunch

        refuse(find_obstacles(config, nproc))  # once, before many processes say the same
        given = {"--dry-run": dry_run, "--verbose": verbose, "--json": as_json}
        arguments = ["train", *configs, *(option for option, wanted in given.items() if wanted)]
        relaunch(nproc, arguments, 0 if dry_run else RESTARTS, log_dir)
    if as_json:
        _tell_as_json(config, dry_run, verbose)
    elif dry_run:
        _rehearse(config, verbose)
    else:
        train(config, verbose)


def _rehearse(config: RunConfig, verbose: bool) -> dict[str, Any]:
    from castalia.train.start_checks import find_obstacles, refuse

    refuse(find_obstacles(config))
    with importing_torch():
        from castalia.train.dry_run import rehearse

    return rehearse(config, verbose)


def _tell_as_json(config: RunConfig, dry_run: bool, verbose: bool) -> None:
    """Print where the run stands when it ends, also when a signal ended it, or what one step showed."""
    from castalia.errors import Stopped
    from castalia.parallel.process_group import is_main
    from castalia.train.run_folder import run_folder
    from castalia.train.status import read_status

    stop: Stopped | None = None
    with redirect_stdout(sys.stderr):
        try:
            if dry_run:
                step = _rehearse(config, verbose)
            else:
                train(config, verbose)
        except Stopped as signal:
            stop = signal
    if is_main():
        print(to_json(step if dry_run else asdict(read_status(run_folder(config))), indent=1))
    if stop:
        raise stop


def train(config: RunConfig, verbose: bool = False) -> str:
    """Train as the config says and return the run's folder."""
    from castalia.train.start_checks import find_obstacles, refuse

    refuse(find_obstacles(config))  # first, because torch takes a second to import
    with importing_torch():
        from castalia.train.loop import train as run

    return str(run(config, verbose))


def read_config(words: list[str], any_batch: bool = False) -> RunConfig:
    """The config of a new run, or the config of a run that continues. `any_batch`: accept one that does not divide."""
    from castalia.config.load import load_config, load_neox_run, load_run, neox_config_files

    files, overrides = split_words(words)
    folder = Path(files[0]) if len(files) == 1 else None
    if folder and (folder / "config.yml").is_file():
        return load_run(folder, overrides, any_batch)
    if folder and folder.is_dir() and neox_config_files(folder):
        return load_neox_run(folder, overrides, any_batch)
    return load_config(files, overrides, any_batch)


def branch_words(words: list[str], folder: Path) -> list[str]:
    """The words for a run that goes on from a step of another one in a folder of its own.

    Its data may be others: what the step before it trained on is in the other run's folder. Raises ConfigError.
    """
    from castalia.errors import ConfigError

    files, overrides = split_words(words)
    if len(files) != 1 or not (Path(files[0]) / "config.yml").is_file():
        raise ConfigError("--output begins a branch: name the folder of one run before it; a new run: checkpoint.dir")
    given = [word for word in overrides if word.startswith("checkpoint.dir=")]
    if given or folder.resolve() == Path(files[0]).resolve():
        raise ConfigError(f"--output {folder} names the branch's folder: another one than the run's, and given once")
    if (folder / "config.yml").is_file():
        raise ConfigError(f"{folder} holds a run; to continue it: castalia train {folder}")
    return [*words, f"checkpoint.dir={folder}", "checkpoint.other_data=true"]


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Files and overrides: a word with an equals sign is an override unless a file has that name."""
    overrides = [word for word in words if "=" in word and not exists(word)]
    return [word for word in words if word not in overrides], overrides

"""Training as Python code calls it: silent, and also of a model object of the library transformers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from castalia.checkpoint.transformers_objects import Savable, fill, save
from castalia.config.schema import RunConfig
from castalia.errors import CastaliaError, ConfigError
from castalia.parallel.rendezvous import world_size
from castalia.train.loop import train
from castalia.train.run_folder import refuse_second_start, run_folder
from castalia.train.start_checks import find_obstacles, refuse

OBJECT = "initial_model"  # in a run's folder: the model object that the run began with


def run_training(config: RunConfig, model: Savable | None = None, *, shows: bool = False) -> Path:
    """Train, resume or fine-tune as the config says, and return the run's folder, which has the figures.

    `model`: begin with this object of transformers, whose weights are the trained ones afterwards; the run keeps a copy
    of those before. `shows`: print what `castalia train` does; otherwise nothing is printed.
    Raises ConfigError and its like where the command prints an error, Stopped where a signal ended the run, which is
    saved.
    """
    if model is None:
        refuse(find_obstacles(config))
    else:
        config = _begun_with(model, config)
    folder = train(config, silent=not shows)
    if model is not None:
        fill(model, folder)
    return folder


def _begun_with(model: Savable, config: RunConfig) -> RunConfig:
    """The config of a run that begins with the object's weights, which are written into its folder.

    Raises ConfigError for all that stands in the way of the run, of which nothing is then left.
    """
    name = type(model).__name__
    if world_size() > 1:
        raise ConfigError(f"a {name} object trains in one process; for several: save_pretrained, checkpoint.init_from")
    for key in ("init_from", "resume"):
        if given := config.at(f"checkpoint.{key}"):
            raise ConfigError(f"checkpoint.{key}={given} and a {name} object are two models to begin with; give one")
    folder = run_folder(config)
    refuse_second_start(folder)
    save(model, folder / OBJECT)
    config = config.with_({"checkpoint.init_from": str(folder / OBJECT)})
    try:
        refuse(find_obstacles(config))
    except CastaliaError:
        rmtree(folder / OBJECT)
        with suppress(OSError):  # what else lies there stays
            folder.rmdir()
        raise
    return config

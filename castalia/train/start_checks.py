"""What stands in the way of a run, found before it starts and all at once.

`castalia train` refuses to start for any of it. `config check`, `plan` and `launch` print it, because a config may be
written on one machine for another. Torch is imported only where a checkpoint or a device has to be looked at. What only
the index of samples shows, such as that a resumed run's data are others, is not known before a run builds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from castalia.config.batch import batch_plan
from castalia.config.check import has_batch, not_given
from castalia.config.input_files import missing_files, nothing_to_load
from castalia.config.schema import RunConfig, Source, Text
from castalia.errors import CastaliaError, ConfigError
from castalia.machine import importing_torch
from castalia.parallel.rank_grid import check_run
from castalia.train.run_facts import refuse_foreign_tokens
from castalia.train.vocabulary import open_tokenizer, vocabulary_sizes

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint

Kind = Literal["error", "not given", "missing here", "in the way"]


class Obstacle(NamedTuple):
    """A reason for which a run would not start. Only an `error` is one on every machine and whatever is added."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def find_obstacles(config: RunConfig, ranks: int | None = None, *, writes: bool = True) -> list[Obstacle]:
    """Everything for which a run would not start, errors first.

    `ranks`: its processes; None: those that a launcher has started. `writes`: the run has a folder.
    """
    obstacles = [Obstacle("missing here", text) for text in missing_files(config)]
    obstacles += [Obstacle("not given", text) for text in _not_given(config, writes)]
    if writes and (config.checkpoint.dir or config.checkpoint.resume):
        _check_folder(config, obstacles)
    with _noted(obstacles, "missing here"):
        _check_device(config)
    settled = _settle(config, obstacles)
    with _noted(obstacles):
        _check_layout(settled, _started_ranks() if ranks is None else ranks)
    for source in _sources(settled):
        with _noted(obstacles):
            _open_corpora(source)
    with _noted(obstacles):
        refuse_foreign_tokens(settled)
    return sorted(dict.fromkeys(obstacles), key=lambda each: each.kind != "error")


def refuse(found: Iterable[Obstacle]) -> None:
    """Raise ConfigError with a line for each finding, if there are any."""
    if texts := [each.text for each in found]:
        raise ConfigError("\n".join(texts))


@contextmanager
def _noted(found: list[Obstacle], kind: Kind = "error") -> Iterator[None]:
    """Adds the errors of a block to the findings, unless they are among them already."""
    try:
        yield
    except CastaliaError as error:
        known = {each.text for each in found}
        if not known.issuperset(str(error).splitlines()):
            found.append(Obstacle(kind, str(error)))


def _not_given(config: RunConfig, writes: bool) -> list[str]:
    wanted = config.checkpoint
    loads = wanted.init_from or wanted.resume  # then the model is the checkpoint's
    missing = [text for text in not_given(config) if not (loads and text.startswith("no model"))]
    named = config.tokenizer.path or config.tokenizer.kind or (config.model and config.model.vocab_size)
    if not (loads or named):
        missing.append("no vocabulary: give tokenizer.path, or model.vocab_size without a tokenizer")
    if writes and not (wanted.dir or wanted.resume):
        missing.append("no folder: checkpoint.dir is not set; name that of the run, such as checkpoint.dir=runs/first")
    return missing


def _started_ranks() -> int:
    if not os.environ.keys() & {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}:
        return 1
    with importing_torch():
        from castalia.parallel.rendezvous import world_size

    return world_size()


def _check_layout(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError where ranks, model and batch do not divide."""
    if ranks > 1:
        check_run(config, ranks)
    elif has_batch(config):
        batch_plan(config, 1)


def _check_device(config: RunConfig) -> None:
    """Raises ConfigError if the config asks for a GPU and there is none."""
    if config.train.device not in ("auto", "cpu"):
        from castalia.train.hardware import choose_device

        choose_device(config.train.device)


def _settle(config: RunConfig, found: list[Obstacle]) -> RunConfig:
    """The config with its model and vocabulary filled in, as far as they are known."""
    if nothing_to_load(config):
        return config
    wanted = config.checkpoint
    starts = wanted.starts_if_empty and not Path(str(wanted.dir)).is_dir()
    path = wanted.init_from or (None if starts else wanted.resume)
    try:
        source = _open_source(config) if path else None
    except CastaliaError as error:
        found.append(Obstacle("error" if Path(str(path)).expanduser().exists() else "missing here", str(error)))
        return config
    if source is None and config.model is None:
        return config
    with _noted(found):
        return _with_vocabulary(config, source)
    return config


def _open_source(config: RunConfig) -> Checkpoint | None:
    from castalia.train.resolve import find_source

    return find_source(config)


def _with_vocabulary(config: RunConfig, source: Checkpoint | None) -> RunConfig:
    """The config with the vocabulary of its tokenizer. Raises a CastaliaError where model, tokenizer and what is to
    train do not fit together."""
    model, plain = config.model, RunConfig()
    if source or config.finetune != plain.finetune or config.train.objective == "reward":
        from castalia.train.resolve import infer_settings

        return infer_settings(config.with_({"train.device": "auto"}), source)[0]  # the device is looked at by itself
    tokenizer = open_tokenizer(config, config.finetune)
    if model is None or (tokenizer is None and model.vocab_size is None):
        return config
    return config.with_({"model": model.with_(vocabulary_sizes(config, model, None, tokenizer, grows=False))})


def _sources(config: RunConfig) -> Iterator[Text]:
    """Each corpus that the config names, if all of its files are there."""
    data = config.data
    single = (Source(path=data.path),) if data.path else ()
    staged = (source for stage in data.stages for source in stage.train)
    for source in (*single, *data.train, *data.valid, *data.test, *staged):
        if all(Path(f"{prefix}.{end}").is_file() for prefix in source.prefixes for end in ("bin", "idx")):
            yield source


def _open_corpora(source: Text) -> None:
    """Raises DataError if a file of the source is damaged, or if labels are not those of its tokens."""
    from castalia.data.config_corpora import open_labels
    from castalia.data.indexed import open_dataset

    corpora = {prefix: open_dataset(prefix) for prefix in source.prefixes}
    open_labels(source, corpora[source.path])


def _check_folder(config: RunConfig, found: list[Obstacle]) -> None:
    """Finds out whether another run is in the folder of this one, and whether it is in use."""
    # Processes that a launcher has restarted find their own run there; whether it is theirs its store says.
    if (
        not Path(config.checkpoint.dir or config.checkpoint.resume or "").is_dir()
        or "TORCHELASTIC_RUN_ID" in os.environ
    ):
        return
    from castalia.checkpoint.formats.native.save import refuse_if_in_use
    from castalia.train.run_folder import continues_in_place, refuse_second_start, run_folder, this_job, was_started_by

    with _noted(found, "in the way"):
        folder = run_folder(config)
        if not (continues_in_place(config, folder) or was_started_by(this_job(None, config), folder)):
            refuse_second_start(folder)
        refuse_if_in_use(folder / "checkpoints")

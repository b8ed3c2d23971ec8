"""Sinks of step records besides metrics.jsonl: TensorBoard, W&B, a CSV table."""

from __future__ import annotations

import csv
import io
import math
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from castalia.config.schema import RunConfig, WandbConfig
from castalia.errors import ConfigError
from castalia.files import write_text

Record = Mapping[str, Any]
COLUMNS = (
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "loss_scale", "skipped",
    "valid_loss", "valid_perplexity",
)  # fmt: skip


class Sink(Protocol):
    """Takes the record of each step."""

    def write(self, record: Record) -> None:
        """Takes one record, whose values may be null or infinite."""

    def close(self) -> None:
        """Writes out what is buffered."""


def open_sinks(config: RunConfig, folder: Path, past: Iterable[Record]) -> list[Sink]:
    """The sinks that the config asks for. `past` are the records of earlier starts of this run."""
    log, sinks = config.log, list[Sink]()
    if log.csv:
        sinks.append(CsvSink(folder / "metrics.csv", past))
    if log.tensorboard:
        sinks.append(TensorBoard(log.tensorboard))
    if log.wandb:
        sinks.append(WeightsAndBiases(log.wandb, folder, config))
    return sinks


class CsvSink:
    """metrics.csv, one line per step."""

    def __init__(self, path: Path, past: Iterable[Record]) -> None:
        # Written anew at each start, because a resumed run drops the records after its checkpoint.
        table = io.StringIO(newline="")
        rows = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
        rows.writeheader()
        rows.writerows(past)
        write_text(path, table.getvalue())
        self.file = open(path, "a", buffering=1, newline="")  # noqa: SIM115 - open as long as the run
        self.rows = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")

    def write(self, record: Record) -> None:
        """Appends a line with the values of COLUMNS."""
        self.rows.writerow(record)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class TensorBoard:
    """Writes scalars for TensorBoard. Raises ConfigError where its package is missing."""

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"log.tensorboard={folder} needs the tensorboard package: pip install 'castalia[tensorboard]' ({error})"
            ) from error
        self.board = SummaryWriter(folder)

    def write(self, record: Record) -> None:
        """Adds each finite value as a scalar of the step."""
        for name, value in values(record).items():
            self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Writes out what is buffered."""
        self.board.close()


class WeightsAndBiases:
    """Logs to Weights & Biases. A resumed run continues under its id, which is kept in the run's folder.

    Raises ConfigError where its package is missing.
    """

    def __init__(self, cfg: WandbConfig, folder: Path, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"log.wandb needs the wandb package: pip install 'castalia[wandb]' ({error})") from error
        # A fixed id lets a resumed run continue the same curves.
        id_file = folder / "wandb.id"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:16])
        self.run = wandb.init(
            project=cfg.project,
            name=cfg.name,
            group=cfg.group,
            entity=cfg.team,
            mode=cfg.mode,
            dir=str(folder),
            id=id_file.read_text().strip(),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(base_url=cfg.host, silent=True) if cfg.host else wandb.Settings(silent=True),
        )

    def write(self, record: Record) -> None:
        """Logs the finite values of the step."""
        self.run.log(values(record), step=record["step"])

    def close(self) -> None:
        """Ends the run's process, which uploads what is left."""
        self.run.finish()


def values(record: Record) -> dict[str, float]:
    """The finite values of a record, which can be plotted."""
    return {
        name: value for name, value in record.items() if name != "step" and value is not None and math.isfinite(value)
    }

"""Repeats one step of a run from the checkpoint before it, with statistics of all layers and sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.opener import find_steps
from castalia.config.load import load_config, load_neox_run, load_run
from castalia.config.schema import RunConfig
from castalia.data.tokenizer import Tokenizer
from castalia.errors import TrainingError
from castalia.observe.layer_stats import activation_statistics, tensor_statistics
from castalia.observe.metrics import read_events, read_metrics
from castalia.observe.update_history import UpdateHistory, history_before
from castalia.parallel.executor import Rows
from castalia.plan.run_description import repeats_bits
from castalia.train.run_folder import is_run, origin
from castalia.train.setup import Session, start


def replay(run: Path, step: int) -> dict[str, Any]:
    """Repeats a step (from 1), beginning with the nearest checkpoint before it. The run's folder is only read.

    Called on all ranks; the result has the same bits only on as many ranks as the run had. Raises TrainingError if
    there is no such step, or no state to begin from.
    """
    history = history_before(read_events(run), step)
    config, begin = _beginning(run, history, step)
    session = start(config)
    if not 0 < step <= session.last:
        raise TrainingError(f"--step {step}: the run's steps are 1 to {session.last}")
    # The steps between the checkpoint and this one are computed again, with what became of their updates then.
    for number in range(begin + 1, step):
        if number in history.rewound:
            session.step.skipped += 1  # a rewind undid it, and its data were not read again
        elif number in history.skipped:
            session.step.gradients(number - 1, session.batch(number - 1))
            session.step.skip()
        else:
            session.step(number - 1, session.batch(number - 1))
    sequences = _sequences(session, step - 1)
    with activation_statistics(session.executor) as activations:
        session.step.gradients(step - 1, session.batch(step - 1))
        layers = tensor_statistics(session.executor, session.step.loss_scale or 1.0) | {"activations": activations()}
    result = session.step.skip()
    record = next((record for record in read_metrics(run) if record["step"] == step), {})
    return {
        "step": step,
        "checkpoint": begin,
        **_compared("loss", result.loss, record),
        **_compared("grad_norm", result.grad_norm, record),
        "repeats_bits": repeats_bits(config, session.device.type),
        "lr": result.lr,
        "layers": layers,
        "sequences": sequences,
        "notes": list(session.source.notes) if session.source else [],
    }


def _compared(name: str, value: float, record: Mapping[str, Any]) -> dict[str, float | None]:
    """A value, the recorded one and their relative distance: 0.0 means equal bits.

    The distance is None where nothing was recorded, or a value that is not finite, which records leave out.
    """
    recorded = record.get(name)
    distance = None
    if recorded is not None and isfinite(value):
        distance = abs(value - recorded) / abs(recorded) if recorded else abs(value)
    return {name: value, f"recorded_{name}": recorded, f"{name}_distance": distance}


def _beginning(run: Path, history: UpdateHistory, step: int) -> tuple[RunConfig, int]:
    """The config that starts from the last state before a step that still exists, and that state's step."""
    if not is_run(run):
        earlier = [saved for saved in find_steps(run) if saved < step]
        if not earlier:
            raise TrainingError(f"{run} has no checkpoint before step {step}, only of {listed(find_steps(run))}")
        return load_neox_run(run, [f"checkpoint.step={earlier[-1]}"]), earlier[-1]
    on_disk = saved_steps(run / "checkpoints")
    known = [saved for saved in history.saved if saved in on_disk and saved < step]
    if known:
        begin = known[-1]
        return load_run(run, [f"checkpoint.step={begin}", *_batch_size_override(run, begin, step)]), begin
    if history.begin > 0 and (came_from := origin(run)) and came_from[1].is_dir():
        words = [f"checkpoint.resume={came_from[1]}", *_batch_size_override(run, history.begin, step)]
        return load_run(run, words), history.begin
    if history.begin > 0:
        raise TrainingError(
            f"{run} has no checkpoint before step {step}, and began with step {history.begin + 1}; "
            f"it has checkpoints of {listed(on_disk)}"
        )
    config = load_run(run, _batch_size_override(run, 0, step))
    began_from = load_config(run).checkpoint.init_from
    return config.with_({"checkpoint.resume": None, "checkpoint.step": None, "checkpoint.init_from": began_from}), 0


def listed(steps: Iterable[int]) -> str:
    """The numbers of steps, as a message names them."""
    return f"steps {', '.join(map(str, steps)) or '(none)'}"


def _batch_size_override(run: Path, begin: int, step: int) -> list[str]:
    """An override of the batch size, if the run's was changed after the step."""
    later = [span for span in load_config(run).train.earlier_batches if span.until > begin]
    if later and later[0].until < step:
        raise TrainingError(
            f"{run} has no checkpoint between step {step} and step {later[0].until}, after which train.batch_size was "
            "changed"
        )
    return [f"train.batch_size={later[0].batch_size}"] if later else []


def _sequences(session: Session, step: int) -> list[dict[str, Any]]:
    """The sequences of a step (from 0), the one with the highest mean loss, without dropout, first.

    Preferences have no losses of single sequences: those stay in their order, with loss None.
    """
    batch, positions, rows = session.data.batch(step), session.data.positions(step).tolist(), []
    with session.executor.evaluating():
        for row in range(len(batch.tokens)):
            position, tokens = positions[row * len(positions) // len(batch.tokens)], int(batch.loss_mask[row].sum())
            loss = None
            if session.step.preference is None:
                loss = float(session.executor.loss_sum(Rows.of(batch).rows(row, row + 1))) / max(1, tokens)
            # Of pairs, two rows share one position.
            facts = {"row": row, "position": position, "loss": loss, "tokens": tokens}
            facts["pieces"] = [piece._asdict() for piece in session.data.pieces(position)]
            rows.append(facts | {"text": _text(session.tokenizer, batch.tokens[row])})
    return sorted(rows, key=lambda row: -(row["loss"] or 0.0))


def _text(tokenizer: Tokenizer | None, tokens: Any) -> str | None:
    return tokenizer.decode(tokens.tolist()) if tokenizer else None

"""One step of a run once more, from what was saved before it, with all that can be seen of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.config.load import load_config, load_run
from castalia.config.schema import RunConfig
from castalia.data.tokenizer import Tokenizer
from castalia.errors import TrainingError
from castalia.observe.layer_stats import activation_statistics, tensor_statistics
from castalia.observe.metrics import read_events, read_metrics
from castalia.observe.update_history import UpdateHistory, history_before
from castalia.parallel.executor import Rows
from castalia.plan.run_description import repeats_bits
from castalia.train.setup import Session, start


def replay(run: Path, step: int) -> dict[str, Any]:
    """The step (from 1), from the nearest checkpoint before it, whose later steps are computed again.

    Called on all ranks, as many as the run had for the same bits. The run's folder is only read. Raises TrainingError
    if there is no such step, or nothing to begin from.
    """
    way = history_before(read_events(run), step)
    config, begin = _beginning(run, way, step)
    session = start(config)
    if not 0 < step <= session.last:
        raise TrainingError(f"--step {step}: the run's steps are 1 to {session.last}")
    for number in range(begin + 1, step):
        if number in way.rewound:
            session.step.skipped += 1
        elif number in way.skipped:
            session.step.gradients(number - 1, session.batch(number - 1))
            session.step.skip()
        else:
            session.step(number - 1, session.batch(number - 1))
    sequences = _sequences(session, step - 1)
    with activation_statistics(session.engine) as activations:
        session.step.gradients(step - 1, session.batch(step - 1))
        layers = tensor_statistics(session.engine, session.step.loss_scale or 1.0) | {"activations": activations()}
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
    """A value beside the recorded one, and how far it is from it, relative to it: 0.0 is bit for bit.

    The distance is None where nothing is recorded, or something that is not finite, which records leave out.
    """
    recorded = record.get(name)
    distance = None
    if recorded is not None and isfinite(value):
        distance = abs(value - recorded) / abs(recorded) if recorded else abs(value)
    return {name: value, f"recorded_{name}": recorded, f"{name}_distance": distance}


def _beginning(run: Path, way: UpdateHistory, step: int) -> tuple[RunConfig, int]:
    """The config that starts from the last state before a step which is still there, and how many steps that had."""
    on_disk = saved_steps(run / "checkpoints")
    known = [saved for saved in way.saved if saved in on_disk and saved < step]
    if known:
        begin = known[-1]
        return load_run(run, [f"checkpoint.step={begin}", *_batch_size_then(run, begin, step)]), begin
    if way.begin > 0:
        raise TrainingError(
            f"{run} has no checkpoint before step {step}, and began with step {way.begin + 1}; "
            f"it has checkpoints of steps {', '.join(map(str, on_disk)) or '(none)'}"
        )
    config = load_run(run, _batch_size_then(run, 0, step))
    began_from = load_config(run).checkpoint.init_from
    return config.with_({"checkpoint.resume": None, "checkpoint.step": None, "checkpoint.init_from": began_from}), 0


def _batch_size_then(run: Path, begin: int, step: int) -> list[str]:
    """An override where the run was given another batch size after the step."""
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
    with session.engine.evaluating():
        for row in range(len(batch.tokens)):
            position, tokens = positions[row * len(positions) // len(batch.tokens)], int(batch.loss_mask[row].sum())
            loss = None
            if session.step.preference is None:
                loss = float(session.engine.loss_sum(Rows.of(batch).rows(row, row + 1))) / max(1, tokens)
            found = {"row": row, "position": position, "loss": loss, "tokens": tokens}
            found["pieces"] = [piece._asdict() for piece in session.data.pieces(position)]
            rows.append(found | {"text": _text(session.tokenizer, batch.tokens[row])})
    return sorted(rows, key=lambda row: -(row["loss"] or 0.0))


def _text(tokenizer: Tokenizer | None, tokens: Any) -> str | None:
    return tokenizer.decode(tokens.tolist()) if tokenizer else None

"""The training loop: from a config to a folder with a trained model.

A run can be stopped at every step and resumed at every saved one. `TrainingRun.to_the_end` is the loop over steps, and
`TrainingRun._step` shows in order what happens in each of them.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch

from castalia.checkpoint.formats.native.read import saved_steps
from castalia.checkpoint.formats.native.save import (
    CheckpointSaver,
    best_step,
    copy_as_best,
    prune,
    refuse_if_in_use,
)
from castalia.checkpoint.restore import optimizer_state
from castalia.checkpoint.tensors import Progress, Shard
from castalia.config.load import TOKENIZER, load_run
from castalia.config.schema import RunConfig
from castalia.data.split import held_out_digest
from castalia.errors import Stopped, TrainingError
from castalia.files import write_text
from castalia.machine import keep_freed_memory
from castalia.observe.display import Display
from castalia.observe.metrics import Metrics, read_metrics, truncate_metrics, truncate_records, write_event
from castalia.observe.watch import StepPace, Watch, data_of_step
from castalia.parallel.executor import StepLeft
from castalia.parallel.process_group import process_group
from castalia.parallel.rendezvous import is_main
from castalia.train.hardware import choose_device, machine_name
from castalia.train.instruments import LAYERS, Instruments
from castalia.train.resolve import refuse_folder_in_use
from castalia.train.run_folder import (
    LauncherJob,
    complete_config,
    continues_in_place,
    keep_interventions,
    restart_line,
    run_folder,
    this_job,
    was_started_by,
    write_config,
)
from castalia.train.run_header import HEADER, show_first_loss, show_header
from castalia.train.schedule import is_save_step
from castalia.train.setup import Session, build_index, restore, set_up
from castalia.train.step import StepResult
from castalia.train.step_record import peak_speed, step_record
from castalia.train.stop_signals import StopSignals
from castalia.train.task_evaluation import TaskEvaluation
from castalia.train.validation import Validation
from castalia.units import duration, plural

TIMED_MICRO_BATCHES = 3  # of the first step, after which its length is told
LONG_STEP_S = 10.0  # a shorter first step tells its length itself


def train(config: RunConfig, verbose: bool = False, silent: bool = False) -> Path:
    """Trains, resumes or fine-tunes as the config says, and returns the run's folder.

    `verbose`: the header is printed in full, as it stands in the folder. `silent`: nothing is printed.

    Raises Stopped where a signal ended the run, which is saved, and other CastaliaErrors where it cannot continue.
    """
    begin = time.monotonic()
    keep_freed_memory()
    folder = run_folder(config)
    with process_group(choose_device(config.train.device).type, config.parallel.timeout) as launcher:
        job = this_job(launcher, config)
        restarted = was_started_by(job, folder)
        # A launcher repeats its command, but after a crash that has to mean: continue where the folder is.
        if restarted and saved_steps(folder / "checkpoints"):
            config = load_run(folder)
        in_place = restarted or continues_in_place(config, folder)
        if not in_place:
            refuse_folder_in_use(config, folder)
        if is_main():
            refuse_if_in_use(folder / "checkpoints")  # the saver asks again, but only once everything is loaded
        session = set_up(config)
        with Display(silent=silent or session.executor.rank > 0) as display:
            if restarted:
                display.line(restart_line(job, session.progress.step))
            header = show_header(session, display, folder, kept=True, verbose=verbose)
            with display.working("the order of the samples") as advance:
                build_index(session, advance)
            try:
                with TrainingRun(session, folder, display, in_place, job, begin, header) as run:
                    stopped_by = run.to_the_end()
            except OSError as error:  # most often a full disk; errors of checkpoints say so themselves
                raise TrainingError(f"{folder} cannot be written: {error}; checkpoints are as they were") from error
    if stopped_by:
        raise Stopped(f"stopped; continue with: castalia train {folder}", signal.Signals[stopped_by])
    return folder


class TrainingRun:
    """A session that trains and writes into its folder. A context manager: leaving it releases the folder."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        display: Display,
        in_place: bool,
        job: LauncherJob,
        begin: float,  # when the process began, by time.monotonic
        header: str,  # what rank 0 writes into the folder
    ):
        self.session, self.folder, self.display = session, folder, display
        self.in_place, self.job, self.is_main, self.header = in_place, job, session.executor.rank == 0, header
        before = session.source.config if session.source and session.resumed else None
        has_tokenizer, batch_size = session.tokenizer is not None, session.plan.batch_size
        began_from = before.checkpoint.init_from if before else None
        self.config = complete_config(session.config, folder, has_tokenizer, batch_size, began_from)
        self.progress = session.progress
        # The step whose checkpoint is in the folder already; there is no need to save it again.
        self.saved_step: int | None = session.progress.step if in_place and session.resumed else None
        self.validation = Validation(session, display)
        self.tasks = TaskEvaluation(
            session.config.eval, session.tokenizer, session.executor, session.config.precision.compute, display
        )
        self.signals = StopSignals("micro-batch" if session.executor.can_leave_step else "step")
        hours = session.config.train.max_hours
        self.end = begin + hours * 3600 if hours else math.inf
        # The last step's record, if its evaluation was cut short; at first on rank 0 alone.
        self.unevaluated: dict[str, Any] | None = None
        self.pace = StepPace(self.config.watch.window)
        self.marks: list[float] = []  # when the first micro-batches began
        self.saved_at = time.monotonic()
        self.held_out = held_out_digest(self.config.data) if self.is_main else None
        self.best_loss = math.inf  # the lowest validation loss of those whose checkpoint is on disk
        self.watch = Watch(
            self.config.watch,
            session.executor,
            session.data,
            session.tokenizer,
            stored=session.progress.watch,
            event=self._event,
            say=display.line,
        )

    def __enter__(self) -> TrainingRun:
        executor, saves = self.session.executor, self.config.checkpoint
        # Whatever fails on the way closes what is open by then; `pop_all` hands it over to `__exit__`.
        with ExitStack() as opened:
            writer = CheckpointSaver(
                self.folder / "checkpoints",
                keep_last=saves.keep_last,
                keep_every=saves.keep_every,
                rank=executor.rank,
                num_ranks=executor.world,
            )
            self.writer = opened.enter_context(writer)
            if self.is_main:
                self.metrics = opened.enter_context(closing(self._open_folder()))
            self.instruments = opened.enter_context(self._instruments())
            executor.barrier()  # the remains of crashed ranks are removed before any rank saves
            best = self._find_best() if self.is_main and saves.keep_best else math.inf
            self.best_loss = executor.gather(best)[0]
            self.opened = opened.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.opened.__exit__(*raised)

    def _open_folder(self) -> Metrics:
        """Brings the folder into the state of the step that the run begins with, on rank 0."""
        session, folder = self.session, self.folder
        if session.tokenizer is not None:
            session.tokenizer.save(folder / TOKENIZER)
        if session.config.data.intervene is not None:
            keep_interventions(session.config.data.intervene, folder)
        write_config(folder, self.config)
        write_text(folder / HEADER, self.header)
        # A run that died may have recorded steps after its last checkpoint, which are about to be computed again.
        truncate_records(folder / "events.jsonl")
        truncate_records(folder / LAYERS, self.progress.step)
        self.unevaluated = truncate_metrics(folder, self.progress.step, self.validation.is_due(self.progress.step))
        source = session.source.path if session.source else None
        machine = machine_name(session.device, session.executor.world)
        facts = {"source": source, "data_fingerprint": session.data.fingerprint, "machine": machine}
        facts |= self.job._asdict()
        self._event("start", step=self.progress.step, **facts)
        return Metrics(folder, self.config, self.unevaluated)

    def _find_best(self) -> float:
        """The lowest validation loss of the checkpoints on disk, which is made the best one if it is not yet: what was
        evaluated last may have been killed before it was."""
        folder = self.folder / "checkpoints"
        records = [record for record in read_metrics(self.folder) if record.get("valid_loss") is not None]
        losses: dict[int, float] = {record["step"]: record["valid_loss"] for record in records}
        steps, known = [step for step in saved_steps(folder) if step in losses], best_step(folder)
        if known in losses:
            steps.insert(0, known)  # of equal ones it stays
        if not steps:
            return math.inf
        best = min(steps, key=lambda step: losses[step])
        if best != known:
            copy_as_best(folder, best)
        return losses[best]

    def _instruments(self) -> Instruments:
        executor = self.session.executor
        # Every rank takes part in layer statistics, but only rank 0 profiles.
        log = self.config.log if self.is_main else self.config.log.with_({"profile": None})
        return Instruments(log, self.folder, executor, self.display.line)

    def _event(self, event: str, **facts: Any) -> None:
        if self.is_main:
            write_event(self.folder, event, **facts)

    def to_the_end(self) -> str | None:
        """Trains until the last step, an exit interval, the time limit or a signal; then saves.

        Returns the signal's name, or None.
        """
        session, last, config = self.session, self.session.last, self.session.config
        if session.executor.any(self.unevaluated is not None):
            self.display.line(f"step {self.progress.step} is evaluated first, as it was to be")
            with self.signals:
                self._evaluated(self.unevaluated or {})
                if self.unevaluated is not None:
                    return self._finish(self._stopped_by(), "train.max_hours")
        if self.progress.step >= last:
            if self.is_main:  # the last save may have been killed before it pruned
                prune(self.folder / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every)
            reached = f"{self.progress.step} of {last} steps"
            self.display.line(f"the run is complete: {reached}; raise train.steps to continue")
            return None
        if self._has_stalled():
            best = f"the best state is that of step {best_step(self.folder / 'checkpoints')}"
            self.display.line(f"the run has stopped as eval.patience says; {best}; to continue: eval.patience=null")
            return None
        if self.progress.step == 0 and is_save_step(config.checkpoint, 0, last):
            self.save()
        peak = peak_speed(session)
        self.display.start(self.progress.step, last, self.progress.tokens)
        first, seconds, limit = self.progress.step + 1, 0.0, "train.max_hours"
        session.executor.leaves_step, self.marks = self._leaves_step, [time.perf_counter()]
        with self.signals:
            while self.progress.step < last and not self._should_stop(seconds):
                try:
                    result, seconds = self._step()
                except StepLeft:
                    break
                done = self.progress.step
                record = step_record(session, self.progress, result, seconds)
                evaluates, asks = self.validation.is_due(done), self.tasks.is_due(done, last)
                # A record that is due for evaluation is completed by its results, also after a crash.
                if self.is_main:
                    (self.metrics.note if evaluates or asks else self.metrics.write)(record)
                if done == first:
                    show_first_loss(session, result.loss, self.display)
                    if session.step.recomputing:
                        self.display.line(f"recompute: {session.step.recomputing}")
                        self._event("recompute", step=done, **session.step.recomputing.facts())
                self.display.advance(record)
                if is_save_step(config.checkpoint, done, last):
                    self.save()  # before the evaluation, which may take long and be cut short
                elif self._save_is_due():
                    self.save(replaceable=True)
                if asks:
                    record = self._asked_tasks(record)
                if evaluates:
                    record = self._evaluated(record)
                elif asks and self.is_main:
                    self.metrics.write(record)
                if done % config.log.every == 0 or done in (first, last) or "valid_loss" in record:
                    self.display.step(record, peak)
                if evaluates and self._has_stalled():
                    limit = "eval.patience"
                    break
                if config.train.exit_interval and done % config.train.exit_interval == 0:
                    limit = "train.exit_interval"
                    break
            # A signal that comes only now must not cut the last save off, so they are still caught.
            return self._finish(self._stopped_by(), limit)

    def _stopped_by(self) -> str | None:
        """The name of the signal that came to this rank or, as all of them must end alike, to another one."""
        return next(filter(None, self.session.executor.gather(self.signals.received or "")), None)

    def _should_stop(self, seconds: float = 0.0) -> bool:
        """Whether any rank got a signal, or something that takes `seconds` would end after the time limit."""
        return self.session.executor.any(bool(self.signals.received) or time.monotonic() + seconds > self.end)

    def _leaves_step(self) -> bool:
        """Between two micro-batches: whether a signal has come to any rank."""
        if len(self.marks) <= TIMED_MICRO_BATCHES:
            self._time_micro_batch()
        return self.session.executor.any(bool(self.signals.received))

    def _time_micro_batch(self) -> None:
        """Says how long a step takes as soon as the first micro-batches show it, where it takes long."""
        session, done = self.session, self.progress.step
        session.executor.numbers(torch.zeros((), device=session.device))  # waits for what GPUs have still to compute
        self.marks.append(time.perf_counter())
        if len(self.marks) <= TIMED_MICRO_BATCHES:
            return
        seconds = median(end - begin for begin, end in pairwise(self.marks)) * session.plan_at(done).accumulation
        if seconds > LONG_STEP_S:
            self.display.expect(done, seconds)

    def _step(self) -> tuple[StepResult, float]:
        """One step: gradients, the spike policy's decision about them, the update. Returns its result and seconds.

        Raises StepLeft where a signal comes before its last micro-batch: the state is that of the step before.
        """
        session, step, done = self.session, self.session.step, self.progress.step
        begin = time.perf_counter()
        with self._errors_recorded(done), self.instruments.around(done + 1):
            loss, norm = step.gradients(done, session.batch(done))
            self.instruments.before_update(done + 1, step.loss_scale or 1.0)
            action = self.watch.decide(done + 1, loss, norm, step.loss_scale)
            result = step.apply() if action == "apply" else step.skip()
        seconds = time.perf_counter() - begin
        if action == "stop":  # before `progress` moves on: the state before this step is saved
            self._stop_at_spike()
        self.progress = Progress(
            step=done + 1,
            skipped=session.step.skipped,
            tokens=self.progress.tokens + session.tokens_of(done),
            loss_scale=session.step.scaler.state() if session.step.scaler else None,
            schedule=session.step.rate.stored() | session.quirks.stored(),
            watch=self.watch.spikes.stored(),
        )
        if action == "rewind":
            self._rewind()
        self._check_pace(seconds)
        return result, seconds

    @contextmanager
    def _errors_recorded(self, done: int) -> Iterator[None]:
        """Records an error that ends the run in the step after `done`, with the data of that step."""
        try:
            yield
        except TrainingError as error:
            data = data_of_step(self.session.data, self.session.tokenizer, done)
            self._event("error", step=done + 1, message=str(error), **data)
            raise

    def _check_pace(self, seconds: float) -> None:
        """Records that steps have become slower. While the batch size warms up, seconds are scaled to a full batch."""
        session, step = self.session, self.progress.step
        scaled = seconds * session.tokens_of(session.last) / session.tokens_of(step - 1)
        if change := self.pace.look(scaled):
            facts = {"seconds": round(change.seconds, 6), "usual_seconds": round(change.usual, 6)}
            self._event("slow" if change.slow else "usual pace", step=step, **facts)
            what = "have become slower" if change.slow else "are as fast as before again"
            times = f"{duration(change.seconds)} instead of {duration(change.usual)}"
            self.display.line(f"step {step}: steps {what}" + (f": {times}" if change.slow else ""))

    def _stop_at_spike(self) -> NoReturn:
        """Saves the state before the spike, so that its step can be replayed, and ends the run."""
        before = self.progress.step
        if self.saved_step != before:
            self.save()
        raise TrainingError(
            f"step {before + 1} is a spike, and watch.policy=stop; the state before it is saved as step {before}. Look "
            f"at it: castalia replay {self.folder} --step {before + 1}; continue without its update: castalia train "
            f"{self.folder} watch.policy=skip"
        )

    def _rewind(self) -> None:
        """Restores the weights of an earlier checkpoint. The steps since then count as skipped; their data are used."""
        session, done = self.session, self.progress.step
        self._wait_for_writes()
        self.writer.join()
        saved = restore(session, self.watch.rewind_target(self.folder, done))
        # Data continue, so that the batches that led to the spike are not read again; the schedule goes back.
        session.step.skipped = saved.skipped + done - saved.step
        self.watch.restore(saved.watch)
        self.progress = replace(
            self.progress, skipped=session.step.skipped, loss_scale=saved.loss_scale, watch=saved.watch
        )
        self._event("rewind", step=done, back_to=saved.step)
        self.display.line(f"the weights are those of step {saved.step} again; batches up to step {done} are left out")

    def _evaluated(self, record: dict[str, Any]) -> dict[str, Any]:
        """Evaluates and writes the last step's record, with the results unless a signal cut the evaluation short."""
        result = self.validation.run(self.progress.step, self._should_stop)
        if result is not None:
            self._event("evaluation", step=self.progress.step, **result)
            record = record | self.validation.recorded(result)
        self.unevaluated = record if result is None else None
        if self.is_main:
            self.metrics.write(record)
        if self.config.checkpoint.keep_best and result is not None:
            self._keep_if_best(record.get("valid_loss"))
        return record

    def _asked_tasks(self, record: dict[str, Any]) -> dict[str, Any]:
        """Asks the tasks of the state on disk. The record gets their values; one that fails is said and left out."""
        step = self.progress.step
        if self.saved_step != step:
            self.save(replaceable=True)
        self._wait_for_writes()
        self.session.executor.barrier()
        found: dict[str, float] = {}
        for task, result in self.tasks.run(self.folder, step, self._should_stop, lambda: bool(self.signals.received)):
            if isinstance(result, Exception):
                self._event("task failed", step=step, task=task, error=str(result))
                self.display.line(f"step {step}: the task {task} failed, and training continues: {result}")
                continue
            found |= result
            self.display.line(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()))
        self._event("tasks", step=step, **found)
        return record | found

    def _keep_if_best(self, loss: float | None) -> None:
        """Keeps the state under the name of the best one if its validation loss is the lowest."""
        loss = self.session.executor.gather(loss)[0]  # one rank decides
        if loss is None or not loss < self.best_loss:
            return
        self.best_loss = loss
        if self.saved_step == self.progress.step:
            self._wait_for_writes()
            self.writer.keep_as_best(self.progress.step)
        else:
            self.save(best=True)

    def _has_stalled(self) -> bool:
        """Whether the last eval.patience evaluations have all brought no lower loss than the best one before them."""
        patience = self.config.eval.patience
        if patience is None or self.validation.data is None:
            return False
        recorded = (record.get("valid_loss") for record in read_metrics(self.folder)) if self.is_main else ()
        losses = [loss for loss in recorded if loss is not None]
        stalled = len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
        return self.session.executor.gather(stalled)[0]  # one rank decides

    def _save_is_due(self) -> bool:
        """Whether the last save is as old as checkpoint.save_minutes, on any rank."""
        minutes = self.config.checkpoint.save_minutes
        return minutes is not None and self.session.executor.any(time.monotonic() - self.saved_at >= 60 * minutes)

    def save(self, replaceable: bool = False, best: bool = False) -> None:
        """Copies the state and returns. It is on disk before the next save begins, and when the run ends.

        A `replaceable` one gives way to the next save, and no rewind goes back to it, as it depends on the machine's
        pace. The `best` one is not what the run continues with.
        """
        session = self.session
        parameters = {name: p for name, p in session.executor.parameters.items() if session.executor.saves(name)}
        states = optimizer_state(session.optimizer, parameters) if self.config.checkpoint.save_optimizer else None
        if states is not None:
            states = {name: self._parts_to_write(state) for name, state in states.items()}
        self._wait_for_writes()
        if self.is_main:
            self.metrics.sync()
        self.writer.save(
            self._parts_to_write(parameters),
            states,
            self.progress,
            self.config,
            session.data.fingerprint_until(self.progress.step),
            self.held_out,
            replaceable=replaceable,
            best=best,
        )
        if not best:
            self.saved_step, self.saved_at = self.progress.step, time.monotonic()
            self._event("save by time" if replaceable else "save", step=self.progress.step)

    def _wait_for_writes(self) -> None:
        """Waits until the last checkpoint is on disk, on all ranks together. A rank that waited alone would keep the
        others in a collective, whose timeout a slow disk may exceed."""
        executor = self.session.executor
        while executor.any(self.writer.is_writing):
            if executor.any(self.writer.has_failed):  # its disk may be full, and the others would wait for its part
                self.writer.abandon()
            time.sleep(0.05)

    def _parts_to_write(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of tensors that this rank writes. Step counters of the optimizer are whole on every rank."""
        parts: dict[str, Any] = {}
        for name, tensor in tensors.items():
            part = self.session.executor.part(tensor)
            if name == "step":
                parts[name] = tensor
            elif part.writes:
                parts[name] = Shard(part.local, part.shape, part.start)
        return parts

    def _finish(self, stopped_by: str | None, limit: str) -> str | None:
        """Saves what is not saved yet and says how the run ended: by a signal, at a limit, or done.

        Returns the signal's name; None for a run that was done when the signal came.
        """
        if self.saved_step != self.progress.step:
            self.save()
        self._wait_for_writes()
        self.writer.join()
        step, last = self.progress.step, self.session.last
        if step >= last and self.unevaluated is None:
            self._event("end", step=step, signal=None)
            self.display.line(f"done: {plural(step, 'step')}, {self.progress.tokens:,} tokens, in {self.folder}")
            return None
        self._event("stop", step=step, signal=stopped_by)
        by, told = (f" by {stopped_by}", "") if stopped_by else ("", f" ({limit})")
        lifted = " eval.patience=null" if told and limit == "eval.patience" else ""  # else it ends at once
        left = " and still to be evaluated" if self.unevaluated is not None else ""
        self.display.line(f"stopped{by} after step {step:,} of {last:,}{told}, which is saved{left}")
        self.display.as_it_is(f"to continue: castalia train {self.folder}{lifted}")
        return stopped_by

"""The evaluations of a run on its validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from castalia.bars import Advance
from castalia.config.schema import RunConfig
from castalia.data.config_corpora import has_data
from castalia.data.loader import Batch, Samples
from castalia.data.pairs import Pairs, open_samples
from castalia.evaluate.perplexity import evaluate
from castalia.observe.display import Display
from castalia.parallel.process_group import main_first
from castalia.train.setup import Session


class Validation:
    """Validation data and the schedule of evaluations. Every method is called on all ranks together."""

    def __init__(self, session: Session, display: Display) -> None:
        self.session, self.display, self.cfg, self.cut_short = session, display, session.config.eval, False
        self.data = _open_data(session.config)
        if self.data is not None:
            # Rank 0 builds the index files that the other ranks then find.
            with display.working("the order of validation") as advance, main_first():
                self.data.build_index(advance)

    def is_due(self, step: int) -> bool:
        """Whether the run evaluates once `step` steps are done."""
        periodic = bool(self.cfg.every and step % self.cfg.every == 0)
        return self.data is not None and (periodic or (self.cfg.at_end and step == self.session.last))

    def run(self, step: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Evaluates the model after `step` steps. Returns None if `should_stop` cuts the evaluation short.

        The n-th evaluation takes the n-th stretch of the validation data, as GPT-NeoX's iterator does; with
        eval.batches=null each takes all of them.
        """
        if should_stop():
            return None
        preference = self.session.step.preference
        batches, total = self._whole_pass() if self.cfg.batches is None else (self._stretch(step), self.cfg.batches)
        with self.display.working("evaluating", total) as advance:
            shown = self._until(should_stop, batches, advance)
            result = preference.evaluate(shown) if preference else evaluate(self.session.executor, shown)
        return None if self.cut_short else result

    def recorded(self, result: Mapping[str, float]) -> dict[str, float]:
        """The values of a result that the step's record holds."""
        names = result if self.session.step.preference else ("loss", "perplexity")
        return {f"valid_{name}": result[name] for name in names}

    def _stretch(self, step: int) -> Iterator[Batch]:
        """The batches of the evaluation after `step`. Preferences take this data rank's rows, other losses all."""
        assert self.data is not None
        every, batches = self.cfg.every, self.cfg.batches or 0
        # Without `every` only the end of a run is evaluated, on the first stretch.
        first = max(0, (step // every - 1) * batches if every else 0)
        has_parts = self.session.step.preference is not None
        rows = self.session.plan.rows_of(self.session.executor.data_rank) if has_parts else None
        return (self.data.batch(number, rows) for number in range(first, first + batches))

    def _whole_pass(self) -> tuple[Iterator[Batch], int]:
        """All validation data, and the number of batches. Preferences take this data rank's rows of each batch, other
        losses all."""
        assert self.data is not None
        executor, size = self.session.executor, self.session.plan.batch_size
        if self.session.step.preference is None:
            return self.data.whole_pass(size), self.data.whole_pass_batches(size)
        # KTO compares the sequences of micro-batches, which must be whole ones then.
        multiple = size if self.session.config.train.objective == "kto" else executor.data_size
        batches = self.data.whole_pass(size, multiple, executor.data_rank, executor.data_size)
        return batches, self.data.whole_pass_batches(size, multiple)

    def _until(self, should_stop: Callable[[], bool], batches: Iterator[Batch], advance: Advance) -> Iterator[Batch]:
        """The batches until the last one or a stop. After the last batch there is nothing left to cut short."""
        self.cut_short = False
        for number, batch in enumerate(batches):
            self.cut_short = number > 0 and should_stop()
            if self.cut_short:
                return
            yield batch
            advance(1)


def _open_data(config: RunConfig) -> Samples | Pairs | None:
    wanted = config.eval.batches != 0 and (config.eval.every is not None or config.eval.at_end)
    return open_samples(config, "valid") if wanted and has_data(config, "valid") else None

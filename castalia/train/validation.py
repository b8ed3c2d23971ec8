"""The evaluations of a run on its validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from castalia.config.schema import RunConfig
from castalia.data.loader import Batch, Samples, has_data
from castalia.data.pairs import Pairs, open_samples
from castalia.evaluate.perplexity import evaluate
from castalia.parallel.process_group import main_first
from castalia.train.setup import Session


class Validation:
    """Validation data and the schedule of evaluations. Every method is called on all ranks together."""

    def __init__(self, session: Session) -> None:
        self.session, self.cfg, self.cut_short = session, session.config.eval, False
        with main_first():  # it builds the index files that the other ranks then find
            self.data = _open_data(session.config)

    def is_due(self, step: int) -> bool:
        """Whether the run evaluates once `step` steps are done."""
        periodic = bool(self.cfg.every and step % self.cfg.every == 0)
        return self.data is not None and (periodic or (self.cfg.at_end and step == self.session.last))

    def run(self, step: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Evaluates the model after `step` steps. Returns None if `should_stop` cuts the evaluation short.

        The n-th evaluation takes the n-th stretch of the validation data, as GPT-NeoX's iterator does.
        """
        if should_stop():
            return None
        every, batches = self.cfg.every, self.cfg.batches
        first = max(0, (step // every - 1) * batches if every else 0)
        preference, self.cut_short = self.session.step.preference, False
        # Without `every` only the end of a run is evaluated, on the first stretch.
        shown = self._batches(range(first, first + batches), should_stop)
        result = preference.evaluate(shown) if preference else evaluate(self.session.executor, shown)
        return None if self.cut_short else result

    def recorded(self, result: Mapping[str, float]) -> dict[str, float]:
        """The values of a result that the step's record holds."""
        names = result if self.session.step.preference else ("loss", "perplexity")
        return {f"valid_{name}": result[name] for name in names}

    def _batches(self, numbers: range, should_stop: Callable[[], bool]) -> Iterator[Batch]:
        """Validation batches until the last one or a stop. Preferences take this data rank's rows, other losses all."""
        assert self.data is not None
        has_parts = self.session.step.preference is not None
        rows = self.session.plan.rows_of(self.session.executor.data_rank) if has_parts else None
        for number in numbers:
            yield self.data.batch(number, rows)
            # After the last batch there is nothing left to cut short.
            self.cut_short = number < numbers[-1] and should_stop()
            if self.cut_short:
                return


def _open_data(config: RunConfig) -> Samples | Pairs | None:
    wanted = config.eval.batches > 0 and (config.eval.every is not None or config.eval.at_end)
    return open_samples(config, "valid") if wanted and has_data(config, "valid") else None

"""Tasks of lm-eval during training, asked of the checkpoint that was just saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from castalia.checkpoint.opener import open_checkpoint
from castalia.config.schema import EvalConfig
from castalia.data.tokenizer import Tokenizer
from castalia.errors import ConfigError
from castalia.loading import build_model
from castalia.observe.display import Display
from castalia.parallel.executor import Executor
from castalia.train.hardware import choose_dtype

if TYPE_CHECKING:
    from castalia.tasks.harness import TaskModel


class TaskEvaluation:
    """The tasks of a run and their schedule. Every method is called on all ranks together.

    Each rank reads the whole checkpoint, whatever layout trains, and answers its share of the requests.
    """

    def __init__(
        self, cfg: EvalConfig, tokenizer: Tokenizer | None, executor: Executor, compute: str, display: Display
    ) -> None:
        """Raises ConfigError without lm-eval or a tokenizer, DataError for tasks that do not exist."""
        self.cfg, self.tokenizer, self.executor, self.compute = cfg, tokenizer, executor, compute
        self.display = display
        if not cfg.tasks:
            return
        if tokenizer is None:
            raise ConfigError("eval.tasks needs a tokenizer: name it with tokenizer.path")
        try:
            from castalia.tasks.task_run import refuse_unknown
        except ImportError as error:
            raise ConfigError(f"eval.tasks needs lm-eval: pip install 'castalia[eval]' ({error})") from error
        refuse_unknown(cfg.tasks)

    def is_due(self, step: int, last: int) -> bool:
        """Whether the tasks are asked once `step` of `last` steps are done."""
        every = self.cfg.tasks_every
        return bool(self.cfg.tasks) and (step == last or bool(every and step % every == 0))

    def run(
        self, folder: Path, step: int, should_stop: Callable[[], bool], received: Callable[[], bool]
    ) -> Iterator[tuple[str, dict[str, float] | Exception]]:
        """For each task its values by `task/metric`, or the error that ended it, which the run survives.

        `folder`: the run's, which holds the step. Between tasks all ranks ask `should_stop`, between requests each asks
        `received`, and all end together. What was cut short is left out.
        """
        from castalia.tasks.harness import Interrupted
        from castalia.tasks.task_options import TaskOptions
        from castalia.tasks.task_run import metrics_of, run_tasks

        model, problem = None, None
        try:
            model = self._model(folder, step, received)
        except Exception as error:  # such as too little memory for a second model
            problem = error
        if not all(self.executor.gather(model is not None)) or model is None:  # else the others would wait for it
            yield ", ".join(self.cfg.tasks or ()), problem or RuntimeError("another process could not open the model")
            return
        for task in self.cfg.tasks or ():
            if should_stop():
                return
            try:
                results = run_tasks(model, TaskOptions((task,), limit=self.cfg.tasks_limit, draws=0))
                yield task, metrics_of(results)
            except Interrupted:
                return
            except Exception as error:  # of any task; training goes on whatever it is
                yield task, error

    def _model(self, folder: Path, step: int, received: Callable[[], bool]) -> TaskModel:
        from castalia.tasks.harness import TaskModel

        device = self.executor.device
        network = build_model(open_checkpoint(folder, step=step), device, choose_dtype(self.compute, device))
        assert self.tokenizer is not None
        return TaskModel(network, self.tokenizer, shared=self.executor.world > 1, should_stop=received)

"""What looks into single steps of a run, where that is asked for: statistics of every layer, and a profile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from castalia.config.schema import Log

LAYERS = "layers.jsonl"
SUMMARY_ROWS = 20
SHOWN = 6  # on the terminal


class Instruments:
    """`around(step)` encloses each step, counted from 1. A context manager: a profile that is open is written then."""

    def __init__(
        self,
        log: Log,
        folder: Path,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
        say: Callable[[str], None],
    ):
        self.log, self.folder, self.modules, self.parameters, self.say = log, folder, modules, parameters, say
        self.profiler: profile | None = None

    @contextmanager
    def around(self, step: int, loss_scale: float = 1.0) -> Iterator[None]:
        wanted = self.log.profile
        if wanted and self.profiler is None and wanted.start <= step <= wanted.stop:
            self._start_profile()
        if self.log.layers_every and step % self.log.layers_every == 0:
            with layer_statistics(self.modules, self.parameters, loss_scale) as found:
                yield
            with open(self.folder / LAYERS, "a") as file:
                file.write(json.dumps({"step": step, **found}) + "\n")
        else:
            yield
        if wanted and step == wanted.stop:
            self._write_profile()

    def _start_profile(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self.profiler = profile(activities=activities, profile_memory=True)
        self.profiler.__enter__()

    def _write_profile(self) -> None:
        """A trace for chrome://tracing or Perfetto, a table of the costliest operations, a GPU's memory over time."""
        profiler, self.profiler = self.profiler, None
        if profiler is None or self.log.profile is None:
            return
        profiler.__exit__(None, None, None)
        folder = Path(self.log.profile.dir) if self.log.profile.dir else self.folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        averages, place = profiler.key_averages(), "device" if torch.cuda.is_available() else "cpu"
        tables = [
            f"By {key.replace('_', ' ')}\n{averages.table(sort_by=key, row_limit=SUMMARY_ROWS)}"
            for key in (f"self_{place}_time_total", f"self_{place}_memory_usage")
        ]
        (folder / "summary.txt").write_text("\n".join(tables))
        times = {event.key: getattr(event, f"self_{place}_time_total") for event in averages}
        self.say(f"profile of steps {self.log.profile.start} to {self.log.profile.stop} in {folder}; most time went to")
        for name, time in sorted(times.items(), key=lambda item: -item[1])[:SHOWN]:
            self.say(f"  {time / max(1, sum(times.values())):6.1%}  {name}")
        if place == "device":
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def __enter__(self) -> Instruments:
        return self

    def __exit__(self, *_: object) -> None:
        self._write_profile()


@contextmanager
def layer_statistics(
    modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter], loss_scale: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Fills in, while it is open, what each module gave last, and each parameter's gradient before clipping.

    `activations`: rms, largest magnitude and share of zeros; `gradients`: norm and share of zeros; `weights`: norms
    at the start.
    """
    found: dict[str, Any] = {"activations": {}, "gradients": {}}
    found["weights"] = {name: parameter.detach().norm().item() for name, parameter in parameters.items()}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: _note_output(found, name, output))
        for name, module in modules.items()
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: _note_gradient(found, name, p, loss_scale))
        for name, parameter in parameters.items()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _note_output(found: dict[str, Any], name: str, output: Tensor) -> None:
    wide = output.float()
    found["activations"][name] = {
        "rms": wide.square().mean().sqrt().item(),
        "max": wide.abs().max().item(),
        "zeros": (wide == 0).float().mean().item(),
    }


@torch.no_grad()
def _note_gradient(found: dict[str, Any], name: str, parameter: Tensor, loss_scale: float) -> None:
    """Called after each micro-batch; the last one has the whole gradient."""
    assert parameter.grad is not None
    zeros = (parameter.grad == 0).float().mean().item()
    found["gradients"][name] = {"norm": parameter.grad.norm().item() / loss_scale, "zeros": zeros}

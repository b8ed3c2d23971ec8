"""Compares the measured memory of a step with the plan's estimate."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import torch
from torch.autograd.profiler import profile as autograd_profile
from torch.profiler import ProfilerActivity, profile

from castalia.config.attention_kernels import AMPERE
from castalia.model.attention import capability
from castalia.plan.layout import Layout
from castalia.plan.memory import compute_of, memory_by_stage
from castalia.train.setup import Session


def open_profile(device: torch.device) -> profile:
    """torch's profiler of operations and memory on the CPU and the device; the caller starts it."""
    if device.type == "cuda":
        return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], profile_memory=True)
    _quieten()
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _quieten() -> None:
    """Without a GPU the profiler's library only writes two lines about a tracing system, "USDT", to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


class PeakMemory:
    """While open, measures the peak of tensor memory on a device, beyond what was allocated before, in `bytes`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            _quieten()
            # Not `torch.profiler`, which imports torch's compiler: two CPU seconds.
            self.profiler = autograd_profile(profile_memory=True, use_kineto=True)
            self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.profiler.__exit__(*error)
        results: Any = self.profiler.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        # The CPU has no counter of peak memory, so the profiler's allocations are added up in their order.
        held = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            self.bytes = max(self.bytes, held)


def measured_and_planned(session: Session, layout: Layout, peak_bytes: int) -> tuple[int, float]:
    """Bytes that this rank's tensors took in a step, and those that the plan says.

    `peak_bytes` is the step's, beyond parameters, optimizer state and a reference model.
    """
    states = chain.from_iterable(state.values() for state in session.optimizer.state.values())
    reference = session.step.preference and session.step.preference.reference
    frozen = reference.parameters.values() if reference else ()
    local = (session.executor.part(t).local for t in chain(session.executor.parameters.values(), states, frozen))
    measured = peak_bytes + sum(tensor.numel() * tensor.element_size() for tensor in local)
    compute = compute_of(
        session.config, session.config.precision.compute, session.device.type, capability(session.device) or AMPERE
    )
    stage = memory_by_stage(session.config.model, layout, session.config.data.seq_length, compute)[0]
    return measured, stage.total

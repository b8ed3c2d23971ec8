"""Which updates led to a step of a run, from its events about saved, skipped and rewound steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class UpdateHistory:
    """Steps are counted from 1. Saving a step saves the state after it."""

    begin: int = 0  # the step after which the run began in its folder
    saved: list[int] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)  # computed, but their updates were left out
    rewound: set[int] = field(default_factory=set)  # undone by a rewind to a step before them

    def until(self, step: int) -> UpdateHistory:
        """The history as it was after a step."""
        skipped, rewound = ({s for s in steps if s <= step} for steps in (self.skipped, self.rewound))
        return UpdateHistory(self.begin, [s for s in self.saved if s <= step], skipped, rewound)


def history_before(events: Iterable[Mapping[str, Any]], step: int) -> UpdateHistory:
    """The history of the steps before `step`, the last time that it was computed.

    A resumed run computes steps again that were done after its checkpoint; a rewind takes saved steps back.
    """
    history, undone = UpdateHistory(), None
    for number, event in enumerate(events):
        at = event.get("step", 0)
        match event["event"]:
            case "start":
                history = history.until(at) if number else UpdateHistory(begin=at)
                undone = None if at < step else undone
            case "save":
                history.saved = [*history.until(at - 1).saved, at]  # a resumed run saves steps again
            case "spike" if event.get("action") == "skip":
                history.skipped.add(at)
            case "rewind" if "back_to" in event:
                if event["back_to"] < step <= at:
                    undone = history.until(step - 1)
                history.saved = history.until(event["back_to"]).saved
                history.rewound |= set(range(event["back_to"] + 1, min(at, step) + 1))
    return (undone or history).until(step - 1)

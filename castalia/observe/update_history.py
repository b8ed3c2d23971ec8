"""Which updates led to a step of a run: what its events say of saved, skipped and rewound steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class UpdateHistory:
    """Steps are counted from 1; a step that was saved is the state after it."""

    begin: int = 0  # the step after which the run began in its folder
    saved: list[int] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)  # computed, but their updates were left out
    rewound: set[int] = field(default_factory=set)  # undone by going back behind them

    def until(self, step: int) -> UpdateHistory:
        """The way as it was after a step."""
        skipped, rewound = ({s for s in steps if s <= step} for steps in (self.skipped, self.rewound))
        return UpdateHistory(self.begin, [s for s in self.saved if s <= step], skipped, rewound)


def history_before(events: Iterable[Mapping[str, Any]], step: int) -> UpdateHistory:
    """What happened before `step` was done, the last time that it was: resuming and rewinding take a run back."""
    way, undone = UpdateHistory(), None
    for number, event in enumerate(events):
        at = event.get("step", 0)
        match event["event"]:
            case "start":
                way = way.until(at) if number else UpdateHistory(begin=at)
                undone = None if at < step else undone
            case "save":
                way.saved = [*way.until(at - 1).saved, at]
            case "spike" if event.get("action") == "skip":
                way.skipped.add(at)
            case "rewind" if "back_to" in event:
                if event["back_to"] < step <= at:
                    undone = way.until(step - 1)
                way.saved = way.until(event["back_to"]).saved
                way.rewound |= set(range(event["back_to"] + 1, min(at, step) + 1))
    return (undone or way).until(step - 1)

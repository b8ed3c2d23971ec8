"""The command `castalia`, of which a process dies after so many answers: `killed.py NUMBER WORDS...`; 0: none does.

Says on standard error how many answers each process is asked for.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from castalia.cli.main import main
from castalia.tasks import harness


def begin(most: int) -> None:
    """Replace what computes the answers."""
    scores, done = harness.scores_as_they_come, 0

    def mortal(model: Any, requests: Any, limit: int) -> Iterator[Any]:
        nonlocal done
        print(f"asked for {len(requests)}", file=sys.__stderr__, flush=True)
        for answer in scores(model, requests, limit):
            yield answer
            done += 1
            if done == most:
                os.kill(os.getpid(), signal.SIGKILL)

    harness.scores_as_they_come, harness.ANSWERS_A_ROUND = mortal, 4


if __name__ == "__main__":
    begin(int(sys.argv.pop(1)))
    main()

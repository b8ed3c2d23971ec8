"""Series of checkpoints, one for each step: find them, check, measure, evaluate and average them.

Begin with `members.py`, which finds the steps. `checkup.py` checks them (`audit.py` shows the order of work),
`tensor_stats.py` measures every tensor, `losses.py`, `task_scores.py` and `memorise.py` evaluate, `average.py`
averages. `resuming.py` lets long work continue after an interruption. The room may import `train` and every room below
it.
"""

"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on checkpoints of any format, without conversion.

Begin with `harness.py`, the model that lm-eval asks; `task_run.py` runs tasks and returns lm-eval's results with what
is known about the checkpoint; `demo/` holds four small tasks of our own, the group `castalia_demo`, which need no
network. Only modules of this room import lm-eval, which is optional: `pip install castalia[eval]`. The room may import
`evaluate`, `generate` and every room below them.
"""

import os

# Standard errors are computed in this process: lm-eval would fork others, which hang where a thread holds a lock.
# Older versions read the first name, newer ones the second, when they are imported.
for _name in ("DISABLE_MULTIPROC", "LMEVAL_DISABLE_MULTIPROC"):
    os.environ.setdefault(_name, "1")

"""lm-eval's own command line with checkpoints of this program as the model `castalia`.

lm-eval finds models in a table of its own and reads no entry points (0.4.10 to 0.5.0.dev1), so that the model has to be
added to the table in the process that runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - fills the table
from lm_eval.api.registry import MODEL_REGISTRY, register_model

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for, require_finite
from castalia.errors import ConfigError
from castalia.loading import build_model
from castalia.tasks.harness import TaskModel
from castalia.tasks.task_run import DEMO


class CastaliaLM(TaskModel):
    """The model `castalia` of lm-eval's command line."""

    def __init__(
        self,
        path: str,
        step: int | None = None,
        precision: str = "fp32",
        tokenizer: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        """`path`: a run or a checkpoint of any format. `batch_size`: texts that are written at a time.

        Raises ConfigError for other arguments, and what opening a checkpoint raises.
        """
        import torch

        if others:
            raise ConfigError(
                f"the model castalia has no {', '.join(others)}; its arguments are path, step, precision, tokenizer, "
                "device, batch_size and max_length"
            )
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if precision not in dtypes:
            raise ConfigError(f"precision={precision}: choose one of {', '.join(dtypes)}")
        checkpoint = open_checkpoint(path, step=step)
        for note in checkpoint.notes:
            print(f"note: {path}: {note}", file=sys.stderr)
        gpu = torch.cuda.is_available()  # lm-eval names one unless told, and its own model goes without it as well
        place = device if device and (gpu or not device.startswith("cuda")) else "cuda" if gpu else "cpu"
        model = build_model(checkpoint, place, dtypes[precision])
        require_finite(dict(model.named_parameters()), checkpoint.path)
        rows = batch_size if isinstance(batch_size, int) else 16  # "auto": passes are sized by tokens
        super().__init__(model, load_tokenizer_for(checkpoint, tokenizer), length=max_length, batch_size=rows)


def call(words: Sequence[str]) -> None:
    """lm-eval's command line, in this process. It knows the tasks of the demo unless others are included."""
    from lm_eval.__main__ import cli_evaluate

    if "castalia" not in MODEL_REGISTRY:
        register_model("castalia")(CastaliaLM)
    demo = ["--include_path", str(DEMO)] if words[:1] == ["run"] and "--include_path" not in words else []
    sys.argv = ["lm-eval", *words, *demo]
    cli_evaluate()

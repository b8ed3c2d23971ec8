"""`castalia lm-eval`: lm-eval's own command line, which knows the model `castalia`."""

from __future__ import annotations

from typing import Annotated

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}  # all words are lm-eval's


def command(
    words: Annotated[list[str] | None, typer.Argument(metavar="WORDS...", help="of lm-eval: run, ls, validate")] = None,
) -> None:
    """Call lm-eval with the model `castalia`, whose arguments are path, step, precision, tokenizer and max_length.

    \b
    Examples:
      castalia lm-eval run --model castalia --model_args path=runs/first --tasks castalia_demo --limit 4
      castalia lm-eval ls groups

    The help of lm-eval is that of `castalia lm-eval -- run --help`.
    """
    from castalia.cli.tasks import needs_lm_eval

    needs_lm_eval()
    from castalia.tasks.lm_eval_cli import call

    call(words or [])

"""`castalia merge-lora`: adapters and the model that they were trained on, as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="a run with adapters, or a folder that PEFT wrote")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to be written")],
    to: Annotated[Literal["hf", "neox", "native"], typer.Option(help="the format of OUT")] = "hf",
    base: Annotated[str | None, typer.Option(help="the model, where adapter_config.json does not name it")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="of the weights; default: the model's")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="run both on probe tokens and compare all tensors")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace OUT")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object at the end, all else on standard error")] = False,
) -> None:
    """Add LoRA adapters to the matrices they belong to, and write the resulting model.

    \b
    Examples:
      castalia merge-lora runs/tuned merged
      castalia merge-lora runs/tuned merged-neox --to neox --verify
    """
    from castalia.checkpoint.adapters import adapters_of
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.cli.convert import command as convert
    from castalia.errors import CheckpointError

    checkpoint = open_checkpoint(adapter, adapters=True, base=base)
    if adapters_of(checkpoint) is None:
        raise CheckpointError(
            f"{checkpoint.path} has no adapters to merge; for a plain model: castalia convert --to {to}"
        )
    # Every format but peft gets merged matrices.
    convert(adapter, out, to=to, base=base, dtype=dtype, verify=verify, force=force, as_json=as_json)

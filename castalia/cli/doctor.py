"""`castalia doctor`: what this machine offers, which fast paths it can take, and what each missing one costs."""

from __future__ import annotations

from typing import Annotated

import typer

from castalia.cli.render import print_table, say
from castalia.strict_json import to_json


def command(as_json: Annotated[bool, typer.Option("--json", help="one object with everything")] = False) -> None:
    """Show what this machine offers, which fast paths it can take, and what each missing one costs.

    \b
    Examples:
      castalia doctor
      castalia doctor --json
    """
    from castalia.train.machine_facts import (
        OPTIONAL,
        attention_kernels,
        fast_paths,
        gpu_text,
        installed,
        look_at_machine,
    )

    machine, paths, kernels, packages = look_at_machine(), fast_paths(), attention_kernels(), installed()
    if as_json:
        everything = {"machine": machine, "fast_paths": [path._asdict() for path in paths]}
        everything |= {"attention_kernels": dict(kernels), "packages": packages}
        print(to_json(everything, indent=1))
        return
    shown = machine | {"gpus": [gpu_text(gpu) for gpu in machine["gpus"]]}
    print_table("machine", ["", ""], [[name, _text(value)] for name, value in shown.items()])
    rows = [[path.name, "yes" if path.available else "no", path.detail] for path in paths]
    print_table("fast paths", ["path", "available", "why"], rows)
    for path in paths:
        if not path.available:
            say(f"missing: {path.name}: {path.cost}")
    cases = [[name, *by_dtype.values()] for name, by_dtype in kernels]
    print_table("kernels of attention, for heads of 128", ["case", "bf16", "fp16", "fp32"], cases)
    rows = [[name, number or "not installed", OPTIONAL[name]] for name, number in packages.items()]
    print_table("optional packages", ["package", "version", "used for"], rows)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)

"""`castalia replay`: one step of a run once more, to see what happened in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EXCERPT = 88  # characters, which fit on a line


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or a folder of GPT-NeoX checkpoints")],
    step: Annotated[int, typer.Option(min=1, help="counted from 1, as in metrics.jsonl and events.jsonl")],
    sequences: Annotated[int, typer.Option(min=0, help="show so many, those with the highest loss first")] = 8,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="processes; as many as the run had give the same bits")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object, with all sequences")] = False,
) -> None:
    """Compute one step of a run again, from the nearest checkpoint before it. The run's folder is only read.

    \b
    Examples:
      castalia replay runs/first --step 12
      castalia replay runs/first --step 12 --sequences 2 --json

    Shows loss and gradient norm beside the recorded ones, norms of all layers, and the batch, sequence by sequence.
    """
    from castalia.cli.opening import tell
    from castalia.cli.train import read_config
    from castalia.config.load import neox_config_files
    from castalia.parallel.launcher import relaunch
    from castalia.parallel.process_group import process_group
    from castalia.parallel.rendezvous import is_main, world_size
    from castalia.train.hardware import choose_device
    from castalia.train.run_folder import require_run
    from castalia.tune.replay import replay

    if not neox_config_files(run):
        require_run(run)
    if nproc is not None and nproc > world_size():  # else this is one of the processes already
        words = ["--step", str(step), "--sequences", str(sequences), *(["--json"] if as_json else [])]
        relaunch(nproc, ["replay", str(run), *words])
    config = read_config([str(run)])
    with process_group(choose_device(config.train.device).type, config.parallel.timeout):
        result = replay(run, step)
    if not is_main():
        return
    tell(result["notes"], str(run))
    if as_json:
        from castalia.observe.metrics import as_line

        print(as_line(result), end="")
    else:
        _show(result, sequences)


def _show(result: dict[str, Any], sequences: int) -> None:
    from castalia.cli.render import say

    step, begin = result["step"], result["checkpoint"]
    between = f", steps {begin + 1} to {step - 1} computed again" if begin < step - 1 else ""
    print(f"step {step}, from {f'the checkpoint of step {begin}' if begin else 'the beginning'}{between}")
    say(f"loss          {result['loss']:.6f}  ({_compared(result, 'loss')})", hang=14)
    say(f"gradient norm {result['grad_norm']:.6f}  ({_compared(result, 'grad_norm')})", hang=14)
    print(f"learning rate {result['lr']:.3e}")
    _show_layers(result["layers"])
    for row in result["sequences"][:sequences]:
        loss = f"loss {row['loss']:.4f} over " if row["loss"] is not None else ""
        print(f"\nsequence {row['row']}: {loss}{row['tokens']} tokens")
        for piece in row["pieces"]:
            print(f"    {piece['prefix']} document {piece['document']}, tokens {piece['start']} to {piece['stop'] - 1}")
        if row["text"] is not None:
            print(f"    {row['text'][:EXCERPT]!r}")
    hidden = len(result["sequences"]) - sequences
    if sequences and hidden > 0:
        print(f"\n{hidden} more sequences are not shown (--sequences, --json)")


def _compared(result: dict[str, Any], name: str) -> str:
    recorded, distance = result[f"recorded_{name}"], result[f"{name}_distance"]
    if recorded is None:
        return "nothing is recorded of it"
    if distance is None:
        return f"{recorded:.6f} is recorded"
    if distance == 0:
        return "as recorded, bit for bit"
    reasons = "another layout, number of threads, machine or version"
    if not result["repeats_bits"]:
        reasons = f"GPUs add in any order without train.deterministic=true; or {reasons}"
    return f"{recorded:.6f} is recorded, {distance:.1e} away: {reasons}"


def _show_layers(layers: dict[str, Any]) -> None:
    print(f"\n{'tensor':<34}{'weight norm':>13}{'gradient norm':>15}{'zeros in it':>13}")
    for name, weight in layers["weights"].items():
        gradient = layers["gradients"].get(name)
        numbers = f"{gradient['norm']:>15.4g}{gradient['zeros']:>13.1%}" if gradient else f"{'frozen':>15}"
        print(f"{name:<34}{weight:>13.4g}{numbers}")
    print(f"\n{'output of':<34}{'rms':>13}{'largest':>15}{'zeros in it':>13}")
    for name, output in layers["activations"].items():
        print(f"{name:<34}{output['rms']:>13.4g}{output['max']:>15.4g}{output['zeros']:>13.1%}")

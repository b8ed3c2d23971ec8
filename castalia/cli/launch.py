"""`castalia launch`: a script that starts a run on many machines."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from castalia.strict_json import to_json

SUBMIT = {"slurm": "sbatch", "torchrun": "bash", "k8s": "kubectl apply -f"}


def command(
    kind: Annotated[Literal["slurm", "torchrun", "k8s"], typer.Argument(help="what starts it")],
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...] | RUN", help="as for `castalia train`")
    ],
    nodes: Annotated[int | None, typer.Option(min=1, help="machines; default: those of the hostfile, or 1")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="default: the hostfile's slots")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="lines such as: node1 slots=8")] = None,
    name: Annotated[str | None, typer.Option(help="of the job; default: the first config's")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="how often dead processes are started again")] = 3,
    port: Annotated[int, typer.Option(min=1, max=65535, help="on the first machine, where all of them meet")] = 29500,
    image: Annotated[str, typer.Option(help="k8s: container with castalia installed")] = "castalia:latest",
    output: Annotated[Path | None, typer.Option(help="write the script to this file")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one object with the script, the layout and what stands in the way")
    ] = False,
) -> None:
    """Print a script that starts a run on many machines, to read and to submit.

    \b
    Examples:
      castalia launch slurm run.yml --nodes 4 --gpus-per-node 2
      castalia launch torchrun run.yml --gpus-per-node 2 --output start.sh

    Nothing is started. The layout and the batch are checked against the number of processes first, and all else that
    `castalia train` checks: what would keep the run from starting here is told, and stands in the script.
    """
    from castalia.cli.plan import with_vocabulary
    from castalia.cli.train import read_config
    from castalia.config.notes import folded
    from castalia.errors import ConfigError
    from castalia.files import write_text
    from castalia.launch import render
    from castalia.launch.hosts import chosen_hosts
    from castalia.parallel.rank_grid import check_run, layout
    from castalia.train.start_checks import find_obstacles, refuse

    hosts = chosen_hosts(hostfile, nodes, gpus_per_node)
    num_nodes = len(hosts) or nodes or 1
    gpus = hosts[0].slots if hosts else gpus_per_node
    if gpus is None:
        raise ConfigError("how many processes does each machine start? Give --gpus-per-node, or a --hostfile")
    if kind != "torchrun" and any(host.slots != gpus for host in hosts):
        raise ConfigError(f"{kind} gives every machine as many GPUs, but {hostfile} has different slots")
    if kind == "k8s" and hosts:
        raise ConfigError("k8s chooses the machines itself; give --nodes and --gpus-per-node in place of --hostfile")
    if kind == "torchrun" and num_nodes > 1 and not hosts:
        raise ConfigError(
            f"torchrun on {num_nodes} machines needs their names: give --hostfile, a file with a line such as "
            f"`node1 slots={gpus}` for each; or start on each of them, FIRST being the name of one: torchrun "
            f"--nnodes {num_nodes} --nproc-per-node {gpus} --rdzv-backend c10d --rdzv-id {Path(configs[0]).stem} "
            f"--rdzv-endpoint FIRST:{port} -m castalia train {shlex.join(configs)}"
        )
    config = read_config(configs)
    world = sum(host.slots for host in hosts) or num_nodes * gpus  # with torchrun, hosts may have different slots
    obstacles = find_obstacles(config, world)
    refuse(each for each in obstacles if each.kind == "error")
    if world > 1:  # with the vocabulary of a tokenizer that is not here, as far as its kind tells it
        check_run(with_vocabulary(config, None)[0], world)
    notes = [f"note: {note}" for note in folded(config.notes)]
    if config.parallel.tp > gpus:
        notes.append(f"warning: parallel.tp={config.parallel.tp} spans machines of {gpus} GPUs, which is slow")
    for line in () if as_json else (*notes, *obstacles):
        print(line, file=sys.stderr)
    grid = str(layout(config.parallel, world))
    job = render.LaunchJob(
        name or Path(configs[0]).stem,
        ["train", *configs],
        num_nodes,
        gpus,
        grid,
        hosts,
        max_restarts,
        port,
        [line for each in obstacles for line in str(each).splitlines()],
    )
    text = render.k8s(job, image) if kind == "k8s" else {"slurm": render.slurm, "torchrun": render.torchrun}[kind](job)
    if output is not None:
        write_text(output, text)
    start = f"{SUBMIT[kind]} {output or 'SCRIPT'}"
    if as_json:
        found: dict[str, Any] = {
            "script": text,
            "output": output and str(output),
            "start": start,
            "ranks": world,
            "layout": grid,
        }
        found |= {"nodes": num_nodes, "notes": notes, "in_the_way": [each._asdict() for each in obstacles]}
        print(to_json(found, indent=1))
    elif output is None:
        print(text, end="")
    else:
        print(f"wrote {output}; start it with: {start}")

"""`castalia plan`: parameters, memory, time and disk of a config, before it runs. No torch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from castalia.strict_json import to_json

if TYPE_CHECKING:
    from castalia.config.schema import RunConfig
    from castalia.plan.plan_parts import RunPlan
    from castalia.plan.run_plan import Hardware
    from castalia.plan.suggest import Verdict

BYTE_VOCABULARIES = {"char": 512, "bytes": 257}  # ids of the tokenizers that need no file


def command(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", help="files, presets, overrides; later ones win")
    ],
    gpus: Annotated[str | None, typer.Option(help="96x40GB, 8xH100, cpu")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="when the tokenizer's file is not here")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="share of the peak that matrix products reach")] = 0.4,
    suggest: Annotated[bool, typer.Option("--suggest", help="layouts that fit, and why the others lose")] = False,
    plot: Annotated[Path | None, typer.Option(help="picture of the memory, for example memory.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object with everything")] = False,
) -> None:
    """Work out parameters, memory, time and disk of a config before it runs.

    \b
    Examples:
      castalia plan pythia-1.4b --gpus 8xA100
      castalia plan run.yml --json

    The architecture alone is enough; what cannot be worked out from it is listed.
    """
    from castalia.cli.plan_text import print_report, print_suggestions
    from castalia.cli.train import split_words
    from castalia.config.load import load_config
    from castalia.errors import ConfigError
    from castalia.figures import check_picture
    from castalia.plan.run_plan import Hardware, report
    from castalia.train.run_facts import collect_run_facts

    check_picture(plot, "--plot")
    config, assumed = with_vocabulary(load_config(*split_words(configs), any_batch=True), vocab_size)
    hardware = None
    if gpus:
        from castalia.plan.devices import parse_gpus

        number, device, guess = parse_gpus(gpus)
        hardware = Hardware(number, device, mfu)
        assumed += [guess] if guess else []
    if suggest and hardware is None:
        raise ConfigError("--suggest compares layouts on given devices: add --gpus, for example --gpus 8xH100")
    known = collect_run_facts(config)
    if hardware:
        # The devices that were asked about, not those of this machine.
        known = replace(known, device="cpu" if hardware.device.name == "cpu" else "cuda")
    result = report(config, known, hardware)
    result.assumed = assumed + result.assumed
    result.warnings = [*config.notes, *result.warnings]
    suggested = None
    if hardware and result.sized and (suggest or not result.sized.memory.fits):
        suggested = suggestions(config, result, hardware, all_of_them=suggest)
    if as_json:
        print(to_json(result.as_json() | ({"suggestions": suggested} if suggested else {}), indent=1))
    else:
        print_report(result)
        if suggested:
            print_suggestions(suggested)
    if plot:
        if result.sized is None:
            raise ConfigError(f"--plot {plot}: there is no memory to show; {result.unknown[0]}")
        from castalia.plan.memory_plot import plot_memory

        plot_memory(result.layout, result.sized, plot)
        print(f"wrote {plot}", file=sys.stderr)  # standard output may hold JSON


def with_vocabulary(config: RunConfig, given: int | None) -> tuple[RunConfig, list[str]]:
    """The config with its vocabulary filled in where a flag, file or kind of tokenizer tells it; what was assumed."""
    if config.model is None or (given is None and config.model.vocab_size):
        return config, []
    size, source = (given, "--vocab-size") if given else tokenizer_size(config)
    return config.with_({"model.vocab_size": size}), [f"vocabulary {size}: {source}"] if size and not given else []


def tokenizer_size(config: RunConfig) -> tuple[int | None, str]:
    """The tokenizer's number of ids, read from its file without building it, and where it is from."""
    kind, path = config.tokenizer.kind, Path(config.tokenizer.path or "")
    files = [path / "tokenizer.json", path / "vocab.json"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file() and file.suffix == ".json"), None)
    if config.tokenizer.path and file:
        from castalia.data.tokenizer_folder import count_ids

        return count_ids(file), str(file)
    if kind in BYTE_VOCABULARIES:
        return BYTE_VOCABULARIES[kind], f"every {kind} tokenizer has it"
    if kind == "gpt2":
        return 50257, "GPT-2's, by the tokenizer's kind; its files are not here"
    return None, ""


def suggestions(config: RunConfig, result: RunPlan, hardware: Hardware, *, all_of_them: bool) -> dict:
    """The best layouts, or those that fit nearest to the config's own; JSON-ready."""
    from castalia.plan.run_plan import default_compute, job_of
    from castalia.plan.suggest import enough, losers, nearest, suggest

    batch = result.training.sequences_per_step
    if config.train.batch_size is None and batch % hardware.gpus:
        batch = -(-batch // hardware.gpus) * hardware.gpus
    job = job_of(config, hardware, batch, default_compute(config, hardware))
    ranked = suggest(job) if all_of_them else nearest(job, result.layout)
    fitting = [verdict for verdict in ranked if verdict.fits]
    return {
        "layouts_tried": len(ranked) if all_of_them else None,
        "layouts_that_fit": len(fitting) if all_of_them else None,
        "best": [_row(verdict) for verdict in fitting[:5]],
        "losers": [{"change": c, "why": why} for c, why in losers(job, fitting[0])] if all_of_them and fitting else [],
        "enough_gpus": None if fitting else enough(job),
    }


def _row(verdict: Verdict) -> dict:
    shape = verdict.layout
    names = ("tp", "pp", "dp", "zero", "micro_batch", "accumulation", "recompute", "sequence_parallel")
    return {name: getattr(shape, name) for name in names} | {
        "bytes": verdict.memory.total,
        "seconds_per_step": verdict.costs.total,
    }

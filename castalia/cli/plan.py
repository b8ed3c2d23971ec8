"""`castalia plan`: parameters, memory, time and disk of a config, before it runs. No torch."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from castalia.cli.streaming import MemoryOption
from castalia.config.setting import NEOX_DEFAULT
from castalia.strict_json import to_json

if TYPE_CHECKING:
    from castalia.config.schema import RunConfig
    from castalia.plan.plan_parts import RunPlan
    from castalia.plan.run_plan import Hardware
    from castalia.plan.step_cost import Verdict
    from castalia.plan.suggest import Suggestions

BYTE_VOCABULARIES = {"char": 512, "bytes": 257}  # ids of the tokenizers that need no file
GPT2_VOCABULARY = 50257
PUBLISHED = {"20B_tokenizer.json": 50277, "gpt2-vocab.json": GPT2_VOCABULARY}  # ids in files that NeoX's configs name


def command(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE...]", help="files, presets, overrides; later ones win")
    ],
    gpus: Annotated[str | None, typer.Option(help="96x40GB, 8xH100, cpu")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="when the tokenizer's file is not here")] = None,
    efficiency: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="share of the peak that matrix products reach; default: 0.4")
    ] = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="layouts that fit, and why the others lose")] = False,
    plot: Annotated[Path | None, typer.Option(help="a picture of the memory; default name: plan.png")] = None,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="instead: what writing with a model larger than memory reads, how fast"),
    ] = False,
    evaluate: Annotated[bool, typer.Option("--eval", help="the same for evaluating with it")] = False,
    memory: MemoryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object with everything")] = False,
) -> None:
    """Work out parameters, memory, time and disk of a config before it runs.

    \b
    Examples:
      castalia plan pythia-1.4b --gpus 8xA100
      castalia plan run.yml --json
      castalia plan runs/first --generate --memory 4GB

    The architecture alone is enough; what cannot be worked out from it is listed.
    """
    from castalia.cli.plan_text import print_report, print_suggestions
    from castalia.cli.train import read_config
    from castalia.errors import ConfigError
    from castalia.figures import check_picture
    from castalia.plan.run_plan import Hardware, divisible, report, with_steps
    from castalia.plan.step_cost import EFFICIENCY
    from castalia.train.run_facts import collect_run_facts
    from castalia.train.start_checks import find_obstacles

    if generate or evaluate:
        from castalia.cli.streaming import memory_bytes, print_checkpoint_plan, print_model_plan

        others = {"--gpus": gpus, "--suggest": suggest, "--plot": plot, "--eval": generate and evaluate}
        if idle := [name for name, value in others.items() if value]:
            raise ConfigError(f"{'--generate' if generate else '--eval'} has no use for {' and '.join(idle)}")
        if Path(configs[0]).is_dir() or ("/" in configs[0] and not Path(configs[0]).suffix):
            if len(configs) > 1 or vocab_size:
                extra = configs[1] if len(configs) > 1 else "--vocab-size"
                raise ConfigError(f"{configs[0]} is a checkpoint, whose model is what it is: leave out {extra}")
            print_checkpoint_plan(configs[0], generate, memory_bytes(memory), as_json)
        else:
            config, _ = with_vocabulary(read_config(configs, any_batch=True), vocab_size)
            if config.model is None or config.model.vocab_size is None:
                raise ConfigError("the vocabulary is not known: add --vocab-size")
            print_model_plan(config, generate, memory_bytes(memory), as_json)
        return
    if memory is not None:
        raise ConfigError("--memory needs --generate or --eval; the memory of training follows from the config")
    check_picture(plot, "--plot")
    written = read_config(configs, any_batch=True)
    config, assumed = with_vocabulary(written, vocab_size)
    hardware = None
    if gpus:
        from castalia.plan.devices import parse_gpus

        number, device, guess = parse_gpus(gpus)
        hardware = Hardware(number, device, efficiency or EFFICIENCY)
        assumed += [guess] if guess else []
    if suggest and hardware is None:
        raise ConfigError("--suggest compares layouts on given devices: add --gpus, for example --gpus 8xH100")
    known = collect_run_facts(config)
    if config.train.epochs:  # the schedule and the checkpoints follow from the steps
        config = with_steps(config, known, hardware)
        known = collect_run_facts(config)
    if hardware:
        # The devices that were asked about, not those of this machine.
        known = replace(known, device="cpu" if hardware.device.name == "cpu" else "cuda")
    result = report(config, known, hardware)
    result.assumed = assumed + result.assumed
    # A batch that does not divide is a warning of the plan, which takes the nearest.
    obstacles = find_obstacles(divisible(written, hardware.gpus if hardware else None)[0], result.layout.gpus)
    layouts = None
    if hardware and result.sized and (suggest or not result.sized.memory.fits):
        layouts = suggested(config, result, hardware, all_of_them=suggest)
    if as_json:
        more: dict[str, Any] = {"notes": config.notes, "obstacles": [each._asdict() for each in obstacles]}
        more |= {"suggestions": suggestions_json(layouts)} if layouts else {}
        print(to_json(result.as_json() | more, indent=1))
    else:
        print_report(result, config.notes, obstacles)
        if layouts:
            print_suggestions(layouts)
    if plot:
        if result.sized is None:
            raise ConfigError(f"--plot {plot}: there is no memory to show; {result.unknown[0]}")
        from castalia.plan.memory_plot import plot_memory

        plot_memory(result.layout, result.sized, plot, Path(configs[0]).stem)
        print(f"wrote {plot}", file=sys.stderr)  # standard output may hold JSON


def with_vocabulary(config: RunConfig, given: int | None) -> tuple[RunConfig, list[str]]:
    """The config with its vocabulary filled in where a flag, file or kind of tokenizer tells it; what was assumed."""
    if config.model is None or (given is None and config.model.vocab_size):
        return config, []
    size, source = (given, "--vocab-size") if given else tokenizer_size(config)
    return config.with_({"model.vocab_size": size}), [f"vocabulary {size:,}: {source}"] if size and not given else []


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
        return GPT2_VOCABULARY, "GPT-2's, by the tokenizer's kind; its files are not here"
    if path.name in PUBLISHED:
        return PUBLISHED[path.name], f"that of the published {path.name}; {path} is not here"
    if kind is None and not config.tokenizer.path and NEOX_DEFAULT in config.origins.values():
        return GPT2_VOCABULARY, "GPT-NeoX's default, GPT2BPETokenizer, as the config names no tokenizer"
    return None, ""


def suggested(config: RunConfig, result: RunPlan, hardware: Hardware, *, all_of_them: bool) -> Suggestions:
    """The plan's layout beside the fastest ones, or beside those that fit and are nearest to it."""
    from castalia.plan.run_plan import default_compute, job_of
    from castalia.plan.suggest import remedies, suggestions

    batch = result.training.sequences_per_step
    if config.train.batch_size is None and batch % hardware.gpus:
        batch = -(-batch // hardware.gpus) * hardware.gpus
    job = job_of(config, hardware, batch, default_compute(config, hardware))
    return suggestions(job, result.layout) if all_of_them else remedies(job, result.layout)


def suggestions_json(found: Suggestions) -> dict:
    """The same as an object of JSON; the given layout is the first row."""
    return {
        "layouts_tried": found.tried or None,
        "layouts_that_fit": found.fitting if found.tried else None,
        "given": _row(found.given),
        "better": [_row(verdict) for verdict in found.better],
        "losers": [{"change": change, "why": why} for change, why in found.losers],
        "enough_gpus": found.enough_gpus,
    }


def _row(verdict: Verdict) -> dict:
    return asdict(verdict.layout) | {
        "fits": verdict.fits,
        "bytes": verdict.memory.total,
        "seconds_per_step": verdict.costs.total,
        "costs": asdict(verdict.costs),
    }

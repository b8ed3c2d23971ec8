"""`castalia inspect`: what is inside a checkpoint of any format, in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from castalia.strict_json import to_json
from castalia.units import plural

if TYPE_CHECKING:
    from castalia.checkpoint.tensors import Checkpoint

ERAS = {
    "v1": "v1, the stack of Pythia and the 20B (to early 2023)",
    "v2": "v2, DeepSpeed 0.8 or later (from March 2023)",
    "w1-w3": "v2 with the matrices w1, w2, w3 of gated MLPs (May 2023 to September 2024)",
    "head": "since September 2024, when one MLP class replaced all others",
}
LENS_COLUMNS = 6  # tokens side by side


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="a run, a checkpoint of any format, a cached hub id")],
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor; read all values, verify them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object with everything")] = False,
    config: Annotated[str | None, typer.Option(help="the training config, in place of the folder's")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer file; tells the size without padding")] = None,
    gqa_rows: Annotated[Literal["old", "new"] | None, typer.Option(help="row order of NeoX's grouped queries")] = None,
    rms_eps: Annotated[
        Literal["inside", "outside"] | None, typer.Option(help="where NeoX's RMSNorm has its epsilon")
    ] = None,
    step: Annotated[int | None, typer.Option(help="which of several checkpoints; default: the latest")] = None,
    lens: Annotated[
        str | None, typer.Option(help="instead: what each layer predicts after each token of a text")
    ] = None,
) -> None:
    """Show what is inside a checkpoint of any format.

    \b
    Examples:
      castalia inspect runs/first
      castalia inspect runs/first --tensors --json
      castalia inspect runs/first --lens "a text"

    Reads names, headers and a sample of the values: a second or two for hundreds of gigabytes.
    """
    from castalia.checkpoint.opener import open_checkpoint
    from castalia.errors import ConfigError
    from castalia.examine.inspect import report

    hints: dict[str, Any] = {"config": config, "gqa_rows": gqa_rows, "rms_eps": rms_eps}
    if lens is not None:
        if tensors:
            raise ConfigError("--lens has no use for --tensors")
        _show_lens(path, step, hints, tokenizer, lens, as_json)
        return
    checkpoint = open_checkpoint(path, step=step, tolerant=True, adapters=True, **hints)
    contents = report(checkpoint, _vocabulary(checkpoint, tokenizer), full=tensors) | {
        "words": _words(checkpoint, tokenizer)
    }
    if as_json:
        print(to_json(contents, indent=1, default=str))
    else:
        print_report(contents)


def _show_lens(
    path: str, step: int | None, hints: dict[str, Any], tokenizer: str | None, text: str, as_json: bool
) -> None:
    """Tables of a few tokens each: a row for every layer, the last one first, and its likeliest token in each cell."""
    from castalia.checkpoint.restore import load_tokenizer_for
    from castalia.cli.opening import open_and_tell
    from castalia.cli.render import print_table, say
    from castalia.examine.residuals import logit_lens
    from castalia.loading import build_model
    from castalia.train.hardware import choose_device

    checkpoint = open_and_tell(path, step=step, **hints)
    words = load_tokenizer_for(checkpoint, tokenizer)
    found = logit_lens(build_model(checkpoint, choose_device("auto")), words, text)
    if as_json:
        print(to_json(found.as_json() | {"path": checkpoint.path, "step": checkpoint.progress.step}))
        return
    say("What each layer would predict after each token, and how sure it is. The last layer is the model itself.")
    for first in range(0, len(found.ids), LENS_COLUMNS):
        places = range(first, min(len(found.ids), first + LENS_COLUMNS))
        rows = [
            [str(row.layer), *(f"{_short(row.top[i][0].text)} {row.top[i][0].prob:.2f}" for i in places)]
            for row in reversed(found.rows)
        ]
        print()
        print_table(f"tokens {first} to {places[-1]}", ["after", *(_short(found.texts[i]) for i in places)], rows)


def _short(text: str) -> str:
    """A token that fits a narrow column, with marks for what cannot be seen."""
    text = text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if len(text) <= 7 else text[:6] + "\u2026"


def _vocabulary(checkpoint: Checkpoint, given: str | None) -> tuple[int | None, str]:
    """The number of ids without padding, and where it is known from. Raises DataError for a file that is not there."""
    from castalia.checkpoint.description import tokenizer_settings
    from castalia.cli.plan import tokenizer_size
    from castalia.config.schema import RunConfig, TokenizerConfig
    from castalia.errors import DataError

    if given and not Path(given).exists():
        raise DataError(f"--tokenizer {given}: there is no such file or folder")
    settings = TokenizerConfig(path=given) if given else tokenizer_settings(checkpoint)
    try:
        return tokenizer_size(RunConfig(tokenizer=settings)) if settings else (None, "")
    except DataError:  # damaged, as `_words` tells
        return None, ""


def _words(checkpoint: Checkpoint, given: str | None) -> dict[str, Any]:
    """What the folder says of its text, or why it cannot be read."""
    from castalia.checkpoint.description import model_folder, tokenizer_settings
    from castalia.config.schema import TokenizerConfig
    from castalia.data.tokenizer import describe_tokenizer, load_tokenizer
    from castalia.errors import CastaliaError

    settings = TokenizerConfig(path=given) if given else tokenizer_settings(checkpoint)
    neox = checkpoint.config is not None and checkpoint.config.neox_exact
    if settings is None:
        return {"unread": "no tokenizer is named; give one with --tokenizer"}
    try:
        return describe_tokenizer(load_tokenizer(settings, neox=neox, model=model_folder(checkpoint)))
    except CastaliaError as error:
        return {"unread": str(error)}


def print_report(contents: Mapping[str, Any]) -> None:
    """Print what `inspect` gives, as tables."""
    from castalia.cli.render import print_table, say

    say(f"{contents['path']}\n{contents['meaning']}\n")
    print_table("checkpoint", ["", ""], list(_about(contents)))
    print_table("words", ["", ""], list(_said(contents["words"])))
    facts = contents["architecture"]
    rows = [[name.replace("_", " "), _shown(fact["value"]), fact["source"]] for name, fact in facts.items()]
    print_table("architecture", ["", "value", "from"], rows)
    header = ["", "tensors", "mean", "std", "lowest", "highest", "beside its start"]
    print_table("values" + _how_many(contents), header, list(_values(contents)))
    if "tensors" in contents:
        header = ["tensor", "shape", "dtype", "mean", "std", "lowest", "highest", "zero rows"]
        print_table("tensors", header, [_tensor(each) for each in contents["tensors"]])
    for title, key in (("DISAGREEMENT", "disagreements"), ("ANOMALY", "anomalies"), ("note", "notes")):
        for line in contents[key]:
            say(f"{title}: {line}")
    if not contents["anomalies"]:
        print("no anomalies" + ("" if "tensors" in contents else " in the sample; --tensors reads everything"))


def _about(contents: Mapping[str, Any]) -> Iterator[list[str]]:
    from castalia.checkpoint.formats import FORMATS
    from castalia.units import memory_size

    files, progress, sizes, counts = contents["files"], contents["progress"], contents["bytes"], contents["parameters"]
    yield ["format", _title(contents)]
    yield ["layout", _layout(files)]
    if FORMATS[contents["format"]].steps or progress["step"]:
        skipped = f", {progress['skipped']:,} of them skipped" if progress["skipped"] else ""
        tokens = f", {progress['tokens']:,} tokens" if progress["tokens"] else ""
        yield ["step", f"{progress['step']:,}{skipped}{tokens}"]
    yield ["parameters", f"{counts['total']:,}"]
    yield ["  without embeddings", f"{counts['non_embedding']:,}"]
    if counts["as_neox_counts"] not in (None, counts["total"]):
        yield ["  as GPT-NeoX counts", f"{counts['as_neox_counts']:,} (copies on every rank)"]
    yield ["bytes", f"{sizes['total']:,} ({memory_size(sizes['total'])})"]
    for kind in ("weights", "masters", "moments", "rest"):
        each = f", {sizes[kind] / counts['total']:.3g} for each parameter" if kind != "rest" and counts["total"] else ""
        if sizes[kind]:
            yield [f"  {kind}", f"{sizes[kind]:,}{each}"]
    yield ["precision", ", ".join(f"{kind} {dtype}" for kind, dtype in contents["precision"].items())]
    yield from _training(contents)


def _training(contents: Mapping[str, Any]) -> Iterator[list[str]]:
    optimizer, words = contents["optimizer"], contents["vocabulary"]
    if optimizer:
        steps = ", ".join(f"{step:,}" for step in optimizer["steps"])
        yield ["optimizer", f"{optimizer['name']}, step {steps}, {optimizer['tensors']} of {optimizer['of']} tensors"]
        if optimizer["loss_scale"]:
            yield ["loss scale", ", ".join(f"{name} {value:g}" for name, value in optimizer["loss_scale"].items())]
    else:
        yield ["optimizer", "none stored"]
    if schedule := contents["progress"]["stored_schedule"]:
        yield ["stored schedule", ", ".join(f"{name} {_shown(value)}" for name, value in schedule.items())]
    if words["rows"]:
        logical = f", {words['logical']:,} of them used ({words['source']})" if words["logical"] else ""
        yield ["vocabulary", f"{words['rows']:,} rows{logical}"]
    if words["tokenizer"] and any(words["tokenizer"].values()):
        yield ["tokenizer", " ".join(str(value) for value in words["tokenizer"].values() if value)]


def _said(words: Mapping[str, Any]) -> Iterator[list[str]]:
    if "unread" in words:
        yield ["tokenizer", f"not read: {words['unread']}"]
        return
    yield ["tokenizer", f"{words['kind']}, {words['ids']:,} ids"]
    yield ["texts begin with", _token(words["begins"]) if words["begins"] else "no token of their own"]
    yield ["texts end at", ", ".join(map(_token, words["ends"])) or "no token"]
    for name, token in words["special"].items():
        yield [name, _token(token)]
    yield ["chat template", "yes" if words["chat_template"] else "no"]
    if words["generation"]:
        yield ["generation defaults", ", ".join(f"{key} {_shown(value)}" for key, value in words["generation"].items())]
    if words["note"]:
        yield ["note", words["note"]]


def _token(token: Mapping[str, Any]) -> str:
    return " ".join(str(part) for part in (token["id"], f"({token['text']})" if token["text"] else "") if part != "")


def _title(contents: Mapping[str, Any]) -> str:
    from castalia.checkpoint.formats import FORMATS

    files = contents["files"]
    kind = ERAS.get(files.get("era"), "") or files.get("model_type", "")
    version = f"DeepSpeed {files['version']}" if "version" in files else ""
    return ", ".join(part for part in (FORMATS[contents["format"]].title, kind, version) if part)


def _layout(files: Mapping[str, Any]) -> str:
    parts = [f"{axis.upper()} {files[axis]}" for axis in ("tp", "pp", "dp") if axis in files]
    parts += [f"ZeRO {files['zero']}"] if files.get("zero") else []
    parts += ["layer files" if files["pipeline_files"] else "one file a rank"] if "pipeline_files" in files else []
    return ", ".join([*parts, f"{plural(files['count'], 'file')}"])


def _how_many(contents: Mapping[str, Any]) -> str:
    if contents["sampled_values"] >= contents["parameters"]["total"]:
        return f" (all {contents['parameters']['total']:,})"
    return f" (a sample of {contents['sampled_values']:,}; --tensors reads all)"


def _values(contents: Mapping[str, Any]) -> Iterator[list[str]]:
    for row in contents["statistics"]:
        figures = [_shown(row[name]) for name in ("mean", "std", "low", "high")]
        yield [row["kind"], str(row["tensors"]), *figures, _start(row, contents["step"])]


def _start(row: Mapping[str, Any], step: int) -> str:
    """How the values compare with what they began as."""
    if not row["methods"]:
        return ""
    start, fits = row["start"], row["fits"]
    if step > 0 and start:
        began = row["methods"][start]
        return f"{row['std'] / began:.2f} x {start}'s {began:.3g}"
    if start and start in fits:
        return f"{start}, {row['methods'][start]:.3g}: fits"
    if start:
        also = f", but {', '.join(fits)} does" if fits else ""
        return f"{start}, {row['methods'][start]:.3g}: does not fit{also}"
    if step == 0 and fits:
        return f"like {', '.join(fits)}"
    nearest = min(row["methods"], key=lambda name: abs(row["std"] - row["methods"][name]))
    return f"nearest {nearest}, {row['methods'][nearest]:.3g}"


def _tensor(each: Mapping[str, Any]) -> list[str]:
    shape = " x ".join(map(str, each["shape"])) or "1"
    return [each["name"], shape, each["dtype"], *(_shown(each[n]) for n in ("mean", "std", "low", "high", "zero_rows"))]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

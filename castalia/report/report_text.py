"""A report as lines for a terminal or a file."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator

from castalia.observe.curves import curve, terminal_curves
from castalia.report.run_report import Report
from castalia.report.samples import Sample, Search

WIDTH = 100
BAR_WIDTH = 30

COMPRESSORS = "xz and gzip see this text alone, and begin with nothing; of longer texts they need less a byte"


def lines(report: Report, colored: bool) -> Iterator[str]:
    """None is longer than WIDTH, but for paths."""
    yield f"{report.name}, step {report.step:,}"
    yield from textwrap.wrap(report.sentence, WIDTH)
    yield ""
    yield f"held out: {report.held_out}"
    yield f"loss {report.score.loss:.4f} nats a token, perplexity {report.perplexity:,.2f}"
    if report.bars:
        yield from ("", "bits per byte, fewer are better")
        widest = max(bar.bits_per_byte for bar in report.bars)
        names = max(len(bar.name) for bar in report.bars)
        for bar in report.bars:
            drawn = "#" * max(1, round(BAR_WIDTH * bar.bits_per_byte / widest))
            yield f"  {bar.name:<{names}}  {bar.bits_per_byte:6.3f}  {drawn}"
        yield from textwrap.wrap(f"{COMPRESSORS}.", WIDTH)
    if report.sources:
        yield from ("", "by source")
        names = max(len(source.name) for source in report.sources)
        for source in report.sources:
            bits = "     -" if source.bits_per_byte is None else f"{source.bits_per_byte:6.3f}"
            figures = f"{source.bytes:>12,} bytes  {bits} bits a byte, xz {source.xz_bits_per_byte:.3f}"
            yield f"  {source.name:<{names}}  {figures}"
    with_losses = {name: found for name, found in report.records.items() if curve(found, "loss").x}
    if with_losses:
        yield ""
        yield terminal_curves(with_losses, colored)
    yield from ("", "samples")
    for sample in report.samples:
        yield from _sample(sample)
    yield from textwrap.wrap(searched(report.search), WIDTH)
    yield from ("", "the run")
    for row in report.rows:
        yield from textwrap.wrap(
            f"{row.what:<14}{row.value}" + (f" ({row.why})" if row.why else ""),
            WIDTH, initial_indent="  ", subsequent_indent=" " * 16,
        )  # fmt: skip
    for note in report.notes:
        yield from textwrap.wrap(f"note: {note}", WIDTH)
    yield from ("", "how to continue")
    for step in report.next:
        yield f"  {step.what}:"
        yield from _command(step.command)


def _command(command: str) -> Iterator[str]:
    """Lines that a shell reads as the one command, none broken inside a word."""
    lines = ["   "]
    for word in map(shlex.quote, shlex.split(command)):
        if len(lines[-1]) + len(word) > WIDTH - 3 and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    yield from lines


def _sample(sample: Sample) -> Iterator[str]:
    begin = f"after {sample.prompt!r}" if sample.prompt else "a whole document"
    yield f"  temperature {sample.temperature:g}, {begin}"
    for paragraph in sample.text.splitlines():
        yield from textwrap.wrap(paragraph, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
    yield from textwrap.wrap(likeness(sample), WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
    yield ""


def likeness(sample: Sample) -> str:
    """What a sample has in common with the training text; empty where nothing was found."""
    if sample.nearest is None:
        return ""
    nearest = sample.nearest
    shown = nearest.text if len(nearest.text) <= 80 else f"{nearest.text[:76]} ..."
    overlap = f"{nearest.bytes} bytes in a row stand in {nearest.source}: {' '.join(shown.split())!r}"
    return f"-> COPIED: {overlap}" if sample.copied else f"-> not copied; {overlap}"


def searched(search: Search | None) -> str:
    """What the samples were compared with, as a sentence."""
    if search is None:
        return "No training text is here, so whether samples are copied from it is not known."
    all_of_it = search.tokens == search.of_tokens
    part = f"all {search.tokens:,}" if all_of_it else f"{search.tokens:,} of {search.of_tokens:,}"
    usual = "" if search.usual_bytes is None else (
        f" Passages of held-out text, as long as the samples, share {search.usual_bytes:.0f} bytes in a row with it on "
        "average."
    )  # fmt: skip
    return (
        f"Compared with {part} tokens of the training text, exactly, for runs of about {search.shortest_bytes} bytes "
        f"or more.{usual}"
    )

"""A report as one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape

from castalia.observe.curves import Records, curve, loss_figure
from castalia.report.report_text import COMPRESSORS, searched
from castalia.report.run_report import Report
from castalia.report.samples import Sample

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 50rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { font-size: 1.15rem; } .small { color: #666; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .3rem .6rem .3rem 0;
  vertical-align: top; border-bottom: 1px solid #eee; font-weight: normal; } td.number { text-align: right; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; }
.bar { height: .7rem; border-radius: .2rem; background: #b9c4d0; } .bar.own { background: #1f77b4; }
.bar.run { background: #2ca02c; }
blockquote { margin: .4rem 0; padding: .6rem .9rem; background: #f6f7f8; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; } mark { background: #ffe9a8; } .prompt { font-weight: bold; }
.copied { color: #b00020; font-weight: bold; }
pre { background: #f6f7f8; padding: .5rem .8rem; border-radius: .4rem; overflow-x: auto; margin: .2rem 0 .8rem; }
"""


def page(report: Report) -> str:
    """The whole file."""
    title = escape(f"{report.name}, step {report.step:,}")
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f'<h1>{title}</h1><p class="verdict">{escape(report.sentence)}</p>',
            f'<p class="small">Held out: {escape(report.held_out)}. Loss {report.score.loss:.4f} nats a token, '
            f"perplexity {report.perplexity:,.2f}.</p>",
            *_bars(report),
            *_sources(report),
            *_curves(report),
            "<h2>What it writes</h2>",
            *map(_sample, report.samples),
            f'<p class="small">{escape(searched(report.search))}</p>',
            "<h2>What was chosen</h2>",
            _table((escape(row.what), escape(row.value), f'<span class="small">{escape(row.why)}</span>')
                   for row in report.rows),
            *(f'<p class="small">Note: {escape(note)}.</p>' for note in report.notes),
            "<h2>How to continue</h2>",
            *(f"{escape(step.what)}<pre>{escape(step.command)}</pre>" for step in report.next),
            "</body></html>\n",
        )
    )  # fmt: skip


def _table(rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def _bars(report: Report) -> Iterable[str]:
    if not report.bars:
        return
    yield "<h2>Bits per byte of this text</h2>"
    widest = max(bar.bits_per_byte for bar in report.bars)
    for bar in report.bars:
        kind = {"this run": " own", "run": " run"}.get(bar.kind, "")
        width = 100 * bar.bits_per_byte / widest
        yield (
            f'<div>{escape(bar.name)}: <b>{bar.bits_per_byte:.3f}</b>'
            f'<div class="bar{kind}" style="width:{width:.1f}%"></div></div>'
        )  # fmt: skip
    yield '<p class="small">Fewer are better; text without any pattern takes 8. '
    yield f"{COMPRESSORS}.</p>"


def _sources(report: Report) -> Iterable[str]:
    if not report.sources:
        return
    yield "<h2>By source</h2>"
    header = ("source", "bytes", "bits per byte", "xz")
    rows = (
        (
            escape(source.name),
            f"{source.bytes:,}",
            "" if source.bits_per_byte is None else f"{source.bits_per_byte:.3f}",
            f"{source.xz_bits_per_byte:.3f}",
        )
        for source in report.sources
    )
    yield _table((header, *rows))


def _curves(report: Report) -> Iterable[str]:
    records = {name: found for name, found in report.records.items() if curve(found, "loss").x}
    if records:
        yield f"<h2>How it learnt</h2>{_svg(records)}"


def _svg(records: Records) -> str:
    """The figure as a part of the page: without the names of standards, which look like addresses."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "castalia"}):
        figure = loss_figure(records)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)


def _sample(sample: Sample) -> str:
    text, nearest = escape(sample.text), sample.nearest
    caption = "Nothing as long as what was looked for stands in the training text." if nearest is None else ""
    if nearest is not None:
        text = text.replace(escape(nearest.text.strip()), f"<mark>{escape(nearest.text.strip())}</mark>", 1)
        verdict = '<span class="copied">Copied</span>' if sample.copied else "Not copied"
        caption = (
            f"{verdict}: {nearest.bytes} bytes in a row (marked) stand in {escape(nearest.source)}: "
            f"&#8230;{escape(nearest.before)}<mark>{escape(nearest.text)}</mark>{escape(nearest.after)}&#8230;"
        )
    begin = f'<span class="prompt">{escape(sample.prompt)}</span>' if sample.prompt else ""
    return (
        f'<p class="small">Temperature {sample.temperature:g}{"" if sample.prompt else ", a whole document"}</p>'
        f'<blockquote>{begin}{text}</blockquote><p class="small">{caption}</p>'
    )

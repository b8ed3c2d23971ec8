"""A choice in words: what, why, what to expect of it, and what more time would give."""

from __future__ import annotations

from castalia.quickstart.choose import MAX_PASSES, Choice
from castalia.quickstart.family import SIZES
from castalia.quickstart.look import Folder, describe
from castalia.quickstart.measured import (
    BASE_WIDTH,
    ERROR,
    LONGER_ERROR,
    MEASURED_BYTES,
    OTHER_TEXT_ERROR,
    SOURCE,
    XZ_BITS_PER_BYTE,
)
from castalia.units import duration, short_number

SAME_TEXT = 0.02  # bits per byte in which xz differs on texts that are alike
Rows = list[tuple[str, str]]


def about_text(folder: Folder) -> Rows:
    """What is read and what is passed over."""
    kinds = describe(folder.kinds)
    about = "" if folder.exact else "about "
    rows = [
        ("text", f"{about}{folder.bytes / 1e6:.3g} MB in {about}{folder.documents:,} documents, from {kinds}"),
        ("passed over", describe(folder.left_out) or "nothing"),
    ]
    if folder.bad:
        rows.append(("", f"{len(folder.bad):,} of the records, no text: {folder.bad[0]}"))
    odd = [key for key in folder.files if key != "text"]
    if odd:
        rows.append(("", f"of JSON records the field {', '.join(odd)} is read"))
    return rows


def reasons(choice: Choice) -> dict[str, str]:
    """Why each thing is what it is."""
    model = {
        "time": f"of {len(SIZES)} sizes the one with the lowest loss to expect after this time",
        "text": f"of {len(SIZES)} sizes the one with the lowest loss to expect; the text bears no larger one",
        "size": "the one nearest the size that you asked for",
    }
    rate = f"for this batch and depth, from a rate measured at this width by {SOURCE}"
    if choice.width != BASE_WIDTH:
        matrices = f"{choice.rate * BASE_WIDTH / choice.width:.2g}"
        rate = f"of vectors; {matrices} of matrices, by muP from a rate measured by {SOURCE}"
    stops = f"it stops before the time is over: after {MAX_PASSES} passes a model learns the text by heart"
    return {
        "model": model[choice.limit],
        "vocabulary": "learned from the text; more for more text, fewer for narrow models",
        "batch": "grows with the root of all tokens, because later steps need less noise",
        "learning rate": rate,
        "time": stops if choice.limit == "text" else "as asked, less what preparing and judging take",
    }


def about_choice(choice: Choice, machine: str) -> Rows:
    """The chosen model and training, a line each, with the reasons."""
    why, batch_tokens = reasons(choice), choice.batch_size * choice.length
    size = f"{short_number(choice.parameters)} parameters, {choice.layers} layers, {choice.width} wide"
    return [
        ("machine", f"{machine}: about {choice.tokens_per_second:,.0f} tokens/s with this model, measured just now"),
        ("model", size),
        ("", why["model"]),
        ("vocabulary", f"{choice.vocab_size:,} pieces of words"),
        ("", why["vocabulary"]),
        ("batch", f"{choice.batch_size} sequences of {choice.length} tokens: {batch_tokens:,} tokens a step"),
        ("", why["batch"]),
        ("learning rate", f"{choice.rate:g}"),
        ("", why["learning rate"]),
        ("training", f"{choice.steps:,} steps, {short_number(choice.tokens)} tokens, {duration(choice.seconds)}"),
        ("", f"{choice.passes:.2g} passes over the text{_limit(choice)}"),
    ]


def _limit(choice: Choice) -> str:
    if choice.limit != "text":
        return ""
    return f". IT STOPS THERE, BEFORE THE TIME IS OVER: after {MAX_PASSES} passes a model learns by heart"


def error_of(choice: Choice, folder: Folder) -> tuple[float, str]:
    """Share of the expected bits per byte by which they may be wrong, and why."""
    longer = choice.passes * folder.bytes > 1.1 * MEASURED_BYTES
    error = LONGER_ERROR if longer else ERROR
    if abs(folder.xz_bits_per_byte - XZ_BITS_PER_BYTE) >= SAME_TEXT:
        error += OTHER_TEXT_ERROR
        return error, ": the law was measured on another text, this one is judged by how xz shrinks it"
    if longer:
        return error, f": the law was measured on {MEASURED_BYTES / 1e6:.1f} MB, and longer runs came out better"
    return error, f", measured by {SOURCE}"


def about_loss(choice: Choice, twice: Choice | None, folder: Folder) -> Rows:
    """What to expect. `twice`: the choice for twice the time, where a time was asked for."""
    error, why = error_of(choice, folder)
    low, high = choice.bits_per_byte * (1 - error), choice.bits_per_byte * (1 + error)
    rows = [
        ("expect", f"{choice.bits_per_byte:.2f} bits for each byte of text that it never saw, {low:.2f} to {high:.2f}"),
        (
            "",
            f"give or take {error:.0%}{why}; a byte has 8 bits, and xz takes "
            f"{folder.xz_bits_per_byte:.2f} of this text",
        ),
    ]
    if twice is None:
        return rows
    more = f"{twice.bits_per_byte:.2f} bits with {short_number(twice.parameters)} parameters"
    if choice.bits_per_byte - twice.bits_per_byte < 0.005:
        more = "nothing: the text is used up; more text would help"
    return [*rows, ("twice the time", more)]

"""A comparison of two checkpoints in words and tables."""

from __future__ import annotations

from collections.abc import Iterator

from castalia.examine.diff import CAUSES, Diff
from castalia.wrapping import wrapped

SHOWN = 12  # tensors in the table


def lines(found: Diff) -> Iterator[str]:
    """What a comparison says, for people: structure, counts, the tensors that differ, kinds, layers, the verdict."""
    for line in found.structure:
        yield wrapped(f"  {line}")
    counts = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in found.counts.items())
    yield wrapped(f"{len(found.relations)} tensors in both: {counts or 'none'}")
    yield wrapped(found.optimizer)
    differing = [
        (name, relation)
        for name, relation in found.relations.items()
        if relation.kind != "identical" and relation.figures
    ]
    if differing:
        yield f"\n{'tensor':34} {'relation':15} {'max |Δ|':>9} {'relative':>9} {'corr.':>7}"
    for name, relation in differing[:SHOWN]:
        figures = relation.figures
        assert figures is not None
        numbers = f"{figures.max_diff:9.3g} {figures.relative:9.3g} {figures.correlation:7.3f}"
        yield f"{name:34} {relation.kind:15} {numbers}"
    if len(differing) > SHOWN:
        yield f"... and {len(differing) - SHOWN} more; --json lists all"
    if found.verdict in ("same_init", "unrelated", "fine_tune", "siblings"):
        yield f"\n{'kind':16} {'tensors':>7} {'std A':>10} {'std B':>10} {'B / A':>8}"
        for part in found.parts:
            yield f"{part.part:16} {part.tensors:7} {part.std_a:10.5f} {part.std_b:10.5f} {part.ratio:8.4f}"
    if found.verdict in ("fine_tune", "siblings"):
        yield "\nrelative change by layer"
        for layer, change in found.updates.items():
            yield f"{layer:16} {change:8.4f}"
    yield wrapped(f"\nverdict: {found.words}")
    if found.verdict == "same_init":
        yield "what is known to cause this with equal seeds:"
        for cause in CAUSES:
            yield wrapped(f"  - {cause}")

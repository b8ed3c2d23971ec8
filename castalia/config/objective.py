"""What follows from a run's objective."""

from __future__ import annotations

from castalia.config.schema import RunConfig, Source

PAIRED = ("dpo", "reward")  # objectives whose samples are two sequences


def needs_reference(config: RunConfig) -> bool:
    """Whether a reference model has to compute what the data do not hold."""
    objective, free = config.train.objective, config.preference.reference_free
    if objective not in ("dpo", "kto") or (objective == "dpo" and free):
        return False
    return not all(_has_references(source) for source in (*config.data.train, *config.data.valid))


def _has_references(source: Source) -> bool:
    return bool(source.references) and (source.rejected is None or bool(source.rejected.references))

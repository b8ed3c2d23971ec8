"""What a run's objective implies for its samples and for a reference model."""

from __future__ import annotations

from castalia.config.schema import RunConfig, Source

PAIRED = ("dpo", "orpo", "reward")  # objectives whose samples are two sequences


def needs_reference(config: RunConfig) -> bool:
    """Whether a reference model must compute log-probabilities that the data do not contain."""
    objective, free = config.train.objective, config.preference.reference_free
    if objective not in ("dpo", "kto") or (objective == "dpo" and free):
        return False
    return not all(_has_references(source) for source in (*config.data.train, *config.data.valid))


def _has_references(source: Source) -> bool:
    return bool(source.references) and (source.rejected is None or bool(source.rejected.references))

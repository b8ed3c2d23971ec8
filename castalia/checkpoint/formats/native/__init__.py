"""Castalia's own format: `read` opens a step's folder, `save` writes a run's, `write` converts to it."""

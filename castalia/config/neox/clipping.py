"""GPT-NeoX's gradient clipping: its current release hands `gradient_clipping` to DeepSpeed unless it is the default.

So a norm of exactly 1.0 clips nothing there. The first release (v1) clips at 1.0 as at any other norm.
"""

from __future__ import annotations

IGNORED_CLIP_NORM = 1.0


def effective_clip_norm(norm: float | None, release: str | None) -> float | None:
    """The norm that gradients are clipped to under a release of GPT-NeoX ("v1" or "head"), or, with None, under none.

    None where nothing is clipped.
    """
    return None if release == "head" and norm == IGNORED_CLIP_NORM else norm

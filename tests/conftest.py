"""Shared fixtures. The genuine files of the original systems lie at $CASTALIA_FIXTURES, else beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def fixtures_folder() -> Path | None:
    default = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    folder = Path(os.environ.get("CASTALIA_FIXTURES", default))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def fixtures() -> Path:
    folder = fixtures_folder()
    if folder is None:
        pytest.skip("needs the genuine fixtures: set CASTALIA_FIXTURES to their folder")
    return folder

"""Shared fixtures. The genuine files of the original systems lie at $CASTALIA_FIXTURES, else beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no reason to fail: no test is about time.
settings.register_profile("castalia", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("castalia")


def fixtures_folder() -> Path | None:
    default = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    folder = Path(os.environ.get("CASTALIA_FIXTURES", default))
    return folder if folder.is_dir() else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    folder = fixtures_folder()
    if folder is None:
        pytest.skip("needs the genuine fixtures: set CASTALIA_FIXTURES to their folder")
    return folder

"""Shared fixtures. The genuine files of the original systems lie at $CASTALIA_FIXTURES, else beside the checkout."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.goldens import Goldens

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Test files that are marked with `xdist_group` go to one worker, whose pool of processes they share.

    xdist's own way, `--dist loadgroup`, marks nothing under pytest 9.2 (xdist 3.8): it sets a field that is gone.
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def is_pooled(file: str) -> bool:
        return "pytest.mark.xdist_group(" in (config.rootpath / file).read_text(encoding="utf-8")

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "pool" if is_pooled(nodeid.split("::")[0]) else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    folder = fixtures_folder()
    if folder is None:
        pytest.skip("needs the genuine fixtures: set CASTALIA_FIXTURES to their folder")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-goldens", action="store_true", help="rewrite what lies in tests/goldens; without -n")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Goldens:
    return Goldens(request.config.getoption("--write-goldens"))

"""The stage on which commands are attacked, and the tiny runs of the training tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.scenes import Theatre
from tests.attacks.stage import Stage
from tests.train.conftest import corpus, one_thread, tiny  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    with Stage() as stage:
        yield Theatre(tmp_path_factory.mktemp("theatre"), stage)

"""The runs of the training tests."""

from tests.train.conftest import corpus, one_thread, tiny  # noqa: F401

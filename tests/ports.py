"""Ports for the processes of a test."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Below those that the system gives to whoever asks for any, as another test may before this one is used."""
    while True:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port := random.SystemRandom().randrange(10_000, 32_000)))
            return port

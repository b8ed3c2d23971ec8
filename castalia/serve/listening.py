"""The socket at which the server listens."""

from __future__ import annotations

import socket

from castalia.errors import ConfigError


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and its address as a URL. Raises ConfigError where it cannot be opened."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"--host {host} --port {port}: {reason}; choose another port, or 0 for any free one"
        ) from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"

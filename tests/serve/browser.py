"""A headless Chromium on this machine, whose pages must not complain."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT = 120_000  # ms: of a busy machine


def chromium() -> str | None:
    """The path of the browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browsing(path: str) -> Iterator[Any]:
    """The browser, as playwright knows it. Nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A page, and the list that takes its errors."""
    page, complaints = browser.new_page(**options), []
    page.set_default_timeout(WAIT)
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    visit(page, url)
    return page, complaints


def visit(page: Any, url: str) -> None:
    """Go to a view, and wait until it is drawn."""
    view = url.partition("#")[2].partition("?")[0] or "runs"
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector(f"main[data-ready={view}]")

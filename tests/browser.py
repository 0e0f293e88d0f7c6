"""A headless Chromium for tests: Debian's, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def executable() -> str:
    """The browser; the test is skipped without one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a profile of its own."""
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = executable()
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, **context: Any) -> Iterator[Any]:
    """A page from disk. In the end: no script failed, and nothing but the file was asked for."""
    complaints: list[str] = []
    asked: list[str] = []
    within = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **context})
    page = within.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(10_000)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    yield page
    within.close()
    assert complaints == []
    assert asked == [file.as_uri()]

"""Opens pages in a real browser, Debian's Chromium without a screen, and notes what goes wrong in them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

# What keeps Chromium from asking the network for things of its own.
_QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WIDTHS = {"desktop": 1280, "phone": 390}


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Starts Chromium. Skips the test if there is none, but where `KVJAX_BROWSER` says that there is one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert "KVJAX_BROWSER" not in os.environ, "expected a Chromium, found none"
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_QUIET))
        yield browser
        browser.close()


class Opened:
    """A page in a browser.

    Attributes:
      page: the page, with everything folded opened but tables of numbers, and every chart drawn.
      faults: errors and warnings of the console, and requests that left the page.
    """

    def __init__(self, browser: Browser, path: Path, *, width: str = "desktop", scheme: str = "light"):
        # Scripts that the tests bring are let past the page's own policy, which lets none in.
        context = browser.new_context(
            viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme, bypass_csp=True
        )
        self.page: Page = context.new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(path.as_uri())
        self.page.evaluate("document.querySelectorAll('details:not(.numbers)').forEach((one) => { one.open = true; })")
        self._scroll()

    def _note(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.faults.append(f"asked for {request.url}")

    def _scroll(self) -> None:
        """Scrolls through the page, so that every chart comes near the screen and is drawn."""
        place = 0
        while place < self.page.evaluate("document.documentElement.scrollHeight"):
            self.page.evaluate(f"window.scrollTo(0, {place})")
            self.page.wait_for_timeout(40)
            place += 900

    def close(self) -> None:
        """Closes the page."""
        self.page.context.close()

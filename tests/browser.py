"""Pages in headless Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# For containers and root: no sandbox, no GPU, and no requests of Chromium's own.
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The path of Chromium on this machine."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_chromium(), args=list(_FLAGS))
        try:
            yield started
        finally:
            started.close()


@dataclass
class Opened:
    """A page in a browser."""

    page: Page
    requests: list[str] = field(default_factory=list)  # addresses that it asked for, itself first
    complaints: list[str] = field(default_factory=list)  # its console, and errors of its script

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.page.evaluate(expression)


@contextlib.contextmanager
def opened(
    started: Browser, path: Path, *, width: int = 1280, scheme: str = "light", has_script: bool = True
) -> Iterator[Opened]:
    """A file in a window of that width."""
    context = started.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        java_script_enabled=has_script,
    )
    try:
        found = Opened(context.new_page())
        context.on("request", lambda request: found.requests.append(request.url))
        found.page.on("console", lambda message: found.complaints.append(message.text))
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.goto(path.resolve().as_uri())
        yield found
    finally:
        context.close()


def axe_violations(found: Opened) -> list[str]:
    """The findings of axe-core, a line each: rule, number of places, the first of them."""
    source = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    found.evaluate(source)
    results = found.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{item['id']} × {len(item['nodes'])}: {item['nodes'][0]['html'][:160]} {item['nodes'][0]['failureSummary']}"
        for item in results["violations"]
    ]

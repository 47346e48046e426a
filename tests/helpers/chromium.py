"""A real browser for tests: Debian's Chromium, driven by Playwright. `.ci/run` installs both."""

import contextlib
import shutil
from importlib.util import find_spec

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="no browser: install chromium (apt-get) and playwright (pip) to test the pages with clicks",
)


@contextlib.contextmanager
def open_browser():
    """A headless browser of Playwright's synchronous API, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(browser, address, width, height):
    """A page at an address, and what it asked for elsewhere or complained about: (page, faults)."""
    context = browser.contexts[0] if browser.contexts else browser.new_context(has_touch=True)  # one cache for all
    page, faults = context.new_page(), []
    page.set_viewport_size({"width": width, "height": height})
    own = ("/".join(address.split("/")[:3]), "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(address)
    try:
        yield page, faults
    finally:
        page.close()

"""A real browser without a window, for pages that the tests look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# as root it needs no sandbox; the rest keeps it from talking to anyone but the page's own server
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1600,2400"
).split()


def missing() -> str:
    """What is not installed, or an empty string."""
    wanted = {"chromium": "chromium", "chromedriver": "chromium-driver"}
    absent = [package for program, package in wanted.items() if shutil.which(program) is None]
    return f"needs a browser (Debian: {' '.join(absent)})" if absent else ""


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Selenium's driver of a headless Chromium with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()

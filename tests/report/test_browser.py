"""The page in a real browser: no errors on the console, no requests, it fits a phone and has a dark mode."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dmae_ds.output.theme import COLOURS
from tests.report.conftest import ODD_NAME

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
LIGHT, DARK = 1, 0
LIMIT_S = 120  # a bound on hangs, not on speed


@pytest.fixture(scope="module")
def open_page(tmp_path_factory):
    """A function that opens a file and returns (console lines, requested URLs, the DOM, a screenshot)."""
    if BROWSER is None:
        pytest.skip(
            "THE PAGE WAS NOT OPENED IN A BROWSER: chromium or chrome not found on this machine; install one"
        )
    folder = tmp_path_factory.mktemp("browser")

    def open_page(path, *, scheme=LIGHT, size=(1200, 2000)):
        log, screenshot = folder / "net.json", folder / "page.png"
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={folder / 'profile'}",
            "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            "--v=0",
            f"--log-net-log={log}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--hide-scrollbars",
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={screenshot}",
            "--dump-dom",
            path.as_uri(),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "HOME": str(folder)}
        )
        assert done.returncode == 0 and screenshot.is_file(), done.stderr
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        # Requests of the browser itself (dictionaries, updates) have no page as their initiator.
        asked = re.findall(
            r'"initiator":"(?!not an origin)[^"]*"[^\n]*?"url":"((?:https?|ftp|ws)[^"]*)"',
            log.read_text(errors="replace"),
        )
        return console, asked, done.stdout, np.asarray(Image.open(screenshot).convert("RGB"))

    return open_page


@pytest.fixture(scope="module")
def page(reported):
    return reported[1] / ODD_NAME / "comparison.html"


def test_a_page_with_errors_and_requests_would_be_caught(open_page, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://nowhere.invalid/a.png"><script>console.error("oh"); missing()</script>')
    console, asked, _, _ = open_page(page)
    assert any("oh" in line for line in console) and any("missing is not defined" in line for line in console)
    assert "http://nowhere.invalid/a.png" in asked


@pytest.mark.parametrize("scheme, side", [(LIGHT, 0), (DARK, 1)])
def test_the_page_opens_without_errors_in_its_colours(open_page, page, scheme, side):
    console, asked, dom, screenshot = open_page(page, scheme=scheme)
    assert console == [] and asked == []
    assert dom.count("<svg") == 13 and dom.rstrip().endswith("</html>")
    for name, least in (
        ("--surface", 0.5),
        ("--series-0", 0.0002),
        ("--series-1", 0.0002),
        ("--alarm", 0.0001),
    ):
        wanted = [int(COLOURS[name][side][start : start + 2], 16) for start in (1, 3, 5)]
        assert (np.abs(screenshot.astype(int) - wanted).max(axis=2) < 6).mean() > least, name


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(open_page, page, tmp_path, width):
    frame = tmp_path / "frame.html"  # a window can't be made as narrow as a phone, a frame can
    frame.write_text(
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe><pre></pre>'
        "<script>onload = () => {"
        "const root = document.querySelector('iframe').contentDocument.documentElement;"
        "const rights = [...root.querySelectorAll('svg,.board')].map(e => e.getBoundingClientRect().right);"
        "document.querySelector('pre').textContent ="
        " JSON.stringify([innerWidth && root.clientWidth, root.scrollWidth, rights]) }</script>"
    )
    _, _, dom, _ = open_page(frame)
    seen, needed, rights = json.loads(re.search("<pre>(.*?)</pre>", dom).group(1))
    assert seen == width and needed <= width
    assert len(rights) == 13 + 8 and max(rights) <= width

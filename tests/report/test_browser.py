"""The page in chromium, where it is installed: its script runs, nothing is fetched, a phone needs no sideways scrolling."""

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bitpress.report.document import Report, read_report
from bitpress.report.page import write_comparison, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]
PHONE = 390
# Run after the page's own script; writes what it finds into an attribute.
PROBE = """<script>
const failed = [];
addEventListener("error", (event) => failed.push(String(event.message)));
const at = document.querySelectorAll("button[data-cell]");
const told = () => document.querySelector("#weight h3")?.textContent ?? "";
const first = told();
at[at.length - 1]?.click();
document.body.dataset.probe = JSON.stringify({
  first, last: told(), bars: document.querySelectorAll("#weight svg path").length,
  pressed: document.querySelectorAll("[aria-pressed=true]").length,
  loaded: performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !name.startsWith("data:")),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth, failed,
  paper: getComputedStyle(document.body).backgroundColor,
});
</script>"""


def probe(text: str, folder: Path, *flags: str, width: int | None = None) -> dict[str, object]:
    """Open a page, with `width` in a frame that is so wide, and return what the probe finds."""
    import json

    page = text.replace("</body>", f"{PROBE}</body>")
    if width is not None:
        relay = "<script>parent.document.body.dataset.probe = document.body.dataset.probe</script></body>"
        frame = html.escape(page.replace("</body>", relay))
        page = f'<!doctype html><body><iframe style="width:{width}px;height:3000px;border:0" srcdoc="{frame}"></iframe></body>'
    (folder / "page.html").write_text(page, encoding="utf-8")
    usual = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
    )
    dumping = ("--virtual-time-budget=4000", "--dump-dom", f"file://{folder / 'page.html'}")
    assert CHROMIUM is not None
    done = subprocess.run([CHROMIUM, *usual, *flags, *dumping], capture_output=True, timeout=120, check=True)
    found = re.search(r'data-probe="([^"]*)"', done.stdout.decode())
    assert found is not None, done.stderr.decode()[-2000:]
    value = json.loads(html.unescape(found[1]))
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def report(published: Callable[[str], Path]) -> Report:
    return read_report(published("llama"))


def test_a_click_shows_a_weight_and_nothing_is_loaded(report: Report, tmp_path: Path) -> None:
    found = probe(write_page(report, "llama"), tmp_path)
    worst = max(report.layers, key=lambda row: row.error)
    assert found["first"] == worst.name, "the worst weight is shown first"
    assert found["last"] == report.layers[-1].name
    assert (found["bars"], found["pressed"]) == (2, 1)
    assert (found["loaded"], found["failed"]) == ([], [])


def test_a_phone_shows_the_whole_width_in_both_colors(report: Report, tmp_path: Path) -> None:
    light = probe(write_page(report, "llama"), tmp_path, width=PHONE)
    dark = probe(write_page(report, "llama"), tmp_path, "--force-dark-mode", width=PHONE)
    assert (light["wide"], dark["wide"]) == (0, 0)
    assert light["paper"] != dark["paper"]


def test_a_comparison_fits_a_phone_too(report: Report, tmp_path: Path) -> None:
    found = probe(write_comparison([("a" * 60, report), ("b", report)]), tmp_path, width=PHONE)
    assert (found["wide"], found["loaded"], found["failed"]) == (0, [], [])

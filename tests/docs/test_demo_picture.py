"""docs/demo.svg shows what the demo prints, and can be drawn again."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree as ET

from tests.support.paths import ROOT
from uffdaemon.demo.results import Answer, Cache, Fill, Mode, Proof, Report, Row, Temperature
from uffdaemon.demo.table import as_text

TEXT = "{http://www.w3.org/2000/svg}text"


def row(mode: Mode, temperature: Temperature, seconds: float) -> Row:
    pages = 1000 if mode == "eager" else 10
    size = 4096 * pages
    return Row(mode, temperature, 3, 1.0, 0.0, seconds, seconds, pages, size, pages, size, {})


REPORT = Report(
    image_path="image",
    image_bytes=4096 * 1000,
    image_pages=1000,
    image_passages=10,
    image_copies=1,
    build_seconds=None,
    sqlite="3.40.1",
    kernel="6.18",
    fault_around_pages=16,
    cache=Cache(cold=True, cached_fraction=0.0, note="cold"),
    rows=[
        row("eager", "cold", 0.1),
        row("lazy", "cold", 0.02),
        row("eager", "warm", 0.05),
        row("lazy", "warm", 0.001),
    ],
    answers=(Answer("query", 1, "file.py:1", "text"),),
    fill=Fill("cold", 4096 * 1000, 0.1, 4e7, {}, 10, 1e-5, 1e-3),
    proof=Proof("same", "same", 0, 0),
    kept=False,
)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(TEXT)]  # noqa: S314  # ours


def drawn(printed: str) -> list[str]:
    script = ROOT / "tools" / "draw_demo.py"
    ended = subprocess.run(
        [sys.executable, str(script)], input=printed, capture_output=True, text=True, check=True
    )
    return texts(ended.stdout)


def test_the_picture_has_the_table_and_the_bars() -> None:
    found = drawn(as_text(REPORT))
    assert {"100.0 ms", "20.0 ms", "50.0 ms", "1.0 ms"} <= set(found)
    assert "20.0 ms, 10 pages (1.0%)" in found


def test_the_picture_in_the_docs_is_of_this_demo() -> None:
    """Words alone: its figures are those of one run on one machine."""
    now = drawn(as_text(REPORT))
    heading = now[now.index("first answer") - 1 : now.index("first answer") + 4]
    shown = texts((ROOT / "docs" / "demo.svg").read_text())
    assert [text for text in shown if text in heading] == heading
    assert any(text.endswith("equals the file") for text in shown)

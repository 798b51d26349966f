"""The bar, the lines, and no progress at all."""

from __future__ import annotations

import io
import sys

import pytest

from uffdaemon.demo.progress import Bar, Lines, Silence, bytes_text, progress_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_at_each_quarter_and_no_more() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.stage("begin")
    for done in range(101):
        lines.advance("filling", done << 20, 100 << 20)
    lines.close()
    assert stream.getvalue().splitlines() == [
        "begin",
        "filling: 0 bytes of 100.0 MiB",
        "filling: 25.0 MiB of 100.0 MiB",
        "filling: 50.0 MiB of 100.0 MiB",
        "filling: 75.0 MiB of 100.0 MiB",
        "filling: 100.0 MiB of 100.0 MiB",
    ]


def test_a_bar_is_drawn_over_and_stays_when_it_is_full() -> None:
    stream = Terminal()
    bar = Bar(stream)
    bar.stage("begin")
    bar.advance("filling", 0, 4096)
    bar.advance("filling", 1, 4096)
    bar.advance("filling", 2048, 4096)
    bar.advance("filling", 4096, 4096)
    bar.close()
    drawn = stream.getvalue().split("\r\x1b[K")
    assert [text.strip() for text in drawn] == [
        "",
        "begin",
        f"filling [{'·' * 30}]   0 % of 4.0 KiB",
        f"filling [{'█' * 15}{'·' * 15}]  50 % of 4.0 KiB",
        f"filling [{'█' * 30}] 100 % of 4.0 KiB",
        "",
    ]
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("shown", [Lines, Bar])
def test_nothing_to_do_is_complete(shown: type[Lines | Bar]) -> None:
    stream = io.StringIO()
    shown(stream).advance("filling", 0, 0)
    assert "filling" in stream.getvalue()


def test_the_kind_suits_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(progress_for(json=False), Bar)
    assert isinstance(progress_for(json=True), Silence)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_for(json=False), Lines)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 << 19, "2.5 MiB"),
     (3 << 30, "3.0 GiB"), (1 << 42, "4.0 TiB")],
)  # fmt: skip
def test_sizes_for_people(count: int, text: str) -> None:
    assert bytes_text(count) == text

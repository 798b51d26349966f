"""Draw docs/demo.svg from what the demo prints.

    make demo | .venv/bin/python tools/draw_demo.py >docs/demo.svg

The lines are the demo's own.  The bars show the time to the first answer, to scale.
"""

from __future__ import annotations

import re
import sys
from html import escape
from typing import Final

WIDTH: Final = 880
MARGIN: Final = 28
LINE: Final = 20
GLYPH: Final = 7.83
"""Pixels: one character of a monospaced font at 13 px."""
ROW: Final = re.compile(
    r"(?P<cache>cold|warm) +(?P<how>eager|lazy) +(?P<ms>[\d.]+) ms .* (?P<pages>[\d,]+) "
    r"\( *(?P<share>[\d.]+%)"
)

STYLE: Final = """\
text { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
       font-size: 13px; fill: #d7dde5; }
.dim { fill: #93a1b3; }
.good { fill: #7ee2a8; }
rect.eager { fill: #5b6b80; }
rect.lazy { fill: #3fbf7f; }
"""


def text(x: float, y: float, line: str, kind: str = "") -> str:
    """One line of text.  Each of its columns has its own place, whatever the font."""
    name = f' class="{kind}"' if kind else ""
    return "\n".join(
        f'<text{name} x="{x + chunk.start() * GLYPH:.0f}" y="{y:g}" '
        f'textLength="{len(chunk[0]) * GLYPH:.0f}">{escape(chunk[0])}</text>'
        for chunk in re.finditer(r"\S+( \S+)*", line)
    )


def main() -> int:
    """Draw what comes in on standard input."""
    printed = sys.stdin.read().splitlines()
    rows = [row for row in map(ROW.match, printed) if row]
    if not rows:
        sys.stderr.write("draw_demo: there is no table of the demo on standard input\n")
        return 1
    begin = next(at for at, line in enumerate(printed) if line.startswith("cache restore"))
    end = printed.index("", begin)
    shown = [_first(printed, "image"), ""]
    shown += printed[begin:end]
    shown += ["", _first(printed, "proof")]

    parts: list[str] = [text(MARGIN, 40, "$ make demo", "good")]
    y = 40 + LINE * 1.5
    for line in shown:
        if line:
            kind = "dim" if line.startswith(("cache restore", "medians", "image")) else ""
            if line.startswith(("proof",)) or line.endswith("as fast"):
                kind = "good"
            parts.append(text(MARGIN, y, line, kind))
        y += LINE
    y += LINE / 2
    parts.append(text(MARGIN, y, "time to the first answer", "dim"))
    longest = max(float(row["ms"]) for row in rows)
    left, widest = MARGIN + 12 * GLYPH, 400
    for row in rows:
        y += LINE * 1.3
        width = max(float(row["ms"]) / longest * widest, 2)
        parts.append(text(MARGIN, y, f"{row['cache']} {row['how']}"))
        parts.append(
            f'<rect class="{row["how"]}" x="{left:g}" y="{y - 13:g}" width="{width:.1f}" '
            'height="17" rx="2"/>'
        )
        note = f"{row['ms']} ms, {row['pages']} pages ({row['share']})"
        parts.append(text(left + width + 10, y, note))
    height = y + MARGIN
    title = "What make demo prints: a lazy restore is many times faster to its first answer"
    sys.stdout.write(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}</style>\n"
        f'<rect width="{WIDTH}" height="{height:g}" rx="10" fill="#1b222c"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
    return 0


def _first(lines: list[str], word: str) -> str:
    return next(line for line in lines if line.startswith(word))


if __name__ == "__main__":
    sys.exit(main())

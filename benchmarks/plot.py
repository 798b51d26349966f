"""The rows as pictures: each ratio against its target, and how a fault scales; and the figures of
everybody beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from benchmarks.rows import Row

MET, MISSED, INFORMATION = "tab:green", "tab:red", "tab:gray"
OURS, OTHERS = "tab:blue", "tab:gray"


def _colour(row: Row) -> str:
    if row.met is None:
        return INFORMATION
    return MET if row.met else MISSED


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of `rows` to `path`, in the format that its suffix names."""
    ratios = [row for row in rows if row.ratio is not None][::-1]
    curves = [row for row in rows if row.points]
    height = 2 + 0.32 * len(ratios)
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(17, height), width_ratios=(3, 1))
    places = range(len(ratios))
    values = [row.ratio or 0.0 for row in ratios]
    low = [v - min(v, (r.ratio_range or (v, v))[0]) for v, r in zip(values, ratios, strict=True)]
    high = [max(v, (r.ratio_range or (v, v))[1]) - v for v, r in zip(values, ratios, strict=True)]
    bars.barh(places, values, color=[_colour(row) for row in ratios], alpha=0.8)
    bars.errorbar(values, places, xerr=(low, high), fmt="none", ecolor="black", elinewidth=0.7)
    for place, row in zip(places, ratios, strict=True):
        if row.target is not None:
            bars.plot([row.target] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
    bars.axvline(1, color="gray", linewidth=0.7, linestyle=":")
    bars.set_yticks(places, [f"{row.name}  /  {row.against}" for row in ratios], fontsize=8)
    bars.set_xlim(0, max([2.0, *(min(value, 4.0) for value in values)]) * 1.05)
    bars.set_xlabel("ours / theirs, less is better; thick mark: target; thin line: the rounds")
    for row in curves:
        sizes = [x / row.points[0][0] for x, _, _ in row.points]
        [line] = lines.plot(sizes, [own for _, own, _ in row.points], "o-", label=row.name)
        lines.plot(sizes, [other for _, _, other in row.points], ":", color=line.get_color())
    lines.set_xscale("log")
    lines.set_ylim(bottom=0)
    lines.set_xlabel("times the smallest")
    lines.set_ylabel("p50 of a fault, µs")
    lines.set_title("scaling; dotted: C")
    if curves:
        lines.legend(fontsize=7)
    _save(figure, path)


def draw_groups(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of rows that have a group: a panel for each, a bar for each label.
    Ours stand out."""
    groups = list(dict.fromkeys(row.group for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows))[::-1]
    width = 4 + 3.2 * len(groups)
    figure, panels = plt.subplots(
        1,
        len(groups),
        figsize=(width, 2 + 0.3 * len(labels)),
        sharey=True,
        squeeze=False,
    )
    for panel, group in zip(panels[0], groups, strict=True):
        members = [row for row in rows if row.group == group]
        shown = {row.label: row.median or 0.0 for row in members}
        for place, label in enumerate(labels):
            if label in shown:
                colour = OURS if label.startswith("uffdaemon") else OTHERS
                panel.barh(place, shown[label], color=colour, alpha=0.8)
                panel.text(shown[label], place, f" {shown[label]:.3g}", va="center", fontsize=7)
        panel.set_title(group, fontsize=9)
        panel.set_xscale("log")
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.set_xlabel(members[0].unit)
        panel.margins(x=0.2)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)

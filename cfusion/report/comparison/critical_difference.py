"""The critical-difference diagram: methods on a line of mean ranks; bars join those that do not differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cfusion.report.context import named, optimistic
from cfusion.report.number_words import p_text
from cfusion.report.svg import Plot, number, shortened
from cfusion.survival.ranks import Ranking

_ROW = 19.0
_BAR = 9.0
_SCALE_PX = 380.0
_SMALLEST_SIDE_PX = 170.0
_LETTER_PX = 7.2
_LONGEST_NAME = 36
"""Number of letters of a name; of a longer one, the middle is left out."""


def cd_diagram(ranking: Ranking, what: str, protocol: str) -> str:
    """Draw a ranking as SVG (after Demšar, 2006): the better half on the left, best on top."""
    methods = len(ranking.names)
    left = (methods + 1) // 2
    top = 62.0
    below = top + 16 + _BAR * len(ranking.cliques)
    height = below + _ROW * max(left, methods - left) + (12 + _ROW if optimistic(protocol) else 12)
    side = _side([shortened(name, _LONGEST_NAME) for name in ranking.names])
    plot = Plot((1, methods), (0, 1), width=_SCALE_PX + 2 * side, height=height, margins=(side, 0, side, 0))
    _scale(plot, ranking, top)
    for place, (name, rank) in enumerate(zip(ranking.names, ranking.mean_ranks, strict=True)):
        on_left = place < left
        row = place if on_left else methods - 1 - place
        x, y = plot.px(rank), below + _ROW * (row + 0.5)
        end = side - 24 if on_left else plot.width - side + 24
        plot.add(f'<path class="axis" d="M{number(x)} {number(top)}V{number(y)}H{number(end)}"/>')
        shown = shortened(name, _LONGEST_NAME)
        words = f"{shown}  {rank:.2f}" if on_left else f"{rank:.2f}  {shown}"
        plot.text(end + (-6 if on_left else 6), y + 4, words, "row", "end" if on_left else "start")
    places = dict(zip(ranking.names, ranking.mean_ranks, strict=True))
    for level, clique in enumerate(ranking.cliques):
        start, end = (plot.px(places[name]) for name in (clique[0], clique[-1]))
        y = top + 12 + _BAR * level
        plot.add(f'<path class="line series1 clique" d="M{number(start - 4)} {number(y)}H{number(end + 4)}"/>')
    if optimistic(protocol):
        plot.text(plot.width / 2, height - 10, named(protocol), "note")
    return plot.finish(f"Mean ranks of {what} over {cohorts_of(ranking)}", f"{rank_words(ranking)} {named(protocol)}")


def _side(names: Sequence[str]) -> float:
    """Return the px at each side of the scale that hold the longest name with its rank."""
    return max(_SMALLEST_SIDE_PX, 36 + _LETTER_PX * (max(map(len, names)) + len("  10.00")))


def cohorts_of(ranking: Ranking) -> str:
    """Describe the number of cohorts of a ranking."""
    return "1 cohort" if ranking.blocks == 1 else f"{ranking.blocks} cohorts"


def verdict(ranking: Ranking) -> str:
    """Describe which differences of a ranking are significant."""
    if math.isnan(ranking.critical_difference):
        return "With one cohort there is no test."
    alike = "; ".join(", ".join(clique) for clique in ranking.cliques)
    differing = f"No significant difference: {alike}." if alike else "All differences are significant."
    friedman = "" if math.isnan(ranking.p) else f"; Friedman {p_text(ranking.p)}"
    return f"Critical difference {ranking.critical_difference:.2f} (Nemenyi){friedman}. {differing}"


def _scale(plot: Plot, ranking: Ranking, top: float) -> None:
    methods = len(ranking.names)
    plot.add(f'<path class="axis" d="M{number(plot.px(1))} {number(top)}H{number(plot.px(methods))}"/>')
    for rank in range(1, methods + 1):
        plot.add(f'<path class="axis" d="M{number(plot.px(rank))} {number(top)}v-5"/>')
        plot.text(plot.px(rank), top - 9, str(rank))
    critical = ranking.critical_difference
    if not math.isnan(critical):
        start, end = plot.px(1), plot.px(1) + critical / max(1, methods - 1) * (plot.px(methods) - plot.px(1))
        end = min(end, plot.width - 4)
        a, b = number(start), number(end)
        plot.add(f'<path class="line series0" d="M{a} 30H{b}M{a} 26v8M{b} 26v8"/>')
        plot.text(start, 18, f"critical difference {critical:.2f}; Friedman {p_text(ranking.p)}", "note", "start")


def rank_words(ranking: Ranking) -> str:
    """Describe the mean ranks and which differences are significant; a phone has no room for the diagram."""
    ranks = ", ".join(f"{n} {r:.2f}" for n, r in zip(ranking.names, ranking.mean_ranks, strict=True))
    return f"Mean ranks, 1 is best: {ranks}. {verdict(ranking)}"

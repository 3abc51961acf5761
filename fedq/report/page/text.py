"""The report as plain text, for a terminal and a log: the headline, the table of arms, and what to know."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fedq.report.page.cards import make_cards
from fedq.report.page.cautions import Caution
from fedq.report.page.cells import Shown, results_table
from fedq.report.page.study import Study

_WIDTH = 100


def as_text(study: Study, cautions: Sequence[Caution]) -> str:
    """Return the text, lines of at most 100 characters but for tables."""
    parts = [study.title, "=" * len(study.title), ""]
    cards = make_cards(study)
    width = max(len(card.label) for card in cards)
    parts += [f"{card.label:<{width}}  {card.value}  ({card.detail})" for card in cards]
    parts += ["", *table(results_table(study)), ""]
    for caution in cautions:
        words = f"{caution.level}: {caution.kind}: {caution.text}"
        parts += textwrap.wrap(words, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts).rstrip() + "\n"


def table(shown: Shown) -> list[str]:
    """Return a table's lines, columns aligned; numbers to the right."""
    rows = [list(shown.headers), *([cell.text for cell in row] for row in shown.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = [str.rjust if shown.is_number(column) else str.ljust for column in range(len(widths))]
    lines = [
        "  ".join(pad[i](cell, width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return [lines[0].rstrip(), "  ".join("-" * width for width in widths), *(line.rstrip() for line in lines[1:])]

"""Which charts there are of some arms, and where they go: the page, and files of figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedq.report.page import breakdowns, curves
from fedq.report.page.spec import Bins, Chart, Choice, Front, Lines, Stack
from fedq.report.page.study import Study


@dataclass(frozen=True)
class PageCharts:
    """All charts of a page.

    Args:
        learning: Charts of metrics and loss over the rounds.
        tradeoff: Charts of results against what they cost.
        others: Charts that show all arms.
        choices: Charts that show one run at a time.
    """

    learning: Sequence[Lines]
    tradeoff: Sequence[Front | Lines]
    others: Sequence[Chart]
    choices: Sequence[Choice]

    def on_page(self) -> list[Chart]:
        """Return every chart once; of a choice its first variant."""
        return [*self.learning, *self.tradeoff, *self.others, *self._first_variants()]

    def as_files(self) -> list[Chart]:
        """Return the charts that are written as PNG and SVG: of a choice the first variant."""
        shown = [chart for chart in self._first_variants() if not _is_empty(chart)]
        return [*self.learning, *self.tradeoff, *self.others, *shown]

    def _first_variants(self) -> list[Chart]:
        return [chart for choice in self.choices for chart in next(iter(choice.variants.values()))]


def parts_of(choice: Choice) -> list[list[str]]:
    """Return for each chart of a choice the parts that any of its variants has, which its legend names."""
    places = zip(*choice.variants.values(), strict=True)
    return [_parts(twins) for twins in places]


def _parts(twins: Sequence[Chart]) -> list[str]:
    stacks = [twin for twin in twins if isinstance(twin, Stack)]
    return list(dict.fromkeys(part for twin in stacks for part, values in twin.parts.items() if any(values)))


def make_charts(study: Study) -> PageCharts:
    """Return the charts for which there is something to show."""
    others = [
        breakdowns.totals_chart(study),
        *breakdowns.make_up_charts(study),
        curves.bytes_by_round(study),
        breakdowns.phase_chart(study),
        breakdowns.accuracy_by_client(study),
    ]
    choices = [
        breakdowns.layer_choice(study),
        breakdowns.client_choice(study),
        breakdowns.label_choice(study),
        breakdowns.histogram_choice(study),
    ]
    return PageCharts(
        curves.learning_charts(study),
        curves.tradeoff_charts(study),
        [chart for chart in others if chart is not None],
        [choice for choice in choices if choice.variants],
    )


def _is_empty(chart: Chart) -> bool:
    return (isinstance(chart, Bins) and not chart.edges) or (isinstance(chart, Stack) and not chart.categories)

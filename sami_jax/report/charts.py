"""Numbers to line charts: pixel geometry, which the template draws as inline SVG."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from sami_jax.evaluation.statistics import Estimate
from sami_jax.report.measures import LENGTH, METRICS, MI, NATS, RATE, SPLIT_LABELS, Metric, Unit, iteration_label
from sami_jax.report.reading import Run

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 42, 56, 14, 38


@dataclasses.dataclass(frozen=True)
class Mark:
    """One point in pixels, with the ends of its error bar and a text for a pointer that rests on it."""

    x: float
    y: float
    low_y: float | None
    high_y: float | None
    title: str


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart in pixels; its label stands at its end."""

    style: int  # picks colour, dash and marker in the template
    opacity: float
    marks: Sequence[Mark]
    end_label: str
    end_label_x: float
    end_label_y: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart with everything the template needs to draw it; positions are in pixels."""

    title: str
    note: str
    description: str  # read aloud instead of the picture
    x_label: str
    y_ticks: Sequence[tuple[float, str]]
    x_ticks: Sequence[tuple[float, str]]
    references: Sequence[tuple[float, str]]  # horizontal lines
    series: Sequence[Series]


@dataclasses.dataclass(frozen=True)
class Line:
    """What one line of a chart shows, in data units."""

    label: str
    style: int
    end_label: str
    values: Sequence[tuple[float, Estimate]]  # (x, y), by x; at least one
    opacity: float = 1.0


def iteration_charts(run: Run) -> list[Chart]:
    """One chart per metric that was measured, a line per split; none while there is only the base."""
    if run.last_results is None:
        return []
    charts = (_iteration_chart(run, metric) for metric in METRICS)
    return [chart for chart in charts if chart is not None]


def _iteration_chart(run: Run, metric: Metric) -> Chart | None:
    lines = []
    for style, split in enumerate(run.last.splits):
        found = [(float(e.iteration), e.splits[split].estimates.get(metric.key)) for e in run.evaluations]
        values = [(x, estimate) for x, estimate in found if estimate is not None]
        if values:
            lines.append(Line(SPLIT_LABELS[split], style, metric.unit.short(values[-1][1].mean), values))
    if not lines:
        return None
    bounds = _bounds(lines)
    ceiling = run.last.ceiling_nats
    y_range = (0.0, 1.0) if metric.unit is RATE else None
    if metric is MI:
        y_range = (min(0.0, *bounds), ceiling * 1.08)
    if metric is LENGTH:
        y_range = (0.0, 1.1 * max(bounds) or 1.0)
    references = [(0.5, "no difference")] if metric.is_comparison else []
    return line_chart(
        metric.label + metric.unit.heading,
        metric.note.format(normalize=run.last.normalize),
        metric.unit,
        lines,
        x_label="iteration",
        x_names={float(e.iteration): str(e.iteration or "base") for e in run.evaluations},
        y_range=y_range,
        references=[(ceiling, f"ceiling {ceiling:.3f}")] if metric is MI else references,
        dodge=7.0,
    )


def training_charts(run: Run) -> list[Chart]:
    """Loss, mutual information and KL by step, a line per iteration."""
    n = len(run.train_steps)
    mi_note = "The same lower bound as in the evaluation, on the training batch."
    if run.train_eos:
        mi_note = "The evaluation's lower bound, on the training batch, end of sequence included."
    charts = []
    for key, title, note in (
        ("loss", "Loss (nats)", "InfoNCE on the training batch, plus any KL term: lower is better."),
        ("mi_nats", "Mutual information (nats)", mi_note),
        ("kl", "KL to the base (nats per token)", "How far the model has moved from its base."),
    ):
        lines = []
        for index, (iteration, steps) in enumerate(run.train_steps.items()):
            values = [(float(step.step), Estimate(getattr(step, key), None, None, 1)) for step in steps]
            opacity = round(1.0 - 0.62 * (n - 1 - index) / max(n - 1, 1), 2)
            lines.append(Line(iteration_label(iteration), index, str(iteration), values, opacity))
        if any(_bounds(lines)):  # without a KL term its line is zero throughout
            charts.append(line_chart(title, note, NATS, lines, x_label="step"))
    return charts


def line_chart(
    title: str,
    note: str,
    unit: Unit,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_names: Mapping[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    references: Sequence[tuple[float, str]] = (),
    dodge: float = 0.0,
) -> Chart:
    """Lays out a line chart.

    Args:
      title: what is drawn.
      note: one line under the title.
      unit: of the values.
      lines: at least one.
      x_label: what x is.
      x_names: a text for each x; None puts round numbers there.
      y_range: data units; None fits the data.
      references: horizontal lines (data units, label).
      dodge: pixels between the lines' x positions, so that error bars do not cover each other.
    """
    xs = sorted({x for line in lines for x, _ in line.values} | set(x_names or {}))
    y_ticks = nice_ticks(*(y_range or (min(_bounds(lines)), max(_bounds(lines)))))
    y_low, y_high = y_range or (y_ticks[0], y_ticks[-1])

    def place_x(x: float) -> float:
        share = 0.5 if xs[-1] == xs[0] else (x - xs[0]) / (xs[-1] - xs[0])
        return LEFT + 16 + share * (WIDTH - LEFT - RIGHT - 28)

    def place_y(y: float) -> float:
        share = min(max((y - y_low) / (y_high - y_low), 0.0), 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def mark(line: Line, x: float, e: Estimate, shift: float) -> Mark:
        low, high = (e.low, e.high) if e.low != e.high else (None, None)
        name = x_names[x] if x_names else f"{x_label} {x:g}"
        interval = "" if e.low is None else f" {unit.interval(e)}"
        return Mark(
            x=round(place_x(x) + shift, 1),
            y=place_y(e.mean),
            low_y=None if low is None else place_y(low),
            high_y=None if high is None else place_y(high),
            title=f"{line.label}, {name}: {unit.value(e.mean)}{interval}",
        )

    ends = [(x, place_y(estimate.mean)) for x, estimate in (line.values[-1] for line in lines)]
    label_ys = [y for _, y in ends]
    if len({x for x, _ in ends}) == 1:  # the labels stand below one another
        label_ys = _spread(label_ys, 13)
    half_width = dodge * (len(lines) - 1) / 2
    series = [
        Series(
            line.style,
            line.opacity,
            marks=[mark(line, x, estimate, dodge * index - half_width) for x, estimate in line.values],
            end_label=line.end_label,
            end_label_x=round(place_x(ends[index][0]) + half_width + 9, 1),
            end_label_y=label_ys[index],
        )
        for index, line in enumerate(lines)
    ]
    spoken = ["; ".join(dict.fromkeys((s.marks[0].title, s.marks[-1].title))) for s in series]
    x_ticks = x_names or {x: f"{x:g}" for x in nice_ticks(xs[0], xs[-1]) if xs[0] <= x <= xs[-1] and x.is_integer()}
    return Chart(
        title,
        note,
        description=". ".join([title, *spoken]) + ".",
        x_label=x_label,
        y_ticks=[(place_y(y), unit.tick(y)) for y in y_ticks if y_low - 1e-9 <= y <= y_high + 1e-9],
        x_ticks=[(round(place_x(x), 1), text) for x, text in x_ticks.items()],
        references=[(place_y(y), text) for y, text in references],
        series=series,
    )


def nice_ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    span = high - low if high > low else max(abs(high), 1.0)
    raw = span / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    # A bound within rounding error of a tick (a KL of -4e-11 at the first step) needs no further tick.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _bounds(lines: Sequence[Line]) -> list[float]:
    """Every value and interval end."""
    return [bound for line in lines for _, e in line.values for bound in (e.mean, e.low, e.high) if bound is not None]


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves label positions apart, keeping their order, until neighbours are `gap` pixels from each other."""
    moved = list(positions)
    for before, after in itertools.pairwise(sorted(range(len(moved)), key=lambda index: positions[index])):
        moved[after] = max(moved[after], moved[before] + gap)
    overflow = max(*moved, 0) - (HEIGHT - BOTTOM + 4)
    return [round(y - max(overflow, 0), 1) for y in moved]

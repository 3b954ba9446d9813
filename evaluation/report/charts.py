"""Charts of a page as SVG, drawn here so that the page's style sheet and script can reach their parts.

Colours are classes of ``templates/marks.css``, so that a chart follows the page into the dark and onto paper; as a file
of its own it brings that style sheet and the colours of ``templates/palette.css``. Marks have their values in
``data-tip``; lines need none, because the script reads their values off the axes, whose ranges are in ``data-x`` and
``data-y``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from evaluation.statistics.calibration import ReliabilityBins
from evaluation.statistics.intervals import Estimate

HUES = 10
"""Colours of series and classes, ``.h0`` to ``.h9``; of more, colours repeat."""

POINTS = 240
"""Points of a line at most: more are not visible."""

_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


class Scale(NamedTuple):
    """Range of an axis and its label."""

    low: float
    high: float
    label: str = ""
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a value is between the ends, 0 to 1 within them."""
        low, high, value = (math.log10(one) for one in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return round values within the range with their texts."""
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

        large = EngFormatter(sep="")
        if self.log and (decades := math.log10(self.high / self.low)) > 1:
            places = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)).tick_values(self.low, self.high)
        else:
            places = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        is_large = self.log or max(abs(self.low), abs(self.high)) >= 1e4
        margin = 1e-9 * (self.high - self.low)
        return [
            (float(one), large(float(one)) if is_large else f"{round(float(one), 12):g}")
            for one in places
            if self.low - margin <= one <= self.high + margin
        ]


def scale_of(values: Sequence[float] | NDArray[np.float64], label: str = "", *, log: bool = False) -> Scale:
    """Return a scale with a little room around finite values."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known) & ((known > 0) | (not log))]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if log:
        return Scale(low / 1.4, high * 1.4, label, True)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low - room, high + room, label)


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: above it; also what a screen reader calls it.
        root: the SVG element.
        legend: names of series or classes, each with its style classes.
        choices: whether the page offers to highlight one entry of the legend.
        caption: below it; empty for none.
    """

    title: str
    root: ElementTree.Element
    legend: list[tuple[str, str]] = field(default_factory=list)
    choices: bool = False
    caption: str = ""

    def __html__(self) -> Markup:
        """Return the SVG element, for a page that has the style sheet."""
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))

    def file(self) -> bytes:
        """Return an SVG file that stands alone, with its title and legend."""
        _, _, width, height = map(float, self.root.attrib["viewBox"].split())
        lines = self.legend[:24]
        whole = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
        whole.set("viewBox", f"0 0 {width:g} {height + 26 + 16 * len(lines):g}")
        whole.set("width", f"{1.5 * width:g}")
        _add(whole, "style").text = _style()
        _add(whole, "rect", cls="paper", width="100%", height="100%")
        _add(whole, "text", cls="title", x=8, y=18).text = _text(self.title)
        inner = _add(whole, "g", transform="translate(0 24)")
        inner.extend(list(self.root))
        for number, (name, key) in enumerate(lines):
            y = height + 36 + 16 * number
            _add(whole, "circle", cls=f"key {key}", cx=14, cy=y - 4, r=4)
            _add(whole, "text", x=24, y=y).text = _text(name)
        return ElementTree.tostring(whole, encoding="unicode").encode()


@cache
def _style() -> str:
    folder = files("evaluation.report") / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("palette.css", "marks.css"))


def _text(text: object) -> str:
    """A text without what XML cannot hold."""
    return _NOT_XML.sub("\ufffd", str(text))


def _add(
    parent: ElementTree.Element, tag: str, *, cls: str = "", tip: str = "", **values: object
) -> ElementTree.Element:
    """Add an element; numbers are rounded, underscores in names are hyphens."""
    found = {"class": cls} if cls else {}
    if tip:
        found["data-tip"] = _text(tip)
    for name, value in values.items():
        found[name.replace("_", "-")] = (
            f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        )
    return ElementTree.SubElement(parent, tag, found)


class _Frame:
    """A chart that is being drawn: an area with axes in it."""

    def __init__(
        self,
        title: str,
        x: Scale,
        y: Scale,
        size: tuple[float, float] = (420.0, 270.0),
        *,
        left: float = 50.0,
        axes: bool = True,
    ) -> None:
        width, height = size
        self.x, self.y = x, y
        self.left, self.right, self.top, self.bottom = (
            (left, width - 12.0, 8.0, height - 40.0) if axes else (4.0, width - 4, 4.0, height - 4)
        )
        self.root = ElementTree.Element(
            "svg", {"class": "chart", "viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": _text(title)}
        )
        for name, one in (("data-x", x), ("data-y", y)):
            self.root.set(name, f"{one.low!r} {one.high!r} {'log' if one.log else 'linear'}")
        self.root.set("data-frame", f"{self.left:g} {self.top:g} {self.right:g} {self.bottom:g}")
        if axes:
            self._axes()
        else:
            _add(
                self.root,
                "rect",
                cls="frame",
                x=self.left,
                y=self.top,
                width=self.right - self.left,
                height=self.bottom - self.top,
            )

    def _axes(self) -> None:
        for value, text in self.x.ticks():
            place = self.across(value)
            _add(self.root, "line", cls="grid", x1=place, x2=place, y1=self.top, y2=self.bottom)
            _add(self.root, "text", cls="tick", x=place, y=self.bottom + 15, text_anchor="middle").text = text
        for value, text in self.y.ticks():
            place = self.up(value)
            _add(self.root, "line", cls="grid", x1=self.left, x2=self.right, y1=place, y2=place)
            _add(self.root, "text", cls="tick", x=self.left - 6, y=place + 4, text_anchor="end").text = text
        middle = (self.left + self.right) / 2
        _add(self.root, "text", cls="label", x=middle, y=self.bottom + 33, text_anchor="middle").text = _text(
            self.x.label
        )
        middle = (self.top + self.bottom) / 2
        turned = f"rotate(-90 12 {middle:.1f})"
        _add(self.root, "text", cls="label", x=12.0, y=middle, text_anchor="middle", transform=turned).text = _text(
            self.y.label
        )

    def across(self, value: float) -> float:
        return self.left + self.x.share(value) * (self.right - self.left)

    def up(self, value: float) -> float:
        return self.bottom - self.y.share(value) * (self.bottom - self.top)

    def line(self, x: Sequence[float], y: Sequence[float], cls: str, name: str = "") -> None:
        points = " ".join(f"{self.across(a):.2f},{self.up(b):.2f}" for a, b in zip(x, y, strict=True))
        element = _add(self.root, "polyline", cls=f"line {cls}", points=points)
        if name:
            element.set("data-name", _text(name))

    def band(self, x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], cls: str) -> None:
        """Shade what is between two lines; clipped to the axes."""
        known = np.isfinite(low) & np.isfinite(high)
        x, edges = x[known], [np.clip(one[known], self.y.low, self.y.high) for one in (low, high)]
        corners = [*zip(x, edges[1], strict=True), *zip(x[::-1], edges[0][::-1], strict=True)]
        points = " ".join(f"{self.across(a):.2f},{self.up(b):.2f}" for a, b in corners)
        _add(self.root, "polygon", cls=f"band {cls}", points=points)

    def span(self, low: float, high: float, cls: str) -> None:
        """Shade a range of x."""
        begin, end = self.across(low), self.across(high)
        _add(
            self.root, "rect", cls=cls, x=begin, y=self.top, width=max(end - begin, 0.0), height=self.bottom - self.top
        )

    def upright(self, x: float, cls: str, low: float | None = None, high: float | None = None) -> None:
        """Draw a vertical line between two values of y, by default from edge to edge."""
        ends = self.bottom if low is None else self.up(low), self.top if high is None else self.up(high)
        _add(self.root, "line", cls=cls, x1=self.across(x), x2=self.across(x), y1=ends[0], y2=ends[1])

    def bar(self, left: float, right: float, low: float, high: float, cls: str, tip: str) -> None:
        x, y = self.across(left), self.up(high)
        _add(
            self.root,
            "rect",
            cls=cls,
            tip=tip,
            x=x + 0.5,
            y=y,
            width=max(self.across(right) - x - 1, 0.5),
            height=max(self.up(low) - y, 0.0),
        )

    def dot(self, x: float, y: float, cls: str, tip: str, radius: float = 3.5) -> None:
        _add(self.root, "circle", cls=cls, tip=tip, cx=self.across(x), cy=self.up(y), r=radius)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Finite points only, of many a part at equal distances with both ends."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) > POINTS:
        kept = np.linspace(0, len(x) - 1, POINTS).round().astype(np.int64)
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()


def line_chart(
    title: str,
    series: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    x_label: str,
    y_label: str = "",
    *,
    hues: Sequence[int] | None = None,
    dashed: Sequence[str] = (),
    begins: Sequence[float] = (),
    marked: float | None = None,
    unit: bool = False,
    diagonal: bool = False,
    bands: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] | None = None,
    caption: str = "",
) -> Chart:
    """Draw lines.

    Args:
        title: of the chart.
        series: x and y of each line, float64 ``(N,)``, by name; points that are not finite are left out.
        x_label: of the axis.
        y_label: of the axis.
        hues: colour of each line; by default their own ones in order.
        dashed: names of lines to be dashed.
        begins: values of x from which on the background is shaded, each a little more.
        marked: value of x with a dotted line.
        unit: whether both axes go from 0 to 1.
        diagonal: whether a line from corner to corner is drawn, of what chance does.
        bands: x, lower and upper ends of y around a line, float64 ``(N,)``, by its name.
        caption: of the chart.
    """
    every = [np.concatenate([values[axis] for values in series.values()]) for axis in (0, 1)]
    x, y = (
        (Scale(0.0, 1.0, label) for label in (x_label, y_label))
        if unit
        else (
            scale_of(every[0], x_label),
            scale_of(every[1], y_label),
        )
    )
    if not unit and len(every[0]) and np.nanmin(every[0]) >= 0:
        x = x._replace(low=0.0, high=float(np.nanmax(every[0])) or 1.0)
    frame = _Frame(title, x, y)
    for begin in begins:
        frame.span(min(begin, x.high), x.high, "shade")
    if marked is not None:
        frame.upright(marked, "mark")
    if diagonal:
        frame.line([x.low, x.high], [y.low, y.high], "guide")
    legend = []
    for number, (name, (own_x, own_y)) in enumerate(series.items()):
        key = f"h{(number if hues is None else hues[number]) % HUES}{' dashed' if name in dashed else ''}"
        if bands and name in bands:
            frame.band(*bands[name], key)
        frame.line(*_thinned(own_x, own_y), key, name)
        legend.append((name, key))
    return Chart(title, frame.root, legend if len(legend) > 1 else [], caption=caption)


def reliability_chart(title: str, bins: ReliabilityBins, score: str = "accuracy") -> Chart:
    """Draw the score of each bin as a bar, and as a line from its top the gap to the mean confidence."""
    frame = _Frame(title, Scale(0.0, 1.0, "confidence"), Scale(0.0, 1.0, score))
    total = max(1, int(bins.count.sum()))
    for low, high, count, accuracy, confidence in zip(
        bins.edges[:-1], bins.edges[1:], bins.count, bins.accuracy, bins.confidence, strict=True
    ):
        if not count:
            continue
        tip = f"confidence {confidence:.3f}, {score} {accuracy:.3f}; {count:,} samples ({count / total:.0%})"
        frame.bar(low, high, 0.0, accuracy, "bar h0", tip)
        frame.upright(float((low + high) / 2), "gap", accuracy, confidence)
        frame.dot(float((low + high) / 2), confidence, "gap", tip, 2.0 + 5.0 * math.sqrt(count / total))
    frame.line([0.0, 1.0], [0.0, 1.0], "guide")
    return Chart(title, frame.root, caption=f"Bars: {score}. Dots: mean confidence, larger with more samples.")


def _keys(names: Sequence[str]) -> list[tuple[str, str]]:
    """A legend with a colour for each name."""
    return [(name, f"h{number % HUES}") for number, name in enumerate(names)]


def map_chart(title: str, places: NDArray[np.float64], names: Sequence[str], classes: Sequence[str]) -> Chart:
    """Draw points without axes, coloured by class.

    Args:
        title: of the chart.
        places: float64 ``(N, 2)``.
        names: of each point, for the pointer.
        classes: of each point.
    """
    frame = _Frame(title, scale_of(places[:, 0]), scale_of(places[:, 1]), (380.0, 340.0), axes=False)
    every = sorted(set(classes))
    numbers = {name: number for number, name in enumerate(every)}
    radius = 3.5 if len(places) < 500 else 2.4
    for (x, y), name, own in zip(places.tolist(), names, classes, strict=True):
        frame.dot(x, y, f"dot h{numbers[own] % HUES}", f"{own}: {name}" if own else name, radius)
        frame.root[-1].set("data-class", str(numbers[own]))
    return Chart(title, frame.root, [] if every == [""] else _keys(every), choices=True)


def scatter_chart(
    title: str, x: NDArray[np.float64], y: NDArray[np.float64], names: Sequence[str], labels: tuple[str, str]
) -> Chart:
    """Draw points, float64 ``(N,)`` each, on equal axes with the diagonal on which both are equal."""
    both = scale_of(np.concatenate([x, y]))
    frame = _Frame(title, both._replace(label=labels[0]), both._replace(label=labels[1]), (420.0, 360.0))
    frame.line([both.low, both.high], [both.low, both.high], "guide")
    for a, b, name in zip(x.tolist(), y.tolist(), names, strict=True):
        frame.dot(a, b, "dot h0", f"{name}: {labels[0]} {a:.5g}, {labels[1]} {b:.5g}", 3.0 if len(x) < 500 else 2.0)
    return Chart(title, frame.root)


def histogram_chart(title: str, values: NDArray[np.float64], label: str) -> Chart:
    """Draw how often values, float64 ``(N,)``, occur, with lines at 0 and at their mean."""
    counts, edges = np.histogram(values, bins=min(40, max(8, round(len(values) ** 0.5))))
    x = Scale(*_with_zero(edges), label)
    frame = _Frame(title, x, Scale(0.0, 1.05 * counts.max(), "samples"), (420.0, 360.0))
    for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        frame.bar(low, high, 0.0, count, "bar h0", f"{low:.4g} to {high:.4g}: {count:,} samples")
    for value, cls in ((0.0, "mark"), (float(values.mean()), "gap")):
        frame.upright(value, cls)
    return Chart(title, frame.root, caption=f"Dotted: 0. Red: the mean, {values.mean():+.4g}.")


def _with_zero(edges: NDArray[np.float64]) -> tuple[float, float]:
    low, high = min(0.0, float(edges[0])), max(0.0, float(edges[-1]))
    room = 0.03 * (high - low) or 1.0
    return low - room, high + room


def on_the_front(cost: NDArray[np.float64], score: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no other beats, bool ``(N,)``; False where one of both is NaN.

    A point beats another if it costs at most as much and scores at least as high, one of both strictly.
    """
    usable = ~(np.isnan(cost) | np.isnan(score))
    no_worse = (cost[:, None] <= cost[None, :]) & (score[:, None] >= score[None, :])
    better = (cost[:, None] < cost[None, :]) | (score[:, None] > score[None, :])
    beaten = np.any(no_worse & better & usable[:, None], axis=0)
    front: NDArray[np.bool_] = np.logical_and(usable, np.logical_not(beaten))
    return front


def pareto_chart(
    title: str,
    names: Sequence[str],
    scores: Sequence[Estimate],
    cost: Sequence[float],
    labels: tuple[str, str],
    *,
    lower_is_better: bool = False,
) -> Chart:
    """Draw scores with their intervals against a cost; points on the front are joined.

    A model beaten by chance alone is off the front all the same, so the intervals are to be read with it.

    Args:
        title: of the chart.
        names: of N models.
        scores: of each.
        cost: of each; NaN where not known.
        labels: of the cost and the score.
        lower_is_better: whether low scores are good, as errors are; the axis then points down.
    """
    costs = np.asarray(cost, dtype=np.float64)
    values = np.array([one.value for one in scores])
    ends = np.array([[*one.interval] for one in scores]).ravel()
    y = scale_of(np.concatenate([values, ends]), labels[1])
    if lower_is_better:
        y = y._replace(low=y.high, high=y.low)
    frame = _Frame(title, scale_of(costs, labels[0], log=True), y)
    front = on_the_front(costs, -values if lower_is_better else values)
    order = [place for place in np.argsort(costs, kind="stable") if front[place]]
    frame.line([float(costs[place]) for place in order], [float(values[place]) for place in order], "guide")
    for number, (name, one, own) in enumerate(zip(names, scores, costs.tolist(), strict=True)):
        if math.isnan(own) or math.isnan(one.value):
            continue
        hue = f"h{number % HUES}"
        if not math.isnan(one.interval.low):
            frame.upright(own, f"whisker {hue}", *one.interval)
        interval = "[{:.4g}, {:.4g}]".format(*one.interval)
        tip = f"{name}: {labels[1]} {one.value:.4g} {interval}, {labels[0]} {own:,.4g}"
        frame.dot(own, one.value, f"dot {hue}{'' if front[number] else ' hollow'}", tip, 5.0)
    return Chart(title, frame.root, _keys(names), caption="Filled dots: no other is both cheaper and better.")


class Span:
    """An estimate as a cell of a table: its text, and on a page its interval on an axis that all cells share.

    Args:
        estimate: value and interval.
        text: how it is written.
        ends: of the axis; those outside are cut off.
        reference: a value that it is compared with, as a line; NaN for none.
        tone: ``good``, ``bad`` or empty.
    """

    def __init__(
        self, estimate: Estimate, text: str, ends: tuple[float, float], reference: float = math.nan, tone: str = ""
    ) -> None:
        self.estimate, self.text, self.ends, self.reference, self.tone = estimate, text, ends, reference, tone

    def __str__(self) -> str:
        return self.text

    @property
    def value(self) -> float:
        """By which a table is sorted."""
        return self.estimate.value

    def __html__(self) -> Markup:
        """Return the text with the interval as SVG; the text alone where the value is not known."""
        text = Markup('<span class="estimate">{}</span>').format(self.text)
        return text if math.isnan(self.value) else self.bar() + text

    def bar(self, width: float = 120.0, height: float = 16.0) -> Markup:
        """Return the interval as SVG, which says nothing that the text does not."""
        low, high = self.ends
        root = ElementTree.Element(
            "svg",
            {
                "class": "span",
                "viewBox": f"0 0 {width:g} {height:g}",
                "aria-hidden": "true",
                "preserveAspectRatio": "xMinYMid",
            },
        )

        def place(value: float) -> float:
            return 5 + (width - 10) * min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

        middle = height / 2
        _add(root, "line", cls="track", x1=5.0, x2=width - 5, y1=middle, y2=middle)
        if not math.isnan(self.reference):
            _add(
                root, "line", cls="reference", x1=place(self.reference), x2=place(self.reference), y1=1.0, y2=height - 1
            )
        if not math.isnan(self.estimate.interval.low):
            begin, end = (place(one) for one in self.estimate.interval)
            _add(
                root,
                "line",
                cls=f"interval {self.tone}".strip(),
                x1=begin,
                x2=max(end, begin + 1),
                y1=middle,
                y2=middle,
            )
        _add(root, "circle", cls=f"value {self.tone}".strip(), cx=place(self.value), cy=middle, r=4.0)
        return Markup(ElementTree.tostring(root, encoding="unicode"))

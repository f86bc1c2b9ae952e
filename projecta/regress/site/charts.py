"""Charts as matplotlib figures: SVG whose colours are the page's, or PNG on white."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Points = Sequence[tuple[float, float]]
Panel = Mapping[str, Points]  # the points of each line


class Style(NamedTuple):
    """Colours of a chart: lines, text, rules, and background elements."""

    lines: tuple[str, ...]
    ink: str
    rule: str
    soft: str


# Placeholders for the page's CSS variables, which `svg` puts in their place.
PAGE = Style(tuple(f"#a0000{i}" for i in range(1, 9)), "#b00001", "#b00002", "#b00003")
PRINT = Style(
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31", "#555555"),
    "#222222", "#d0d0d0", "#888888",
)  # fmt: skip
_VARIABLES = {
    PAGE.ink: "--ink", PAGE.rule: "--rule", PAGE.soft: "--soft",
    **{colour: f"--line-{i}" for i, colour in enumerate(PAGE.lines, 1)},
}  # fmt: skip
_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", "-.", ":")


def lines(
    panels: Mapping[str, Panel], x: str, y: str, style: Style = PAGE, dashed: Sequence[str] = ()
) -> Any:  # fmt: skip
    """One panel each, one line for each name, log-log; a panel with one x only has bars.

    Lines differ in colour, marker and dash.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure, axes = _figure(len(panels), 3.4, style)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        places = {point[0] for points in panel.values() for point in points}
        if len(places) == 1:
            heights = {name: {"": points[0][1]} for name, points in panel.items()}
            _draw_bars(axis, _by_group(heights), names, "{:.4g}", style)
            _title(axis, title, style)
            axis.set_xlabel(f"{x} {places.pop():.0f}")
            continue
        for name, points in panel.items():
            i = names.index(name)
            bound = name in dashed
            axis.plot(
                *zip(*sorted(points), strict=True), label=name,
                color=style.soft if bound else style.lines[i % len(style.lines)],
                marker="" if bound else _MARKERS[i % len(_MARKERS)], markersize=4, linewidth=1.4,
                linestyle="--" if bound else _DASHES[(i // len(style.lines)) % len(_DASHES)],
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        _few_ticks(axis)
        _title(axis, title, style)
        axis.set_xlabel(x)
    axes[0].set_ylabel(y)
    _legend(figure, axes, style)
    return figure


def bars(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]], y: str, style: Style = PAGE,
    form: str = "{:.4g}", width: float | None = None,
) -> Any:  # fmt: skip
    """Groups of bars: panel, group, and the bar's name; each carries its number."""
    names = list(dict.fromkeys(n for panel in panels.values() for group in panel.values() for n in group))
    figure, axes = _figure(len(panels), 3.4, style, width)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        _draw_bars(axis, panel, names, form, style)
        _title(axis, title, style)
    axes[0].set_ylabel(y)
    _legend(figure, axes, style)
    return figure


def _draw_bars(
    axis: Any, panel: Mapping[str, Mapping[str, float]], names: Sequence[str], form: str, style: Style
) -> None:
    thick = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        at = [
            j + (i - (len(names) - 1) / 2) * thick for j, group in enumerate(panel.values()) if name in group
        ]
        if not at:  # its handle in the legend would have no colour
            continue
        heights = [group[name] for group in panel.values() if name in group]
        drawn = axis.bar(at, heights, thick * 0.92, label=name, color=style.lines[i % len(style.lines)])
        axis.bar_label(drawn, [form.format(h) for h in heights], padding=2, fontsize=7, color=style.ink)
    axis.set_xticks(range(len(panel)), list(panel))
    axis.axhline(0, color=style.rule, linewidth=0.8)
    axis.margins(y=0.15)


def _by_group(bars: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{name: {group: height}} as {group: {name: height}}."""
    groups: dict[str, dict[str, float]] = {}
    for name, heights in bars.items():
        for group, height in heights.items():
            groups.setdefault(group, {})[name] = height
    return groups


def scatter(groups: Mapping[str, Points], x: str, y: str, style: Style = PAGE) -> Any:
    """Points; each group has a colour and a marker."""
    figure, (axis,) = _figure(1, 4.2, style)
    for i, (name, points) in enumerate(groups.items()):
        axis.plot(
            [p[0] for p in points], [p[1] for p in points], _MARKERS[i % len(_MARKERS)],
            color=style.lines[i % len(style.lines)], label=name, markersize=5,
        )  # fmt: skip
    axis.set(xlabel=x, ylabel=y)
    _legend(figure, [axis], style)
    return figure


def roofline(points: Mapping[str, Points], bandwidth: float, arithmetic: float, style: Style = PAGE) -> Any:
    """Roofline: bounds by arithmetic and memory at each intensity, and measured points."""
    figure, (axis,) = _figure(1, 3.8, style)
    corner = arithmetic / bandwidth
    low, high = min(0.25, corner / 8), max(64.0, corner * 8)
    axis.plot(
        [low, corner, high],
        [low * bandwidth, arithmetic, arithmetic],
        color=style.ink,
        linewidth=1.4,
        label="bound",
    )
    for i, (name, own) in enumerate(points.items()):
        axis.plot(
            [p[0] for p in own], [p[1] for p in own], _MARKERS[i % len(_MARKERS)],
            color=style.lines[i % len(style.lines)], label=name, markersize=5,
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10^9 operations per second")
    axis.set(xlim=(low, high), ylim=(None, 2 * arithmetic))
    _legend(figure, [axis], style)
    return figure


def history(
    values: Sequence[float],
    marks: Sequence[int],
    level: float | None,
    band: float | None,
    style: Style = PAGE,
) -> Any:
    """A series over commits: vertical lines where machine or packages changed, the noise as a band."""
    figure, (axis,) = _figure(1, 1.6, style, width=4.4)
    if level is not None and band is not None:
        axis.axhspan(level / (1 + band), level * (1 + band), color=style.lines[0], alpha=0.15, linewidth=0)
    marker = "o" if len(values) <= 40 else ""
    axis.plot(range(len(values)), values, color=style.lines[0], linewidth=1.2, marker=marker, markersize=2)
    for mark in marks:
        axis.axvline(mark - 0.5, color=style.soft, linewidth=0.9, linestyle="--")
    axis.set_ylim(0, 1.15 * max(values))
    axis.set_xticks([0, len(values) - 1] if len(values) > 1 else [0])
    axis.set_xticklabels(["oldest", "newest"] if len(values) > 1 else ["newest"])
    axis.yaxis.set_major_locator(_ticks(3))
    axis.tick_params(labelsize=11)
    return figure


def _title(axis: Any, text: str, style: Style) -> None:
    axis.set_title(text, color=style.ink, fontsize=9)


def _few_ticks(axis: Any) -> None:
    """1, 2 and 5 of each decade, or 1 and 3, if there are few decades."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_ylim()
    if high < 1e3 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e2 * low else (1.0, 3.0)))
    axis.yaxis.set_major_formatter("{x:g}")


def _ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _figure(panels: int, height: float, style: Style, width: float | None = None) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or max(5.6, 4.2 * panels), height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.grid(color=style.rule, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(style.rule)
        axis.tick_params(colors=style.ink, which="both", labelsize=8)
        for text in (axis.xaxis.label, axis.yaxis.label, axis.title):
            text.set(color=style.ink, fontsize=9)
    return figure, axes


def _legend(figure: Any, axes: Sequence[Any], style: Style) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) > 1:
        figure.legend(
            list(found.values()), list(found), loc="outside lower center",
            ncols=min(4 if max(map(len, found)) < 22 else 3, len(found)),
            frameon=False, fontsize=8, labelcolor=style.ink,
        )  # fmt: skip


def svg(figure: Any) -> str:
    """A figure in the style PAGE as SVG for a page; hidden from screen readers, which get the numbers."""
    import matplotlib

    text = io.StringIO()
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "projecta", "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.S)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var({variable})")
    drawn = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", drawn)
    drawn = re.sub(r'="[^"]*"', lambda place: re.sub(r"(\d+\.\d{2})\d+", r"\1", place[0]), drawn)
    wide, high = (72 * inches for inches in figure.get_size_inches())
    start = f'<svg viewBox="0 0 {wide:g} {high:g}" style="max-width: {1.35 * wide:.0f}px" aria-hidden="true">'
    return re.sub(r"<svg [^>]*>", start, drawn, count=1)


def save(figure: Any, path: Path, caption: str) -> Path:
    """Write a figure in the style PRINT as PNG, with a caption above."""
    figure.patch.set(alpha=1, facecolor="white")
    figure.suptitle(caption, fontsize=7, color=PRINT.soft)
    figure.savefig(path, dpi=150)
    return path

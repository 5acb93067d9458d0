"""A figure in words: what a sighted reader sees, from what is drawn in it."""

import matplotlib.category
import matplotlib.ticker
import numpy as np


def described(figure) -> str:
    """A figure in words, panel by panel: its title, its axes, and the ends and extremes of each labelled series.

    Raises: ValueError if a panel is empty or its axes have no labels.
    """
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    found = [_panel(axes, panels) for axes in panels]
    if not found:
        raise ValueError("a figure without axes has no text alternative: draw into it, or set figure.alt")
    return " ".join(found)


def _panel(axes, panels) -> str:
    x = axes.get_xlabel() or panels[-1].get_xlabel() or axes.figure.get_supxlabel()  # of shared axes one has the label
    y = axes.get_ylabel() or panels[0].get_ylabel() or axes.figure.get_supylabel()
    title = axes.get_title(loc="left") or axes.get_title()
    series = _series(axes)
    if not series or not (x or y or title):
        raise ValueError(
            f"a panel {'that is empty' if not series else 'without labels of its axes'} has no text alternative: "
            "draw and label it, or set figure.alt"
        )
    kind = "Map" if axes.images else "Bars" if axes.containers and not axes.lines else "Chart"
    logarithmic = [name for name, scale in (("x", axes.get_xscale()), ("y", axes.get_yscale())) if scale == "log"]
    names = " against ".join(name for name in (y, x) if name)
    head = f"{kind}{f' of {names}' if names else ''}{f', {title}' if title else ''}"
    head += f" (logarithmic in {' and '.join(logarithmic)})" if logarithmic else ""
    return " ".join(f"{head}: {'; '.join(series)}.".split())


def _series(axes) -> list[str]:
    """What is drawn, one phrase each: all that has a label, and up to three things that have none beside it."""
    drawn = [(line.get_label(), _line(axes, line)) for line in axes.lines if len(line.get_xdata())]
    drawn += [(_label(bars), _bars(axes, bars)) for bars in axes.containers if hasattr(bars, "datavalues")]
    drawn += [(lot.get_label(), _collection(lot)) for lot in axes.collections]
    drawn += [("map", shading(axes, image)) for image in axes.images]
    barred = {bar for bars in axes.containers for bar in bars}
    drawn += [(patch.get_label() or "_", _span(patch)) for patch in axes.patches if patch not in barred]
    plain = [phrase for name, phrase in drawn if name.startswith("_")]
    labelled = [f"{' '.join(name.split())}: {phrase}" for name, phrase in drawn if not name.startswith("_")]
    return labelled + (plain if len(plain) <= 3 or not labelled else [])


def _label(bars) -> str:
    """A histogram has its label at the first bar, other bars have it together."""
    label = bars.get_label()
    return bars.patches[0].get_label() or "_" if label.startswith("_") else label


def _line(axes, line) -> str:
    x, y = (np.asarray(values, float) for values in line.get_data())
    across, along = line.get_transform().contains_branch_seperately(axes.transData)
    if across and along:
        return _course(x, y)
    return f"a level at {number(y[0])}" if along else f"a mark at {number(x[0])}"


def _bars(axes, bars) -> str:
    upright = bars.orientation == "vertical"
    axis = axes.xaxis if upright else axes.yaxis
    middles = [bar.get_x() + bar.get_width() / 2 if upright else bar.get_y() + bar.get_height() / 2 for bar in bars]
    names = [number(middle) for middle in middles]
    fixed = matplotlib.ticker.FixedLocator | matplotlib.category.StrCategoryLocator
    if isinstance(axis.get_major_locator(), fixed) and len(axis.get_ticklocs()) >= len(middles):
        ticks = dict(zip(axis.get_ticklocs(), (label.get_text() for label in axis.get_ticklabels()), strict=True))
        nearest = [min(ticks, key=lambda place, at=middle: abs(place - at)) for middle in middles]  # side by side, too
        names = [" ".join(ticks[place].split()) for place in nearest]
    return listed(names, bars.datavalues)


def _collection(lot) -> str:
    points = np.concatenate(lot.get_segments()) if hasattr(lot, "get_segments") else np.asarray(lot.get_offsets())
    (left, low), (right, high) = points.min(0), points.max(0)
    return f"from {number(left)} to {number(right)}, between {number(low)} and {number(high)}"


def shading(axes, image) -> str:
    table = np.asarray(image.get_array())
    low, high = (np.unravel_index(place, table.shape) for place in (table.argmin(), table.argmax()))
    return (
        f"{table.shape[0]} rows of {table.shape[1]}, from {number(table[low])} in row {low[0]}, column {low[1]} "
        f"to {number(table[high])} in row {high[0]}, column {high[1]}"
    )


def _span(patch) -> str:
    box = patch.get_extents().transformed(patch.axes.transData.inverted())
    return f"from {number(box.x0)} to {number(box.x1)}"


def _course(x, y) -> str:
    """Where a curve begins and ends, and how high and low it goes in between if that is beyond its ends."""
    here = np.isfinite(y)
    x, y = x[here], y[here]
    if not len(y):
        return "not measured"
    if len(y) == 1:
        return f"{number(y[0])} at {number(x[0])}"
    if np.ptp(y) == 0:
        return f"{number(y[0])} from {number(x[0])} to {number(x[-1])}"
    text = f"{number(y[0])} at {number(x[0])} to {number(y[-1])} at {number(x[-1])}"
    for word, place, beyond in (
        ("lowest", y.argmin(), min(y[0], y[-1]) - y.min()), ("highest", y.argmax(), y.max() - max(y[0], y[-1])),
    ):  # fmt: skip
        text += f", {word} {number(y[place])} at {number(x[place])}" if beyond > 0.05 * np.ptp(y) else ""
    return text


def listed(names, values, most: int = 16) -> str:
    """Each value by its name, or the smallest and the largest if there are more than `most`."""
    values = np.asarray(values, float)
    if len(values) <= most:
        return ", ".join(f"{name}: {number(value)}" for name, value in zip(names, values, strict=True))
    low, high = np.nanargmin(values), np.nanargmax(values)
    return f"{len(values)} from {number(values[low])} at {names[low]} to {number(values[high])} at {names[high]}"


def number(value) -> str:
    """Whole numbers below a million as they are, others to three digits, so that every machine says the same."""
    value = float(value)
    if not np.isfinite(value):
        return "not measured" if np.isnan(value) else "infinite"
    if value.is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.6g}" if 1e-3 <= abs(rounded) < 1e6 else f"{rounded:.3g}".replace("e+", "e").replace("e0", "e")


def joined(words) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last

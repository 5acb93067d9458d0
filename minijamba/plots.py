"""Every reusable figure, in one visual language. The only import of matplotlib in the package.

Functions take arrays and return a Figure that lives outside pyplot. In a notebook, end the cell with the call itself,
or use `display(figure)` in mid-cell: `plt.show()` shows pyplot's own figures only. `figure.savefig(path)` saves one.

One colour per component, after the palette of Okabe and Ito, with lightness spread so that the five stay distinct to
every kind of colour blindness.
"""

import io
import itertools
import re

import matplotlib
import matplotlib.collections
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np

COLOURS = {
    "attention": "#D55E00",
    "mamba": "#005E9C",
    "moe": "#18AA80",
    "mlp": "#F2B632",
    "neutral": "#B5B5B5",
}
FREE = ("#000000", "#CC79A7", "#56B4E9", "#7A7A7A")  # for curves that stand for no component
GIB = 2**30
_COMPONENT_OF = {word: word for word in COLOURS} | {
    "kv": "attention", "state": "mamba", "ssm": "mamba", "expert": "moe", "experts": "moe", "router": "moe",
}  # fmt: skip


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook can draw without pyplot."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def component_colour(name: str) -> str | None:
    """The colour of the component that a name speaks of ("KV cache", "experts int8"); None if of no or several ones."""
    components = {_COMPONENT_OF[word] for word in re.findall("[a-z]+", name.lower()) if word in _COMPONENT_OF}
    return COLOURS[components.pop()] if len(components) == 1 else None


def colours_of(names) -> list[str]:
    """One colour a curve: its component's if no earlier curve has taken it, otherwise the next of the FREE ones."""
    chosen, free = [], itertools.cycle(FREE)
    for name in names:
        colour = component_colour(name)
        chosen.append(next(free) if colour is None or colour in chosen else colour)
    return chosen


def schedule_strip(layers) -> Figure:
    """The stack of layers from left to right: the mixer below, the feed-forward above it.

    layers: a JambaConfig, or a sequence of (mixer, feed_forward), as ("mamba", "moe").
    """
    pairs = [(x.mixer, x.feed_forward) if hasattr(x, "mixer") else x for x in getattr(layers, "layers", layers)]
    axes = _axes(width=min(12, 1.8 + 0.32 * len(pairs)), height=1.7, xlabel="layer")
    for row, components in enumerate(zip(*pairs, strict=True)):
        colours = [COLOURS.get(component, "white") for component in components]
        axes.bar(range(len(pairs)), 1, width=1, bottom=row, color=colours, edgecolor="white")
    seen = [name for name in COLOURS if any(name in pair for pair in pairs)]
    handles = [matplotlib.patches.Patch(color=COLOURS[name], label=name) for name in seen]
    axes.figure.legend(handles=handles, loc="outside right upper", frameon=False)
    axes.set(xlim=(-0.5, len(pairs) - 0.5), ylim=(0, 2), yticks=(0.5, 1.5), yticklabels=("mixer", "feed-forward"))
    axes.set_xticks(range(0, len(pairs), max(1, len(pairs) // 16)))
    axes.tick_params(length=0)
    return axes.figure


def budget_bars(parts: dict[str, float], memory_gib: float) -> Figure:
    """What fills the memory: each part begins where the one above it ends, so the last one ends at the total.

    parts: name -> GiB; memory_gib: the device's memory in GiB, the dashed line.
    """
    names, sizes = list(parts), np.array(list(parts.values()), float)
    total = sizes.sum()
    axes = _axes(height=0.9 + 0.4 * len(names), xlabel="GiB")
    colours = [component_colour(name) or COLOURS["neutral"] for name in names]
    bars = axes.barh(names, sizes, left=sizes.cumsum() - sizes, color=colours)
    axes.bar_label(bars, [f" {size:.3g}" for size in sizes])
    axes.axvline(memory_gib, color="black", linestyle="--")
    verdict = "fits in" if total <= memory_gib else "does not fit in"
    axes.set_title(f"{total:.1f} GiB {verdict} {memory_gib:g} GiB", fontsize=10, loc="left")
    axes.set_xlim(0, 1.1 * max(total, memory_gib))
    axes.invert_yaxis()
    return axes.figure


def scan_levels(length: int, kind: str = "blelloch", block: int = 4) -> list[list[tuple[int, int]]]:
    """The combinations of a prefix scan, level by level; those of one level are independent and run at once.

    kind: "hillis-steele" (fewest levels), "blelloch" (up and down sweep: fewest combinations), or "blocks" (each block
    of `block` elements in order, then the block ends in order, then each block takes in the end before it).
    Returns: one list a level of pairs (i, j): the value at j becomes value i combined with value j, i < j.
    Source:  Hillis and Steele 1986; Blelloch 1990, in the inclusive form.
    """
    strides = [2**power for power in range((length - 1).bit_length())]
    if kind == "hillis-steele":
        levels = [[(j - stride, j) for j in range(stride, length)] for stride in strides]
    elif kind == "blelloch":
        up = [[(j - stride, j) for j in range(2 * stride - 1, length, 2 * stride)] for stride in strides]
        down = [[(j - stride, j) for j in range(3 * stride - 1, length, 2 * stride)] for stride in reversed(strides)]
        levels = up + down
    elif kind == "blocks":
        inside = [[(j - 1, j) for j in range(step, length, block)] for step in range(1, block)]
        ends = range(block - 1, length, block)
        carried = [[(end - block, end)] for end in ends[1:]]
        spread = [(j - j % block - 1, j) for j in range(block, length) if j not in ends]
        levels = inside + carried + [spread]
    else:
        raise ValueError(f"scan kind {kind!r} is unknown: choose 'blelloch', 'hillis-steele' or 'blocks'")
    return [level for level in levels if level]


def scan_tree(length: int, kind: str = "blelloch", block: int = 4) -> Figure:
    """Which elements a prefix scan combines, level by level downwards (see `scan_levels`): coloured lines combine."""
    levels = scan_levels(length, kind, block)
    axes = _axes(min(12, 1.5 + 0.4 * length), 1.2 + 0.45 * len(levels), "position in the sequence", "level")
    axes.vlines(range(length), 0, len(levels), color=COLOURS["neutral"], linewidth=0.5)
    for depth, level in enumerate(levels):
        for i, j in level:
            axes.plot([i, j], [depth, depth + 1], color=COLOURS["mamba"], linewidth=1.6)
            axes.plot(j, depth + 1, "o", color=COLOURS["mamba"], markersize=6)
    axes.plot(range(length), [0] * length, "o", color=COLOURS["neutral"], markersize=6)
    work = sum(map(len, levels))
    axes.set_title(f"{kind}: {work} combinations in {len(levels)} levels", fontsize=10, loc="left")
    axes.set(xticks=range(length), yticks=range(len(levels) + 1), ylim=(len(levels) + 0.5, -0.5))
    return axes.figure


def impulse_responses(times, curves, labels, xlabel: str = "time", ylabel: str = "response") -> Figure:
    """A family of curves over time, dark to light in the order given.

    times: (t,); curves: (k, t); labels: k names.
    """
    axes = _axes(xlabel=xlabel, ylabel=ylabel)
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.85, len(labels)))
    for curve, label, shade in zip(curves, labels, shades, strict=True):
        axes.plot(times, curve, color=shade, label=label)
    axes.legend(frameon=False, fontsize=8)
    return axes.figure


def cache_growth(contexts, kv_bytes: dict) -> Figure:
    """Memory that one sequence keeps while decoding, against its length, both axes in powers of two.

    contexts: (t,) tokens; kv_bytes: name -> (t,) bytes, drawn in GiB.
    """
    axes = _axes(xlabel="context in tokens", ylabel="cache in GiB")
    for (name, sizes), colour in zip(kv_bytes.items(), colours_of(kv_bytes), strict=True):
        axes.plot(contexts, np.asarray(sizes) / GIB, color=colour, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}")
    axes.yaxis.set_major_formatter(lambda gib, _: f"{gib:.3g}")
    axes.legend(frameon=False, fontsize=8)
    return axes.figure


def expert_load(fractions) -> Figure:
    """The share of the tokens that each expert received; the dashed line is the even share.

    fractions: (e,), no unit.
    """
    fractions = np.asarray(fractions)
    axes = _axes(xlabel="expert", ylabel="share of the tokens")
    axes.bar(range(len(fractions)), fractions, color=COLOURS["moe"])
    axes.axhline(fractions.mean(), color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(fractions)))
    return axes.figure


def loss_curves(steps, curves: dict, ylabel: str = "loss in nats a token") -> Figure:
    """Training curves. steps: (t,); curves: name -> (t,)."""
    axes = _axes(xlabel="step", ylabel=ylabel)
    for (name, losses), colour in zip(curves.items(), colours_of(curves), strict=True):
        axes.plot(steps, losses, color=colour, label=name)
    axes.legend(frameon=False)
    return axes.figure


def roofline(programs: dict, bytes_per_second: float, operations_per_second: float, work: str = "operations") -> Figure:
    """The highest speed possible against the operations done for each byte moved, both axes in powers of ten.

    Left of the ridge the bytes limit a program, right of it its operations do.

    programs: name -> (operations a byte, operations a second), one dot each; work: what the operations are.
    """
    axes = _axes(xlabel=f"{work} a byte moved", ylabel=f"{work} a second")
    ridge = operations_per_second / bytes_per_second
    places = [ridge, *(intensity for intensity, _ in programs.values())]
    ends = np.array([min(places) / 4, ridge, max(places) * 4])
    roof = np.minimum(bytes_per_second * ends, operations_per_second)
    black, *colours = colours_of(["roof", *programs])
    axes.plot(ends, roof, color=black, label=f"the roof: bytes, then {work}")
    for (name, (intensity, speed)), colour in zip(programs.items(), colours, strict=True):
        axes.plot(intensity, speed, "o", color=colour, markersize=8, label=name)
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return axes.figure


def race(cases, times: dict, floors: dict | None = None, ylabel: str = "milliseconds", title: str = "") -> Figure:
    """Programs side by side, case by case. Above a bar stands how many times as long as the first program it takes.

    cases: k names; times: up to 4 programs -> (k,), NaN where not measured; floors: up to 3 names -> (k,), as lines.
    """
    axes = _axes(width=max(4.5, 2.2 + 0.85 * len(cases)), ylabel=ylabel)
    places, width, first = np.arange(len(cases)), 0.8 / len(times), np.array(next(iter(times.values())), float)
    for i, ((name, values), colour) in enumerate(zip(times.items(), (COLOURS["mamba"], *FREE[1:]), strict=False)):
        bars = axes.bar(places + (i + 0.5) * width - 0.4, values, 0.92 * width, color=colour, label=name)
        ratios = np.array(values, float) / first
        axes.bar_label(bars, ["" if np.isnan(ratio) or i == 0 else f"{ratio:.1f}×" for ratio in ratios], fontsize=8)
    for (name, values), style in zip((floors or {}).items(), ("-", ":", "--"), strict=False):
        axes.hlines(values, places - 0.45, places + 0.45, color="white", linewidth=2.5)  # seen on dark bars
        axes.hlines(values, places - 0.45, places + 0.45, color="black", linestyle=style, linewidth=1.5, label=name)
    axes.set_xticks(places, cases)
    axes.set_title(title, fontsize=10, loc="left")
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return axes.figure


def attention_map(weights, labels=None) -> Figure:
    """How much each query (row) attends to each key (column), from white at 0 to full colour at the largest weight.

    weights: (t, s), each row sums to 1; labels: the s tokens, if they are to be named (also on the rows where t == s).
    """
    weights = np.asarray(weights)
    axes = _axes(width=5.2, height=4.2, xlabel="key", ylabel="query")
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("attention", ["white", COLOURS["attention"]])
    image = axes.imshow(weights, cmap=shades, vmin=0, interpolation="nearest")
    axes.figure.colorbar(image, label="weight")
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        if weights.shape[0] == len(labels):
            axes.set_yticks(range(len(labels)), labels)
    return axes.figure


def packing_errors(layers, kinds, errors: dict, expected: dict) -> Figure:
    """How far off matrices of fewer bits are, layer by layer: a panel for each number of bits, a dot for each matrix.

    Feed-forwards stand a little right of their layer, mixers a little left; a dashed line is what is expected.

    layers: (m,), a layer for each matrix; kinds: (m,), of COLOURS; errors: title -> (m,) in per cent; expected: title
    -> per cent.
    """
    figure = Figure(figsize=(8.4, 3.2), dpi=100, layout="constrained")
    kinds, layers = np.asarray(kinds), np.asarray(layers)
    places = layers + np.where(np.isin(kinds, ["moe", "mlp"]), 0.15, -0.15)
    for axes, (title, values) in zip(figure.subplots(1, len(errors), squeeze=False)[0], errors.items(), strict=True):
        for kind in [name for name in COLOURS if name in kinds]:
            own = kinds == kind
            axes.plot(places[own], np.asarray(values)[own], "o", color=COLOURS[kind], markersize=4, label=kind)
        axes.axhline(expected[title], color="black", linestyle="--", linewidth=1, label="expected of normal weights")
        axes.set(xlabel="layer", ylabel="relative error in %", xticks=np.unique(layers))
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def rounded_weights(weights, rounded: dict) -> Figure:
    """How far each of some formats moves the weights of a group: rounded - weight, against the weight.

    A grey line for each number of a format: the weights that are nearest to it. Dashed lines lie half a step from zero:
    a weight beyond them is not rounded to the nearest number.

    weights: (n,); rounded: up to 4 titles -> (numbers (l,), evenly spaced, rounded weights (n,)), a panel each.
    """
    weights = np.asarray(weights)
    figure = Figure(figsize=(8.4, 3.4), dpi=100, layout="constrained")
    for axes, (title, (numbers, values)) in zip(
        figure.subplots(1, len(rounded), sharey=True, squeeze=False)[0], rounded.items(), strict=True
    ):
        numbers, half = np.asarray(numbers), np.abs(np.diff(numbers)).mean() / 2
        nearest = [[(number - half, half), (number + half, -half)] for number in numbers]
        lines = matplotlib.collections.LineCollection(nearest, color=COLOURS["neutral"], label="nearest to a number")
        axes.add_collection(lines)
        for sign, label in ((1, "half a step"), (-1, None)):
            axes.axhline(sign * half, color="black", linestyle="--", linewidth=1, label=label)
        axes.plot(weights, np.asarray(values) - weights, "o", color=COLOURS["mamba"], markersize=4, label="a weight")
        axes.set(xlabel="weight", ylabel="rounded - weight")
        axes.label_outer()
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def reached(speeds: dict, limits: dict, xlabel: str, limit: str = "limit", others=()) -> Figure:
    """A bar for each program, its speed beside it, and as a tick the highest speed that it could have.

    speeds: name -> figure, NaN where not measured; limits: name -> figure, for some or all of them; others: names of
    bars that are grey.
    """
    names, values = list(speeds), np.array(list(speeds.values()), float)
    axes = _axes(width=7.6, height=1.1 + 0.36 * len(names), xlabel=xlabel)
    colours = [COLOURS["neutral" if name in others else "mamba"] for name in names]
    bars = axes.barh(names, np.nan_to_num(values), 0.62, color=colours)
    axes.bar_label(bars, [" not run" if np.isnan(value) else "" for value in values], fontsize=8)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        if not np.isnan(value):
            axes.text(value, place, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=8)
        if name in limits:
            label = limit if name == next(iter(limits)) else None
            axes.vlines(limits[name], place - 0.4, place + 0.4, color="black", linewidth=2, label=label)
    axes.set_xlim(0, 1.12 * max([0, *limits.values(), *np.nan_to_num(values)]))
    axes.invert_yaxis()
    if limits:
        axes.figure.legend(loc="outside lower right", frameon=False, fontsize=8)
    return axes.figure


def over(
    curves: dict, xlabel: str, ylabel: str, *, dashed=(), level: tuple | None = None, doubling: bool = True,
    log: bool = False,
) -> Figure:  # fmt: skip
    """Curves over a number such as a context or a batch, which doubles from place to place if `doubling`.

    curves: name -> (x, y), NaN where not measured; those in `dashed` take the colours again from the first on.
    level:  (name, y), a horizontal line; log: y also in powers of two.
    """
    axes = _axes(width=7.0, height=3.1, xlabel=xlabel, ylabel=ylabel)
    colours = (COLOURS["mamba"], COLOURS["attention"], COLOURS["moe"], *FREE)
    solid = [name for name in curves if name not in dashed]
    for names, style in ((solid, "o-"), ([name for name in curves if name in dashed], "s--")):
        for i, name in enumerate(names):
            x, y = (np.asarray(values, float) for values in curves[name])
            here = ~np.isnan(y)
            axes.plot(x[here], y[here], style, color=colours[i % len(colours)], markersize=4, label=name)
    if level is not None:
        axes.axhline(level[1], color="black", linestyle=":", linewidth=1, label=level[0])
    if doubling:
        axes.set_xscale("log", base=2)
        places = sorted({float(x) for xs, _ in curves.values() for x in xs})
        axes.set_xticks(places, [f"{x / 1024:,.0f}K" if x >= 1024 else f"{x:g}" for x in places])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if x >= 1000 else f"{x:g}")
    if log:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.3g}" if y < 1000 else f"{y:,.0f}")
    else:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return axes.figure


def stacked(names, parts: dict, xlabel: str, marks: dict | None = None, mark: str = "", digits: str = ".3g") -> Figure:
    """A bar for each name, made of parts one after the other, its sum beside it.

    parts: name of the part -> (n,); a part that speaks of a component has its colour. marks: name -> a figure that is
    drawn as a tick; mark: what it is.
    """
    names, marks = list(names), marks or {}
    axes = _axes(width=7.6, height=1.2 + 0.4 * len(names), xlabel=xlabel)
    ends, free = np.zeros(len(names)), itertools.cycle(("#56B4E9", "#7A7A7A", "#CC79A7", "#000000"))
    for part, values in parts.items():
        axes.barh(names, values, 0.62, left=ends, color=component_colour(part) or next(free), label=part)
        ends = ends + np.asarray(values, float)
    most = max([*ends, *marks.values()])
    for place, (name, end) in enumerate(zip(names, ends, strict=True)):
        near = end <= marks.get(name, -1) < end + 0.09 * most  # the number would lie on the tick
        axes.text(marks[name] if near else end, place, f" {end:,{digits}}", va="center", fontsize=8)
        if name in marks:
            label = mark if name == next(iter(marks)) else None
            axes.vlines(marks[name], place - 0.4, place + 0.4, color="black", linewidth=2, label=label)
    axes.set_xlim(0, 1.12 * most)
    axes.invert_yaxis()
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return axes.figure


def _axes(width=7.0, height=3.2, xlabel="", ylabel=""):
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes

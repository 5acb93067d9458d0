"""Every reusable figure, in one visual language. Here alone the package imports matplotlib.

Functions take arrays and return a Figure that lives outside pyplot. In a notebook, end the cell with the call itself,
or use `display(figure)` in mid-cell: `plt.show()` shows pyplot's own figures only. `figure.savefig(path)` saves one.
What no function here draws, a notebook draws into the axes of `subplots`.

In words: `figure.alt` says what a sighted reader sees, with the numbers that matter, computed from what is drawn.
A notebook stores it with the picture, as the image's alternative text.

In colour: a component has one colour everywhere, and so has a model or a program that recurs. They differ to every kind
of colour blindness, and curves that may cross differ in line or mark, too. Black is what others are judged by.
Curves that stand for none of these take the FREE ones, never a component's: models lend them where no model is meant.
The paper is opaque white, with a margin, so that a figure reads the same on a dark page.
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

from .words import described, joined, listed, number, shading

COLOURS = {
    "attention": "#D55E00",
    "mamba": "#005E9C",
    "moe": "#18AA80",
    "mlp": "#F2B632",
    "neutral": "#B5B5B5",
}
MODELS = {
    "jamba": "#84243C",
    "mixtral": "#8454FC",
    "llama": "#78C0FC",
}
PROGRAMS = {
    "vllm": "#C060D8",
    "transformers": "#300C6C",
    "mamba-ssm": "#000000",
}
FREE = ("#000000", "#8454FC", "#84243C", "#78C0FC")  # for curves that stand for no component, model or program
GIB = 2**30
_COMPONENT_OF = {word: word for word in COLOURS} | {
    "kv": "attention", "state": "mamba", "ssm": "mamba", "expert": "moe", "experts": "moe", "router": "moe",
}  # fmt: skip
_LINES, _MARKS = ("-", "--", ":", "-."), "os^Dv*"
_DIM = "#7A7A7A"  # lines that only guide the eye


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook can draw without pyplot, on white paper and with a text alternative."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"dpi": 100, "layout": "constrained", "facecolor": "white", **options})
        self.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches of white paper around it
        self._alt = None

    @property
    def alt(self) -> str:
        """What the figure shows, in words: as set, otherwise as `described` from what is drawn. Raises: ValueError."""
        return self._alt or described(self)

    @alt.setter
    def alt(self, text: str):
        self._alt = text

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        png, alt = io.BytesIO(), self.alt
        self.savefig(png, format="png", pil_kwargs={"optimize": True})
        return {"image/png": png.getvalue(), "text/plain": repr(self)}, {"image/png": {"alt": alt}}


def component_colour(name: str) -> str | None:
    """The colour of the component that a name speaks of ("KV cache", "experts int8"); None if of no or several ones."""
    components = {_COMPONENT_OF[word] for word in re.findall("[a-z]+", name.lower()) if word in _COMPONENT_OF}
    return COLOURS[components.pop()] if len(components) == 1 else None


def named_colour(name: str) -> str | None:
    """The colour of what a name speaks of: a program of others, or else a component, or else a model; None if of none.

    "Jamba, vLLM" is vLLM, "Jamba's KV cache" is attention, "Mixtral, minijamba" is Mixtral; minijamba, "ours" and
    "hybrid" have the colour of Jamba.
    """
    words = re.findall("mamba-ssm|[a-z]+", name.lower())
    program = next((word for word in words if word in PROGRAMS), None)
    if program is not None:
        return PROGRAMS[program]
    own = {"minijamba", "ours", "hybrid"}.intersection(words)
    model = next((word for word in words if word in MODELS), "jamba" if own else None)
    return component_colour(name) or MODELS.get(model)


def colours_of(names) -> list[str]:
    """One colour a curve: its `named_colour` if no earlier curve has taken it, otherwise the next that is free."""
    named = [named_colour(name) for name in names]
    free = itertools.cycle(
        [colour for colour in dict.fromkeys((*FREE, *MODELS.values(), *PROGRAMS.values())) if colour not in named]
        or FREE
    )
    return [next(free) if colour is None or colour in named[:place] else colour for place, colour in enumerate(named)]


def shades(name: str):
    """The colour map from white to the colour of a component or model."""
    colour = (COLOURS | MODELS | PROGRAMS)[name]
    return matplotlib.colors.LinearSegmentedColormap.from_list(name, ["white", colour])


def ramp(count: int) -> np.ndarray:
    """Colours (count, 4) from dark to light, for things in an order."""
    return matplotlib.colormaps["cividis"](np.linspace(0, 0.85, count))


def subplots(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 3.2, **options) -> tuple:
    """A Figure and its empty axes, for what no function here draws; label the axes and curves: `alt` is made of these.

    width, height: inches; options: of `Figure.subplots`, as sharey=True.
    """
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, **options)
    for panel in np.ravel(axes):
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


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
    axes.figure.alt = f"Strip of {len(pairs)} layers, from left to right, a mixer below a feed-forward. " + " ".join(
        f"{row}: {_kinds(components)}."
        for row, components in zip(("Mixers", "Feed-forwards"), zip(*pairs, strict=True), strict=True)
    )
    return axes.figure


def _kinds(components) -> str:
    """How many layers of each kind, the commonest first, and where the others stand."""
    places = {kind: [i for i, own in enumerate(components) if own == kind] for kind in dict.fromkeys(components)}
    first, *others = sorted(places, key=lambda kind: -len(places[kind]))
    counts = [f"{len(places[first])} {first or 'none'}"]
    return ", ".join([*counts, *(f"{len(places[kind])} {kind or 'none'} {_where(places[kind])}" for kind in others)])


def _where(places) -> str:
    steps = set(np.diff(places).tolist())
    if len(places) > 3 and len(steps) == 1:
        return f"(layers {places[0]} to {places[-1]}, one in {steps.pop()})"
    return f"(layer{'s' * (len(places) > 1)} {joined(places)})"


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
    axes.figure.alt = (
        f"Bars of what fills the memory in GiB, each beginning where the one above it ends: "
        f"{listed([name.replace(',', ' and') for name in names], sizes)}. "
        f"Together {axes.get_title(loc='left')}, the dashed line: {number(100 * total / memory_gib)} % of it."
    )
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
            axes.plot(i, depth, "o", color=COLOURS["mamba"], markersize=3)
            axes.plot(j, depth + 1, "o", color=COLOURS["mamba"], markersize=6)
    axes.plot(range(length), [0] * length, "o", color=COLOURS["neutral"], markersize=6)
    work = sum(map(len, levels))
    axes.set_title(f"{kind}: {work} combinations in {len(levels)} levels", fontsize=10, loc="left")
    axes.set(xticks=range(length), yticks=range(len(levels) + 1), ylim=(len(levels) + 0.5, -0.5))
    reach = [sorted({j - i for i, j in level}) for level in levels]
    steps = [
        f"{len(level)} over {joined(dict.fromkeys([far[0], far[-1]]))}"
        for level, far in zip(levels, reach, strict=True)
    ]
    axes.figure.alt = (
        f"Tree of a prefix scan of {length} elements, {axes.get_title(loc='left')}, downwards. "
        f"Combinations in each level, and the distance in positions that their lines span: {', '.join(steps)}."
    )
    return axes.figure


def impulse_responses(times, curves, labels, xlabel: str = "time", ylabel: str = "response") -> Figure:
    """A family of curves over time, dark to light in the order given.

    times: (t,); curves: (k, t); labels: k names.
    """
    axes = _axes(xlabel=xlabel, ylabel=ylabel)
    styles = [_LINES[i % len(_LINES)] for i in range(len(labels))]
    for curve, label, shade, style in zip(curves, labels, ramp(len(labels)), styles, strict=True):
        axes.plot(times, curve, style, color=shade, label=label)
    axes.legend(frameon=False, fontsize=8)
    return axes.figure


def cache_growth(contexts, kv_bytes: dict, unit: str = "GiB", crossing: tuple = ()) -> Figure:
    """Memory that one sequence keeps while decoding, against its length, both axes in powers of two.

    contexts: (t,) tokens; kv_bytes: name -> (t,) bytes, drawn in `unit`, KiB, MiB or GiB; crossing: two of the names,
    a dotted line stands where the first becomes larger than the second.
    """
    axes = _axes(xlabel="context in tokens", ylabel=f"cache in {unit}")
    size_of_unit = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB}[unit]
    for (name, sizes), colour, mark in zip(kv_bytes.items(), colours_of(kv_bytes), itertools.cycle(_MARKS)):
        axes.plot(contexts, np.asarray(sizes) / size_of_unit, color=colour, marker=mark, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}")
    axes.yaxis.set_major_formatter(lambda size, _: f"{size:,.0f}" if size >= 100 else f"{size:.3g}")
    if crossing:
        tokens = _crossing(contexts, *(kv_bytes[name] for name in crossing))
        label = f"{crossing[0]}\nabove {crossing[1]}\nfrom {number(tokens)} tokens on"
        axes.axvline(tokens, color="black", linestyle=":", linewidth=1, label=label)
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return axes.figure


def _crossing(x, growing, other) -> float:
    """Where the first curve becomes larger than the second, on straight lines between the points."""
    x, ahead = np.asarray(x, float), np.subtract(growing, other, dtype=float)
    crossed = np.flatnonzero((ahead[:-1] <= 0) & (ahead[1:] > 0))
    if not len(crossed):
        raise ValueError("the first curve never rises above the second: give longer contexts, or no crossing")
    i = crossed[0]
    return x[i] - ahead[i] * (x[i + 1] - x[i]) / (ahead[i + 1] - ahead[i])


def expert_load(fractions) -> Figure:
    """The share of the tokens that each expert received; the dashed line is the even share.

    fractions: (e,), no unit; or title -> (e,), a panel each.
    """
    panels = fractions if hasattr(fractions, "items") else {"": fractions}
    figure, row = subplots(1, len(panels), sharey=True, squeeze=False)
    found = []
    for axes, (title, shares) in zip(row[0], panels.items(), strict=True):
        shares = np.asarray(shares, float)
        axes.bar(range(len(shares)), shares, color=COLOURS["moe"])
        axes.axhline(shares.mean(), color="black", linestyle="--", linewidth=1)
        axes.set(xlabel="expert", xticks=range(len(shares)))
        axes.set_title(title, fontsize=10, loc="left")
        found.append(f"{title}{': ' if title else ''}{_shares(shares)}")
    row[0, 0].set_ylabel("share of the tokens")
    figure.alt = f"Bars of the share of the tokens that each expert received. {' '.join(found)}"
    return figure


def _shares(shares) -> str:
    even, most, least = shares.mean(), shares.argmax(), shares.argmin()
    if np.ptp(shares) < 0.02 * even:  # which one has most would be chance
        return f"{len(shares)} experts, each within 2 % of the even share of {number(even)}, the dashed line."
    return (
        f"{listed(range(len(shares)), shares)}. Most for expert {most}, {number(shares[most] / even)} times the even "
        f"share of {number(even)}, the dashed line; least for expert {least}, {number(shares[least])}."
    )


def loss_curves(
    steps, curves: dict, ylabel: str = "loss in nats a token", xlabel: str = "step", *, dots=None, levels=None,
) -> Figure:  # fmt: skip
    """Training curves.

    steps: (t,); curves: name -> (t,); dots: name -> (x, y), what was measured now and then; levels: name -> y, dashed
    grey lines.
    """
    axes = _axes(xlabel=xlabel, ylabel=ylabel)
    dots, colours = dots or {}, colours_of([*curves, *(dots or {})])
    for (name, losses), colour, style in zip(curves.items(), colours, itertools.cycle(_LINES)):
        axes.plot(steps, losses, style, color=colour, label=name)
    for (name, (x, y)), colour in zip(dots.items(), colours[len(curves) :], strict=True):
        axes.plot(x, y, "o-", color=colour, markersize=4, label=name)
    for (name, y), style in zip((levels or {}).items(), itertools.cycle(_LINES[1:])):
        axes.axhline(y, color=_DIM, linestyle=style, linewidth=1, label=name)
    axes.legend(edgecolor="none", framealpha=0.9, fontsize=8)
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
    reached = []
    for (name, (intensity, speed)), colour, mark in zip(programs.items(), colours, itertools.cycle(_MARKS)):
        axes.plot(intensity, speed, mark, color=colour, markersize=8, label=name)
        top, bound = min(bytes_per_second * intensity, operations_per_second), "bytes" if intensity < ridge else work
        share = number(100 * speed / top)
        reached.append(f"{name}: {number(speed)} at {number(intensity)}, {share} % of the roof, limited by {bound}")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.figure.alt = (
        f"Roofline, both axes logarithmic: {work} a second against {work} a byte moved. The roof rises with "
        f"{number(bytes_per_second)} bytes a second as far as the ridge at {number(ridge)} {work} a byte, then stays "
        f"at {number(operations_per_second)}. Dots: {'; '.join(reached)}."
    )
    return axes.figure


def race(cases, times: dict, floors: dict | None = None, ylabel: str = "milliseconds", title: str = "") -> Figure:
    """Programs side by side, case by case. Above a bar stands how many times as long as the first program it takes.

    cases: k names; times: up to 4 programs -> (k,), NaN where not measured; floors: up to 3 names -> (k,), as lines.
    """
    axes = _axes(width=max(4.5, 2.2 + 0.85 * len(cases)), ylabel=ylabel)
    places, width = np.arange(len(cases)), 0.8 / len(times)
    (leader, first), *_ = ((name, np.array(values, float)) for name, values in times.items())
    found = [f"{leader}: {listed(cases, first, 8)}"]
    for i, ((name, values), colour) in enumerate(zip(times.items(), colours_of(times), strict=True)):
        bars = axes.bar(places + (i + 0.5) * width - 0.4, values, 0.92 * width, color=colour, label=name)
        ratios = np.array(values, float) / first
        axes.bar_label(bars, ["" if np.isnan(ratio) or i == 0 else f"{ratio:.1f}×" for ratio in ratios], fontsize=8)
        found += [f"{name}: {_times(ratios)} as long as {leader}"] if i else []
    for (name, values), style in zip((floors or {}).items(), ("-", ":", "--"), strict=False):
        axes.hlines(values, places - 0.45, places + 0.45, color="white", linewidth=2.5)  # seen on dark bars
        axes.hlines(values, places - 0.45, places + 0.45, color="black", linestyle=style, linewidth=1.5, label=name)
        found.append(f"{leader}: {_times(first / np.array(values, float))} the line {name}")
    axes.set_xticks(places, cases)
    axes.set_title(title, fontsize=10, loc="left")
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.figure.alt = f"Bars side by side in {ylabel}{f', {title}' if title else ''}. {'; '.join(found)}."
    return axes.figure


def _times(ratios) -> str:
    low, high = np.nanmin(ratios), np.nanmax(ratios)
    return f"{number(low)} times" if low == high else f"{number(low)} to {number(high)} times"


def attention_map(weights, labels=None, marks=(), mark: str = "marked", title: str = "") -> Figure:
    """How much each query (row) attends to each key (column), from white at 0 to full colour at the largest weight.

    weights: (t, s), each row sums to 1; labels: the s tokens, if they are to be named (also on the rows where t == s);
    marks: pairs (query, key), drawn as small squares; mark: what they are, as "what came after, last time".
    """
    weights = np.asarray(weights)
    axes = _axes(width=5.2, height=4.2, xlabel="key", ylabel="query")
    image = axes.imshow(weights, cmap=shades("attention"), vmin=0, interpolation="nearest")
    axes.figure.colorbar(image, label="weight")
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        if weights.shape[0] == len(labels):
            axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    found = _strongest(weights, labels)
    if len(marks):
        rows, columns = np.transpose(marks)
        axes.plot(
            columns, rows, "s", color="black", markersize=max(3, 150 / len(weights)), fillstyle="none", label=mark
        )
        axes.figure.legend(loc="outside lower center", frameon=False, fontsize=8)
        found += (
            f" The {len(rows)} squares ({mark}) hold a weight of {number(weights[rows, columns].mean())} on average."
        )
    rows, columns = weights.shape
    axes.figure.alt = (
        f"Map of attention{f', {title}' if title else ''}, {rows} queries down, {columns} keys across, from white at 0 "
        f"to full colour at a weight of {number(weights.max())}. {found}"
    )
    return axes.figure


def _strongest(weights, labels) -> str:
    """Where each query looks most: one by one if there are few, otherwise how far back most of them do."""
    keys = weights.argmax(1)
    if len(weights) <= 8:
        names = range(weights.shape[1]) if labels is None else labels
        own = names if len(names) == len(weights) else range(len(weights))
        looks = [f"{own[i]} {i} to {names[k]} {k}" if labels is not None else f"{i} to {k}" for i, k in enumerate(keys)]
        return f"Each query's largest weight: {', '.join(looks)}."
    back, counts = np.unique(np.arange(len(weights)) + weights.shape[1] - len(weights) - keys, return_counts=True)
    common = counts.argmax()
    return (
        f"{counts[common]} of the {len(weights)} queries have their largest weight {back[common]} keys back, "
        f"more than at any other distance; the largest weights are {number(weights.max(1).mean())} on average."
    )


def packing_errors(layers, kinds, errors: dict, expected: dict) -> Figure:
    """How far off matrices of fewer bits are, layer by layer: a panel for each number of bits, a dot for each matrix.

    Feed-forwards stand a little right of their layer, mixers a little left; a dashed line is what is expected.

    layers: (m,), a layer for each matrix; kinds: (m,), of COLOURS; errors: title -> (m,) in per cent; expected: title
    -> per cent.
    """
    figure, panels = subplots(1, len(errors), 8.4, 3.2, squeeze=False)
    kinds, layers = np.asarray(kinds), np.asarray(layers)
    places = layers + np.where(np.isin(kinds, ["moe", "mlp"]), 0.15, -0.15)
    found = []
    for axes, (title, values) in zip(panels[0], errors.items(), strict=True):
        for kind in [name for name in COLOURS if name in kinds]:
            own = kinds == kind
            axes.plot(places[own], np.asarray(values)[own], "o", color=COLOURS[kind], markersize=4, label=kind)
        axes.axhline(expected[title], color="black", linestyle="--", linewidth=1, label="expected of normal weights")
        axes.set(xlabel="layer", ylabel="relative error in %", xticks=np.unique(layers))
        axes.set_title(title, fontsize=10, loc="left")
        worst = np.argmax(values)
        found.append(
            f"{title}: {number(min(values))} to {number(values[worst])} %, the largest in layer {layers[worst]} "
            f"({kinds[worst]}), {number(expected[title])} expected of normal weights, the dashed line."
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.alt = f"Dots for {len(layers)} matrices, relative error in % against the layer. {' '.join(found)}"
    return figure


def rounded_weights(weights, rounded: dict) -> Figure:
    """How far each of some formats moves the weights of a group: rounded - weight, against the weight.

    A grey line for each number of a format: the weights that are nearest to it. Dashed lines lie half a step from zero:
    a weight beyond them is not rounded to the nearest number.

    weights: (n,); rounded: up to 4 titles -> (numbers (l,), evenly spaced, rounded weights (n,)), a panel each.
    """
    weights = np.asarray(weights)
    figure, panels = subplots(1, len(rounded), 8.4, 3.4, sharey=True, squeeze=False)
    found = []
    for axes, (title, (numbers, values)) in zip(panels[0], rounded.items(), strict=True):
        numbers, half = np.asarray(numbers), np.abs(np.diff(numbers)).mean() / 2
        nearest = [[(number - half, half), (number + half, -half)] for number in numbers]
        lines = matplotlib.collections.LineCollection(nearest, color=COLOURS["neutral"], label="nearest to a number")
        axes.add_collection(lines)
        for sign, label in ((1, "half a step"), (-1, None)):
            axes.axhline(sign * half, color="black", linestyle="--", linewidth=1, label=label)
        moved = np.asarray(values) - weights
        axes.plot(weights, moved, "o", color=FREE[1], markersize=4, label="a weight")
        axes.set(xlabel="weight", ylabel="rounded - weight")
        axes.label_outer()
        axes.set_title(title, fontsize=10, loc="left")
        beyond = np.sum(np.abs(moved) > 1.002 * half)
        found.append(
            f"{title}: {len(numbers)} numbers in steps of {number(2 * half)}; the farthest weight is moved by "
            f"{number(np.abs(moved).max())}, and {beyond} by more than half a step, the dashed lines."
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.alt = f"Dots for {len(weights)} weights, how far rounding moves each against the weight. {' '.join(found)}"
    return figure


def reached(speeds: dict, limits: dict, xlabel: str, limit: str = "limit", others=()) -> Figure:
    """A bar for each program, its speed beside it, and as a tick the highest speed that it could have.

    speeds: name -> figure, NaN where not measured; limits: name -> figure, for some or all of them; others: names of
    bars that are grey if they name no program.
    """
    names, values = list(speeds), np.array(list(speeds.values()), float)
    axes = _axes(width=7.6, height=1.1 + 0.36 * len(names), xlabel=xlabel)
    colours = [named_colour(name) or (COLOURS["neutral"] if name in others else MODELS["jamba"]) for name in names]
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
    found = [
        f"{name} {number(value)}"
        + (f", {number(100 * value / limits[name])} % of {number(limits[name])}" if name in limits else "")
        for name, value in speeds.items()
    ]
    ticks = f", and as a tick what it could be at most ({limit})" if limits else ""
    axes.figure.alt = f"Bars of {xlabel}{ticks}: {'; '.join(found)}."
    return axes.figure


def over(
    curves: dict, xlabel: str, ylabel: str, *, dashed=(), level: tuple | None = None, doubling: bool = True,
    log: bool = False,
) -> Figure:  # fmt: skip
    """Curves over a number such as a context or a batch, which doubles from place to place if `doubling`.

    curves: name -> (x, y), NaN where not measured; those in `dashed` that name nothing take the colours of the others.
    level:  (name, y), a horizontal line; log: y also in powers of two.
    """
    axes = _axes(width=7.0, height=3.1, xlabel=xlabel, ylabel=ylabel)
    solid, broken = ([name for name in curves if (name in dashed) == wanted] for wanted in (False, True))
    colours = colours_of(solid or broken)
    own = [named_colour(name) or colour for name, colour in zip(broken, itertools.cycle(colours))]
    for names, shown, line in ((solid, colours, "-"), (broken, own, "--")):
        for name, colour, mark in zip(names, shown, itertools.cycle(_MARKS)):
            x, y = (np.asarray(values, float) for values in curves[name])
            here = ~np.isnan(y)
            axes.plot(x[here], y[here], mark + line, color=colour, markersize=4, label=name)
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
    ends, free = np.zeros(len(names)), itertools.cycle(("#78C0FC", "#8454FC", COLOURS["neutral"], "#84243C"))
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
    axes.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    found = [
        f"{name} {number(end)}: {', '.join(f'{part} {number(values[i])}' for part, values in parts.items())}"
        + (f" (tick at {number(marks[name])})" if name in marks else "")
        for i, (name, end) in enumerate(zip(names, ends, strict=True))
    ]
    ticks = f"; a tick is {mark}" if marks else ""
    axes.figure.alt = f"Bars in {xlabel}, made of parts one after the other{ticks}. {'; '.join(found)}."
    return axes.figure


def tables(panels: dict, xlabel: str, ylabel: str, label: str, *, rows=None, columns=None, even=None, colour="moe",
           digits: str = "", top: float | None = None) -> Figure:  # fmt: skip
    """Tables of numbers as shades, a panel each: white at 0, full colour at the largest.

    panels: title -> (rows, columns); label: what the numbers are; rows, columns: their names; even: the number that is
    white instead, with purple above and orange below; digits: how each number is written into its place, as ".2f".
    """
    found = [np.asarray(table, float) for table in panels.values()]
    top = max(table.max() for table in found) if top is None else top
    figure, row = subplots(1, len(panels), max(4.6, 1.6 + 2.2 * len(panels)), 3.0, sharey=True, squeeze=False)
    cmap, low = (shades(colour), 0) if even is None else ("PuOr", 2 * even - top)
    for axes, title, table in zip(row[0], panels, found, strict=True):
        image = axes.imshow(table, cmap=cmap, vmin=low, vmax=top, aspect="auto", interpolation="nearest")
        names = columns if columns is not None else range(table.shape[1])
        axes.set_xticks(range(table.shape[1]), names, fontsize=8)
        axes.set(xlabel=xlabel)
        axes.set_title(title, fontsize=10, loc="left")
        for (i, j), value in np.ndenumerate(table) if digits else ():
            ink = _ink(image.cmap(image.norm(value)))
            axes.text(j, i, f"{value:{digits}}", ha="center", va="center", color=ink, fontsize=8)
    names = rows if rows is not None else range(len(found[0]))
    row[0, 0].set_yticks(range(len(found[0])), names, fontsize=8)
    row[0, 0].set_ylabel(ylabel)
    figure.colorbar(image, ax=row[0].tolist(), label=label)
    figure.alt = f"Shaded table of {label}, {ylabel} down, {xlabel} across. " + " ".join(
        f"{title}{': ' if title else ''}{shading(axes, axes.images[0])}."
        for axes, title in zip(row[0], panels, strict=True)
    )
    return figure


def _ink(paper) -> str:
    """Black or white, whichever is easier to read on the colour: WCAG 2 sets their equal contrast at 0.18."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in paper[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _axes(width=7.0, height=3.2, xlabel="", ylabel=""):
    _, axes = subplots(width=width, height=height)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes

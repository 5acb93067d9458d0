import math
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import numpy as np
import pytest

import minijamba
from minijamba import plots
from minijamba.plots import COLOURS
from minijamba.testing import assert_matches, assert_rejects

LAYERS = [("attention" if i == 4 else "mamba", "moe" if i % 2 else "mlp") for i in range(8)]
TIMES = np.linspace(0, 5, 20)
DECAYS = np.exp(-np.outer([0.2, 1.0, 3.0], TIMES))
CAUSAL = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]


def colour(artist) -> str:
    value = artist.get_facecolor() if hasattr(artist, "get_facecolor") else artist.get_color()
    return matplotlib.colors.to_hex(value).upper()


def test_schedule_strip_colours_every_layer():
    config = SimpleNamespace(layers=[SimpleNamespace(mixer=m, feed_forward=f) for m, f in LAYERS])
    for layers in (LAYERS, config):
        axes = plots.schedule_strip(layers).axes[0]
        mixers, feed_forwards = [[colour(bar) for bar in row] for row in axes.containers]
        assert mixers == [plots.COLOURS[m] for m, _ in LAYERS]
        assert feed_forwards == [plots.COLOURS[f] for _, f in LAYERS]
        assert [{bar.get_y() for bar in row} for row in axes.containers] == [{0}, {1}]


def test_budget_bars_end_at_the_total():
    parts = {"experts int8": 42.0, "Mamba": 5.5, "KV cache": 4.0, "embeddings": 0.5}

    def check(parts):
        axes = plots.budget_bars(parts, memory_gib=80).axes[0]
        bars = axes.containers[0]
        assert_matches([bar.get_width() for bar in bars], [42.0, 5.5, 4.0, 0.5], 1e-12)
        assert_matches(bars[-1].get_x() + bars[-1].get_width(), 52.0, 1e-12)
        assert [colour(bar) for bar in bars] == [plots.COLOURS[c] for c in ("moe", "mamba", "attention", "neutral")]
        assert axes.lines[0].get_xdata()[0] == 80
        assert axes.get_title(loc="left") == "52.0 GiB fits in 80 GiB"

    check(parts)
    assert_rejects(check, parts | {"Mamba": 5.4}, dict(reversed(parts.items())))
    assert "does not fit" in plots.budget_bars(parts, memory_gib=51.9).axes[0].get_title(loc="left")


def combine_all(levels, length):
    """Run the levels on intervals [start, end): the two parts must touch, so nothing is lost or counted twice."""
    values = [(j, j + 1) for j in range(length)]
    for level in levels:
        before = list(values)
        assert len({j for _, j in level}) == len(level), "two values written to one place"
        for i, j in level:
            assert before[i][1] == before[j][0], "the parts do not touch"
            values[j] = (before[i][0], before[j][1])
    return values


@pytest.mark.parametrize("kind", ["blelloch", "hillis-steele", "blocks"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13, 16, 31, 63])
def test_scan_levels_build_every_prefix(kind, length):
    def check(levels):
        assert combine_all(levels, length) == [(0, j + 1) for j in range(length)]

    levels = plots.scan_levels(length, kind)
    check(levels)
    if length > 1:
        assert_rejects(check, levels[:-1], levels[1:], [*levels, [(0, 1)]])


def test_scan_levels_work_and_depth():
    def work_and_depth(kind):
        levels = plots.scan_levels(16, kind)
        return sum(map(len, levels)), len(levels)

    assert work_and_depth("hillis-steele") == (16 * 4 - 15, 4)
    assert work_and_depth("blelloch") == (2 * 16 - 2 - 4, 2 * 4 - 1)
    assert work_and_depth("blocks") == (12 + 3 + 9, 3 + 3 + 1)
    with pytest.raises(ValueError, match="'zigzag' is unknown: choose"):
        plots.scan_levels(16, "zigzag")


@pytest.mark.parametrize("kind", ["blelloch", "hillis-steele", "blocks"])
def test_scan_tree_draws_each_combination(kind):
    axes = plots.scan_tree(11, kind).axes[0]
    drawn = {tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2}
    assert drawn == {pair for level in plots.scan_levels(11, kind) for pair in level}


def test_curves_are_the_arrays_given():
    def check(curves):
        lines = plots.impulse_responses(TIMES, curves, ["slow", "middle", "fast"]).axes[0].lines
        assert_matches([line.get_ydata() for line in lines], list(DECAYS), 0)
        assert len({colour(line) for line in lines}) == 3

    check(DECAYS)
    assert_rejects(check, DECAYS[::-1], DECAYS * 1.001)
    with pytest.raises(ValueError):
        plots.impulse_responses(TIMES, DECAYS, ["one label too few", "for three curves"])

    curves = {"attention only": DECAYS[0], "Mamba only": DECAYS[1], "Jamba": DECAYS[2]}
    lines = plots.loss_curves(TIMES, curves).axes[0].lines
    assert_matches([line.get_ydata() for line in lines], list(DECAYS), 0)
    assert [colour(line) for line in lines] == [plots.COLOURS["attention"], plots.COLOURS["mamba"], plots.FREE[0]]


def test_cache_growth_is_drawn_in_gib():
    contexts = 2 ** np.arange(10, 19)

    def check(bytes_a_token):
        line = plots.cache_growth(contexts, {"KV cache": contexts * bytes_a_token}).axes[0].lines[0]
        assert_matches(line.get_ydata()[-1], 4.0, 1e-12)
        assert colour(line) == plots.COLOURS["attention"]

    check(16 * 1024)
    assert_rejects(check, 16 * 1000)


def test_expert_load_and_attention_map():
    def check(fractions):
        axes = plots.expert_load(fractions).axes[0]
        assert_matches([bar.get_height() for bar in axes.patches], [0.5, 0.25, 0.25, 0.0], 0)
        assert {colour(bar) for bar in axes.patches} == {plots.COLOURS["moe"]}
        assert axes.lines[0].get_ydata()[0] == 0.25

    check([0.5, 0.25, 0.25, 0.0])
    assert_rejects(check, [0.25, 0.5, 0.25, 0.0])

    def check_map(weights):
        axes = plots.attention_map(weights, list("abcd")).axes[0]
        assert_matches(np.asarray(axes.images[0].get_array()), CAUSAL, 0)
        assert axes.images[0].get_clim() == (0, 1)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == list("abcd")

    check_map(CAUSAL)
    assert_rejects(check_map, CAUSAL.T)


def test_roofline_bends_where_both_limits_meet():
    programs = {"slow": (0.5, 1e12), "fast": (8.0, 6e12)}

    def check(bytes_per_second, operations_per_second):
        axes = plots.roofline(programs, bytes_per_second, operations_per_second, "products").axes[0]
        roof, *dots = axes.lines
        (x0, ridge, x2), (y0, top, y2) = roof.get_data()
        assert_matches([ridge, top, y2, y0 / x0], [3.0, 6e12, 6e12, 2e12], 1e-12)
        assert x0 < 0.5 and x2 > 8
        assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == list(programs.values())
        assert axes.get_xlabel() == "products a byte moved"

    check(2e12, 6e12)
    assert_rejects(lambda rates: check(*rates), (6e12, 2e12), (2e12, 5e12))


def test_race_compares_with_the_first():
    times = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 5.0, np.nan], "others": [2.0, np.nan, 8.0]}
    floors = {"bytes": [0.5, 1.0, 2.0], "work": [0.75, 1.5, 3.0]}

    def check(times):
        axes = plots.race(["1 x 2K", "1 x 4K", "1 x 8K"], times, floors, "µs", "forward").axes[0]
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        assert heights[0] == [1, 2, 4] and heights[1][:2] == [3, 5] and np.isnan(heights[1][2])
        assert [text.get_text() for text in axes.texts] == ["", "", "", "3.0×", "2.5×", "", "2.0×", "", "2.0×"]
        assert colour(axes.containers[0][0]) == plots.COLOURS["mamba"]
        lines = [lines for lines in axes.collections if not lines.get_label().startswith("_")]
        drawn = {line.get_label(): [segment[0, 1] for segment in line.get_segments()] for line in lines}
        assert drawn == floors
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1 x 2K", "1 x 4K", "1 x 8K"]

    check(times)
    assert_rejects(check, times | {"ours": [1.0, 2.0, 4.5]}, {"theirs": times["theirs"], **times})


def test_packing_errors_stand_at_their_layer():
    layers, kinds = [0, 0, 1, 4], ["mamba", "mlp", "moe", "attention"]
    errors = {"8 bits": [0.7, 0.6, 0.8, 0.75], "4 bits": [9.0, 9.5, 10.0, 9.25]}

    def check(kinds):
        panels = plots.packing_errors(layers, kinds, errors, {"8 bits": 0.65, "4 bits": 9.1}).axes
        assert [axes.get_title(loc="left") for axes in panels] == list(errors)
        for axes, values, expected in zip(panels, errors.values(), [0.65, 9.1], strict=True):
            *dots, line = axes.lines
            found = {(colour(dot), round(dot.get_xdata()[0], 2), dot.get_ydata()[0]) for dot in dots}
            places = zip(("mamba", "mlp", "moe", "attention"), (-0.15, 0.15, 1.15, 3.85), values, strict=True)
            assert found == {(plots.COLOURS[kind], place, value) for kind, place, value in places}
            assert line.get_ydata()[0] == expected and axes.get_ylabel() == "relative error in %"

    check(kinds)
    assert_rejects(check, kinds[::-1], ["mamba", "mlp", "mlp", "attention"])


def test_rounded_weights_are_drawn_by_how_far_they_moved():
    weights = np.array([0.9, -0.4, 0.1])

    def check(rounded, numbers=(-1.0, 0.0, 1.0)):
        (axes,) = plots.rounded_weights(weights, {"three": (numbers, rounded)}).axes
        *halves, dots = axes.lines
        assert_matches([dots.get_xdata(), dots.get_ydata()], [weights, [0.1, 0.4, -0.1]], 1e-12)
        assert [line.get_ydata()[0] for line in halves] == [0.5, -0.5]
        slanted = [segment.tolist() for segment in axes.collections[0].get_segments()]
        assert slanted == [[[x - 0.5, 0.5], [x + 0.5, -0.5]] for x in (-1, 0, 1)]

    right = np.array([1.0, 0.0, 0.0])
    check(right)
    assert_rejects(check, np.array([0.0, 0.0, 1.0]), weights, -right)
    assert_rejects(lambda numbers: check(right, numbers), (-2.0, 0.0, 2.0), (0.0, 1.0), (-0.5, 0.5, 1.5))


COLOUR_BLINDNESS = {  # on linear RGB: Machado, Oliveira and Fernandes 2009, full severity
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


CONFUSED = {
    "none": ["#8C8C8C", "#999999"],
    "protan": ["#C83232", "#5A5A28"],
    "deutan": ["#C84646", "#828237"],
    "tritan": ["#0072B2", "#009E73"],  # Okabe and Ito's own blue and green
}


def test_reached_draws_speeds_and_limits():
    def check(speeds):
        figure = plots.reached(speeds, {"a": 5.0, "b": 400.0}, "tokens a second", "roofline", others=["c"])
        (axes,) = figure.axes
        assert_matches([bar.get_width() for bar in axes.patches], [3.0, 250.0, 0.0], 0)
        assert [text.get_text().strip() for text in axes.texts if text.get_text()] == ["not run", "3", "250"]
        assert [lines.get_segments()[0][0, 0] for lines in axes.collections] == [5.0, 400.0]
        assert_matches(axes.patches[2].get_facecolor()[:3], [0xB5 / 255] * 3, 1e-3)
        assert axes.get_xlabel() == "tokens a second" and axes.get_xlim()[1] > 400
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["roofline"]

    check({"a": 3.0, "b": 250.0, "c": math.nan})
    assert_rejects(check, {"a": 3.0, "b": 251.0, "c": math.nan}, {"a": 3.0, "b": 250.0, "c": 0.0})
    assert not plots.reached({"a": 1.0}, {}, "x").legends  # and no warning


def test_over_leaves_out_what_was_not_measured():
    def check(y):
        curves = {"ours": ([1, 4, 2048], y), "theirs": ([1, 4], [1.0, 2.0])}
        figure = plots.over(curves, "batch", "tokens a second", dashed=["theirs"], level=("limit", 7.0))
        ours, theirs, limit = figure.axes[0].lines
        assert_matches([ours.get_xdata(), ours.get_ydata()], [[1.0, 2048.0], [3.0, 5.0]], 0)
        assert theirs.get_linestyle() == "--" and theirs.get_color() == ours.get_color() == COLOURS["mamba"]
        assert limit.get_ydata()[0] == 7.0
        assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "4", "2K"]

    check([3.0, math.nan, 5.0])
    assert_rejects(check, [3.0, 0.0, 5.0])
    (axes,) = plots.over({"a": ([1, 2000], [1.0, 2.0])}, "x", "y", doubling=False).axes
    assert axes.get_xscale() == "linear" and axes.xaxis.get_major_formatter()(2000, None) == "2k"
    (axes,) = plots.over({"a": ([1, 2], [1.0, 2000.0])}, "x", "y", log=True).axes
    assert axes.get_yscale() == "log" and axes.yaxis.get_major_formatter()(2000, None) == "2,000"


def test_stacked_parts_end_at_their_sum():
    def check(parts):
        (axes,) = plots.stacked(["x", "y"], parts, "seconds", {"x": 2.5}, "the files alone").axes
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert_matches(ends, [1.0, 2.0, 4.0, 6.0], 0)
        assert_matches(axes.patches[2].get_facecolor()[:3], np.array([0x18, 0xAA, 0x80]) / 255, 1e-3)
        assert [text.get_text() for text in axes.texts] == [" 4", " 6"]
        assert axes.collections[0].get_segments()[0][0, 0] == 2.5

    check({"waiting": [1.0, 2.0], "experts": [3.0, 4.0]})
    assert_rejects(check, {"waiting": [1.0, 2.0], "experts": [3.0, 5.0]})


@pytest.mark.parametrize("eye", COLOUR_BLINDNESS)
def test_components_differ_to_every_eye(eye):
    def check(colours):
        linear = np.array([matplotlib.colors.to_rgb(c) for c in colours]) ** 2.2
        seen = np.clip(linear @ np.array(COLOUR_BLINDNESS[eye]).T, 0, 1) ** (1 / 2.2)
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.2  # of sqrt(3), black to white

    check(plots.COLOURS.values())
    assert_rejects(check, CONFUSED[eye])


def test_a_name_finds_its_component():
    assert plots.component_colour("KV cache") == plots.COLOURS["attention"]
    assert plots.component_colour("Mamba_state") == plots.COLOURS["mamba"]
    assert plots.component_colour("attention-free Mamba") is None
    assert plots.component_colour("Mamba's mix") == plots.COLOURS["mamba"]
    assert plots.component_colour("Jamba") is None
    assert plots.colours_of(["mamba", "Mamba state", "x", "y"]) == [plots.COLOURS["mamba"], *plots.FREE[:3]]


def test_figures_leave_no_pyplot_state_and_show_as_png():
    script = (
        "import sys; from minijamba import plots; figure = plots.expert_load([0.5, 0.5]);"
        "assert 'matplotlib.pyplot' not in sys.modules; assert figure._repr_png_()[1:4] == b'PNG'; print(repr(figure))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "<Figure size 700x320 with 1 Axes>\n"


def test_only_plots_imports_matplotlib():
    package = Path(minijamba.__file__).parent
    importing = [p.name for p in package.rglob("*.py") if re.search(r"(import|from) matplotlib", p.read_text())]
    assert importing == ["plots.py"]

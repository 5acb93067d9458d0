import io
import math
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import matplotlib.colors
import matplotlib.figure
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter

from minijamba import plots
from minijamba.plots import COLOURS, FREE, MODELS, PROGRAMS, words
from minijamba.testing import assert_matches, assert_rejects

OTHERS = MODELS | PROGRAMS
LAYERS = [("attention" if i == 4 else "mamba", "moe" if i % 2 else "mlp") for i in range(8)]
TIMES = np.linspace(0, 5, 20)
DECAYS = np.exp(-np.outer([0.2, 1.0, 3.0], TIMES))
CAUSAL = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
TOKENS = 2 ** np.arange(8, 12)
SIZES = [1, 4, 8]
INDUCTION = (
    np.tril(np.ones((10, 10))) / np.arange(1, 11)[:, None]
)  # five tokens twice: the second time each looks at what came after it the first time
INDUCTION[5:] = 0.8 * np.eye(10, k=1)[:5] + 0.2 * np.eye(10)[5:]


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
    assert [colour(line) for line in lines] == [COLOURS["attention"], COLOURS["mamba"], MODELS["jamba"]]
    assert len({line.get_linestyle() for line in lines}) == 3, "not by colour alone"


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
        assert [colour(bars[0]) for bars in axes.containers[:2]] == [MODELS["jamba"], FREE[0]]
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
        assert theirs.get_linestyle() == "--" and theirs.get_color() == ours.get_color() == MODELS["jamba"]
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
def test_colours_differ_to_every_eye(eye):
    def check(colours):
        linear = np.array([matplotlib.colors.to_rgb(c) for c in colours]) ** 2.2
        seen = np.clip(linear @ np.array(COLOUR_BLINDNESS[eye]).T, 0, 1) ** (1 / 2.2)
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.2  # of sqrt(3), black to white

    check([*COLOURS.values(), *OTHERS.values()])
    assert_rejects(check, CONFUSED[eye])


def test_models_and_programs_have_their_colours():
    assert set(FREE) <= set(OTHERS.values()) and len(set(OTHERS.values())) == len(OTHERS)
    named = {
        "Jamba, minijamba": MODELS["jamba"], "ours, int8-all": MODELS["jamba"], "Mixtral-8x7B": MODELS["mixtral"],
        "Mixtral, minijamba": MODELS["mixtral"], "Llama-2-7B": MODELS["llama"], "Jamba, vLLM": PROGRAMS["vllm"],
        "vLLM, experts in int8": PROGRAMS["vllm"], "transformers, bfloat16": PROGRAMS["transformers"],
        "mamba-ssm": PROGRAMS["mamba-ssm"], "Jamba-v0.1, KV": COLOURS["attention"], "Mamba alone": COLOURS["mamba"],
        "int8-all": None,
    }  # fmt: skip
    assert {name: plots.named_colour(name) for name in named} == named


def test_a_name_finds_its_component():
    assert plots.component_colour("KV cache") == plots.COLOURS["attention"]
    assert plots.component_colour("Mamba_state") == plots.COLOURS["mamba"]
    assert plots.component_colour("attention-free Mamba") is None
    assert plots.component_colour("Mamba's mix") == plots.COLOURS["mamba"]
    assert plots.component_colour("Jamba") is None
    assert plots.colours_of(["mamba", "Mamba state", "x", "y"]) == [plots.COLOURS["mamba"], *plots.FREE[:3]]
    assert plots.colours_of(["x", "Mixtral", "y"]) == [FREE[0], MODELS["mixtral"], FREE[2]], "no colour twice"


def test_figures_leave_no_pyplot_state():
    script = (
        "import sys; from minijamba import plots; figure = plots.expert_load([0.5, 0.5]);"
        "data, about = figure._repr_mimebundle_(); assert 'matplotlib.pyplot' not in sys.modules;"
        "assert data['image/png'][1:4] == b'PNG'; print(about['image/png']['alt'] == figure.alt)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "True\n"


def test_a_notebook_stores_picture_and_words():
    formatter = DisplayFormatter()

    def check(figure):
        data, about = formatter.format(figure)
        assert about["image/png"]["alt"] == plots.expert_load([0.75, 0.25]).alt
        picture = matplotlib.image.imread(io.BytesIO(data["image/png"]))
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all(), "white and opaque in its corners"

    check(plots.expert_load([0.75, 0.25]))
    clear = plots.expert_load([0.75, 0.25])
    clear.set_facecolor("none")
    assert_rejects(check, plots.expert_load([0.5, 0.5]), clear)
    plain = matplotlib.figure.Figure()
    with pytest.raises(KeyError):  # matplotlib's own figure has no words
        check(plain)


def test_a_figure_without_words_is_not_shown():
    empty, axes = plots.subplots(1, 2)
    with pytest.raises(ValueError, match="empty has no text alternative: draw and label it, or set figure.alt"):
        empty._repr_mimebundle_()
    for panel in axes:
        panel.plot([0, 1], [2, 3])
    with pytest.raises(ValueError, match="without labels of its axes has no text alternative"):
        empty._repr_mimebundle_()
    with pytest.raises(ValueError, match="without axes has no text alternative"):
        plots.Figure()._repr_mimebundle_()
    empty.alt = "Two rising lines."
    assert empty._repr_mimebundle_()[1]["image/png"]["alt"] == "Two rising lines."


WORDS = {  # name -> a figure of right data, one of wrong data, and what its words must say
    "schedule_strip": (
        lambda: plots.schedule_strip(LAYERS), lambda: plots.schedule_strip(LAYERS[::-1]),
        ["8 layers", "7 mamba, 1 attention (layer 4)", "4 mlp, 4 moe (layers 1 to 7, one in 2)"],
    ),
    "budget_bars": (
        lambda: plots.budget_bars({"experts": 42.0, "KV cache": 4.0}, 80),
        lambda: plots.budget_bars({"experts": 4.0, "KV cache": 42.0}, 80),
        ["experts: 42, KV cache: 4", "46.0 GiB fits in 80 GiB", "57.5 %"],
    ),
    "scan_tree": (
        lambda: plots.scan_tree(16, "blelloch"), lambda: plots.scan_tree(16, "hillis-steele"),
        ["16 elements", "26 combinations in 7 levels", "8 over 1, 4 over 2, 2 over 4, 1 over 8, 1 over 4, 3 over 2, 7"],
    ),
    "impulse_responses": (
        lambda: plots.impulse_responses(TIMES, DECAYS, ["slow", "middle", "fast"], "seconds", "left"),
        lambda: plots.impulse_responses(TIMES, DECAYS[::-1], ["slow", "middle", "fast"], "seconds", "left"),
        ["left against seconds", "slow: 1 at 0 to 0.368 at 5", "fast: 1 at 0 to 3.06e-07 at 5"],
    ),
    "cache_growth": (
        lambda: plots.cache_growth(TOKENS, {"KV": TOKENS * 512, "state": [272384] * 4}, "KiB", ("KV", "state")),
        lambda: plots.cache_growth(TOKENS, {"KV": TOKENS * 256, "state": [272384] * 4}, "KiB", ("KV", "state")),
        ["cache in KiB", "logarithmic in x and y", "KV: 128 at 256 to 1,024 at 2,048", "state: 266 from 256 to 2,048",
         "KV above state from 532 tokens on"],
    ),
    "expert_load": (
        lambda: plots.expert_load({"before": [0.7, 0.2, 0.1, 0.0], "after": [0.25] * 4}),
        lambda: plots.expert_load({"before": [0.7, 0.2, 0.0, 0.1], "after": [0.25] * 4}),
        ["before: 0: 0.7, 1: 0.2, 2: 0.1, 3: 0", "expert 0, 2.8 times the even share of 0.25",
         "least for expert 3, 0.",
         "after: 4 experts, each within 2 % of the even share of 0.25"],
    ),
    "loss_curves": (
        lambda: plots.loss_curves([0, 5, 9], {"a": [4, 1, 2]}, dots={"b": ([9], [3])}, levels={"uniform": 5.5}),
        lambda: plots.loss_curves([0, 5, 9], {"a": [4, 2, 2]}, dots={"b": ([9], [3])}, levels={"uniform": 5.5}),
        ["nats a token against step", "a: 4 at 0 to 2 at 9, lowest 1 at 5", "b: 3 at 9", "uniform: a level at 5.5"],
    ),
    "roofline": (
        lambda: plots.roofline({"slow": (0.5, 2.5e11), "fast": (8.0, 6e12)}, 2e12, 6e12, "products"),
        lambda: plots.roofline({"slow": (0.5, 2.5e11), "fast": (8.0, 6e12)}, 3e12, 6e12, "products"),
        ["ridge at 3 products a byte", "slow: 2.5e11 at 0.5, 25 % of the roof, limited by bytes", "2e12 bytes a second",
         "fast: 6e12 at 8, 100 % of the roof, limited by products"],
    ),
    "race": (
        lambda: plots.race(["2K", "4K"], {"ours": [1.0, 2.0], "theirs": [3.0, 5.0]}, {"bytes": [0.5, 0.5]}, "ms"),
        lambda: plots.race(["2K", "4K"], {"ours": [1.0, 2.5], "theirs": [3.0, 5.0]}, {"bytes": [0.5, 0.5]}, "ms"),
        ["in ms", "ours: 2K: 1, 4K: 2", "theirs: 2.5 to 3 times as long as ours", "2 to 4 times the line bytes"],
    ),
    "attention_map": (
        lambda: plots.attention_map(INDUCTION, marks=[(6, 2), (7, 3), (8, 4), (9, 5)], mark="what came after"),
        lambda: plots.attention_map(INDUCTION, marks=[(6, 1), (7, 2), (8, 3), (9, 4)], mark="what came after"),
        ["10 queries down, 10 keys across", "weight of 1", "6 of the 10 queries", "4 keys back",
         "4 squares (what came after) hold a weight of 0.8"],
    ),
    "packing_errors": (
        lambda: plots.packing_errors([0, 4], ["mlp", "moe"], {"8 bits": [0.6, 0.8]}, {"8 bits": 0.65}),
        lambda: plots.packing_errors([0, 4], ["mlp", "moe"], {"8 bits": [0.8, 0.6]}, {"8 bits": 0.65}),
        ["2 matrices", "8 bits: 0.6 to 0.8 %", "in layer 4 (moe)", "0.65 expected"],
    ),
    "rounded_weights": (
        lambda: plots.rounded_weights([0.9, -0.4, 0.1], {"three": ([-1.0, 0.0, 1.0], [1.0, 0.0, 0.0])}),
        lambda: plots.rounded_weights([0.9, -0.4, 0.1], {"three": ([-1.0, 0.0, 1.0], [0.0, 0.0, 0.0])}),
        ["3 weights", "three: 3 numbers in steps of 1", "moved by 0.4, and 0 by more"],
    ),
    "reached": (
        lambda: plots.reached({"a": 3.0, "b": math.nan}, {"a": 5.0}, "tokens a second", "roof"),
        lambda: plots.reached({"a": 3.0, "b": math.nan}, {"a": 6.0}, "tokens a second", "roof"),
        ["tokens a second", "(roof)", "a 3, 60 % of 5", "b not measured"],
    ),
    "over": (
        lambda: plots.over({"a": (SIZES, [2, 9, 3]), "b": ([1], [math.nan])}, "batch", "speed", level=("m", 7)),
        lambda: plots.over({"a": (SIZES, [2, 8, 3]), "b": ([1], [math.nan])}, "batch", "speed", level=("m", 7)),
        ["speed against batch", "a: 2 at 1 to 3 at 8, highest 9 at 4", "m: a level at 7"],
    ),
    "stacked": (
        lambda: plots.stacked(["x", "y"], {"waiting": [1, 2], "experts": [3, 4]}, "seconds", {"x": 2.5}, "the files"),
        lambda: plots.stacked(["x", "y"], {"waiting": [3, 2], "experts": [1, 4]}, "seconds", {"x": 2.5}, "the files"),
        ["in seconds", "x 4: waiting 1, experts 3 (tick at 2.5)", "y 6: waiting 2, experts 4", "a tick is the files"],
    ),
    "tables": (
        lambda: plots.tables({"layer 1": [[0.1, 0.9], [0.4, 0.3]]}, "expert", "kind", "share", digits=".1f"),
        lambda: plots.tables({"layer 1": [[0.9, 0.1], [0.4, 0.3]]}, "expert", "kind", "share", digits=".1f"),
        ["share, kind down, expert across", "2 rows of 2, from 0.1 in row 0, column 0 to 0.9 in row 0, column 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_say_the_numbers(name):
    right, wrong, phrases = WORDS[name]

    def check(make):
        alt = make().alt
        assert [phrase for phrase in phrases if phrase not in alt] == [], alt
        assert 60 < len(alt) < 900 and alt.endswith(".") and "\n" not in alt and "nan" not in alt

    check(right)
    assert_rejects(check, wrong)


def test_every_function_that_draws_has_its_words_tested():
    drawing = {
        name for name, f in vars(plots).items() if getattr(f, "__annotations__", {}).get("return") is plots.Figure
    }
    assert drawing == set(WORDS)


def test_what_is_drawn_by_hand_is_described():
    def check(height):
        figure, axes = plots.subplots(1, 2, sharey=True)
        axes[0].bar([0.1, 1.1], [height, 0.25], label="held")  # a little beside the ticks that name them
        axes[0].set_xticks([0, 1], ["mamba", "moe"])
        axes[0].axhline(0.5, label="half")
        axes[0].set_ylabel("share")
        axes[1].plot([1, 10, 100], [3.0, 0.125, 2.0], label="error")
        axes[1].plot([1, 10], [0, 0])
        axes[1].axvline(7, label="here")
        axes[1].vlines([2, 4], 0, [1, 5], label="stream")
        axes[1].axvspan(2, 3, label="new")
        axes[1].set(xlabel="step", title="broken", xscale="log")
        assert figure.alt == (
            "Chart of share against step: half: a level at 0.5; held: mamba: 1.5, moe: 0.25. "
            "Chart of share against step, broken (logarithmic in x): error: 3 at 1 to 2 at 100, lowest 0.125 at 10; "
            "here: a mark at 7; stream: from 2 to 4, between 0 and 5; new: from 2 to 3; 0 from 1 to 10."
        )
        for place in range(4):  # beside what is labelled, many things without a label are not told one by one
            axes[1].plot(place, 9, "o")
        assert figure.alt.endswith("new: from 2 to 3.")
        axes[0].clear()
        axes[0].hist([1.0, 1.0, 2.0], bins=2, label="lives")
        assert "lives: 1.25: 2, 1.75: 1." in figure.alt

    check(1.5)
    assert_rejects(check, 1.25)


def test_numbers_are_said_alike_everywhere():
    said = {
        0.0: "0", 262_144: "262,144", 16_056_320: "1.61e7", 4.27e12: "4.27e12", 0.00012: "0.00012", 1 / 3: "0.333",
        1234.5: "1,230", 0.1 + 0.2: "0.3", math.inf: "infinite", math.nan: "not measured", -2.0: "-2",
    }  # fmt: skip
    assert [words.number(value) for value in said] == list(said.values())


@pytest.mark.parametrize("name", WORDS)
def test_text_is_legible_on_its_own_paper(name):
    def check(figure):
        papers = [figure.get_facecolor(), *(axes.get_facecolor() for axes in figure.axes)]
        assert set(papers) == {(1.0, 1.0, 1.0, 1.0)}, "opaque white, for dark pages too"
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 8
        on_shades = [text for axes in figure.axes if axes.images for text in axes.texts]  # judged by the next test
        assert min(contrast(text.get_color(), "white") for text in texts if text not in on_shades) >= 4.5  # WCAG 2, AA

    figure = WORDS[name][0]()
    check(figure)

    def spoil(change):
        label = figure.axes[0].xaxis.label
        label.set(**{"text": "x", "color": "black", "fontsize": 10, **change})
        check(figure)

    assert_rejects(spoil, {"color": "#B5B5B5"}, {"fontsize": 7})
    figure.set_facecolor("none")
    assert_rejects(spoil, {})


def contrast(ink, paper) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of the relative luminances, WCAG 2."""
    rgb = np.array([matplotlib.colors.to_rgb(ink), matplotlib.colors.to_rgb(paper)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (high + 0.05) / (low + 0.05)


def test_numbers_in_a_table_are_legible_on_every_shade():
    values = np.linspace(0, 2, 21)

    def check(even):
        (axes, _) = plots.tables({"": [values]}, "x", "y", "load", even=even, top=2, digits=".1f").axes
        image = axes.images[0]
        papers = [image.cmap(image.norm(value)) for value in values]
        assert min(contrast(text.get_color(), paper) for text, paper in zip(axes.texts, papers, strict=True)) > 4.5

    check(None)
    check(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_ink", lambda paper: "black")
        assert_rejects(check, 1)

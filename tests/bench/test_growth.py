"""`dmae-ds bench growth`: what is measured of a recipe, how it is compared, and what is refused."""

from __future__ import annotations

import json

import pytest

from dmae_ds.bench import growth
from dmae_ds.bench.growth import compare, table, write_plot
from dmae_ds.bench.growth_axes import OWN, Axis, find_axes
from dmae_ds.bench.step_peak import measure_peaks
from dmae_ds.cli.bench import GROWTH
from dmae_ds.cli.main import main
from dmae_ds.config.load import load_config
from dmae_ds.errors import UserError
from dmae_ds.objectives.build import build_objective
from tests.messages import refused
from tests.train.conftest import command, run

RECIPE = ["digits_dmae", "optim.global_batch=4", "student.depth=2", "teacher.embed_dim=32"]
STEP = {
    "gflop": 2.0,
    "seconds": 2.0,
    "round_seconds": [2.0, 4.0, 2.0],
    "peak_gib": 0.25,
    "predicted_gib": 0.5,
}


def axes_of(*words: str, **asked: list):
    values = {option: asked.get(option[2:].replace("-", "_")) for option in GROWTH}
    return find_axes(lambda changes: load_config(words[0], [*words[1:], *changes]), values)


def test_every_axis_has_the_recipe_and_other_values():
    axes, left_out = axes_of("digits_dmae")
    width, depth, ratio, students = axes
    assert not left_out and [axis.option for axis in axes] == list(GROWTH)
    assert list(width.recipes) == [32, 64, 128] and width.recipes[128].student.embed_dim == 128
    # The objective taps three quarters of the teacher's depth.
    assert depth.blocks == {4: 3, 8: 6, 16: 12}
    assert [config.objective.mask_ratio for config in ratio.recipes.values()] == [0.5, 0.75, 0.9]
    for axis in axes:
        assert axis.name(axis.own) == OWN and axis.recipes[axis.own] == load_config("digits_dmae")
    family, _ = build_objective(students.recipes[3], device="meta")
    assert len(family.members()) == 3 and set(family.pass_of.values()) == {0}  # one pass of the teacher


def test_what_a_recipe_lacks_or_refuses_is_left_out_and_told():
    axes, left_out = axes_of("digits_dino")
    assert [axis.option for axis in axes] == ["--widths"]
    assert {"teacher depth", "mask ratio", "students", "students 2"} <= set(left_out)
    assert "EMA" in left_out["students 2"]
    assert load_config("digits_features_masked").objective.mask_key == "objective.mask.ratio"
    # Given values are measured alone, each once.
    (axis,), left_out = axes_of("digits_mae", mask_ratios=[0.9, 0.6, 0.9])
    assert list(axis.recipes) == [0.6, 0.75, 0.9] and not left_out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["digits_dmae", "--widths", "128", "50"], ("--widths", "50", "num_heads")),
        (["digits_dmae", "--widths", "64"], ("--widths", "64")),
        (["digits_dmae", "--mask-ratios", "1.5"], ("--mask-ratios", "1.5")),
        (["digits_dmae", "--depths", "0"], ("--depths", "teacher.depth")),
        (["digits_mae", "--depths", "4"], ("--depths", "teacher depth")),
        (["digits_dmae", "objective.pairs=[[2,4]]", "--depths", "16"], ("--depths", "4 blocks")),
        (["digits_dino", "--students", "2"], ("--students", "EMA")),
        (["digits_family"], ("students", "dmae, features, mae")),
        (["digits_two_teachers"], ("teachers", "mae, moco")),
        (["digits_dmae", "teacher.placement=zero3"], ("teacher.placement", "zero3")),
        (["digits_dmae", "--plot", "growth.jpg"], ("--plot", ".png")),
        (["digits_dmae", "--plot", "no/such/folder.png"], ("--plot", "no/such")),
        (["digits_dmea"], ("digits_dmae",)),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(words, expected, capsys, monkeypatch):
    monkeypatch.setattr(growth, "_measure", None)
    assert main(["bench", "growth", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not [word for word in expected if word not in line]


def test_the_recipe_s_own_step_and_every_other_value_are_measured_once(monkeypatch):
    measured = {}

    def measure(recipes, world, *, rounds):
        measured.update(recipes)
        raise UserError("enough")

    monkeypatch.setattr(growth, "_measure", measure)
    assert main(["bench", "growth", "digits_dmae", "--widths", "32", "128"]) == 2
    widths = [config.student.embed_dim for config in measured.values()]
    assert widths == [64, 32, 128] and measured[OWN] == load_config("digits_dmae")


@pytest.mark.parametrize("words", [["--students", "0"], ["--widths", "wide"], ["--mask-ratios"]])
def test_a_value_of_another_kind_is_refused_by_the_parser(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "growth", "digits_dmae", *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and words[0] in line


@pytest.fixture(scope="module")
def two_axes() -> list[Axis]:
    axes, _ = axes_of("digits_dmae", "teacher.depth=4", widths=[128], depths=[8])
    return axes


@pytest.fixture
def results(two_axes) -> dict:
    """Results of two axes: twice the width is three times the time and twice the work."""
    axes = two_axes
    wide = {"gflop": 4.0, "seconds": 6.0, "round_seconds": [6.0, 6.0, 7.0], "peak_gib": 0.5}
    deep = {"gflop": 3.0, "seconds": 3.0, "round_seconds": [3.0, 3.0, 3.0]}
    steps = [{**STEP, "name": OWN}, {**STEP, **wide, "name": axes[0].name(128)}]
    steps.append({**STEP, **deep, "name": axes[1].name(8)})
    of_device = {"recipe": "r$1", "device": "d", "threads": 1, "rounds": 3}
    products = {"gemm_gflops": {"fp32": 1.0}, "gemm_kernel": {"fp32": "kernel"}}
    compared = {"axes": [compare(axis, steps) for axis in axes], "left_out": {"students": "none here"}}
    return {**of_device, **products, "steps": steps, **compared}


def test_ratios_are_to_the_recipe_in_the_same_round(results):
    own, wide = results["axes"][0]["points"]
    assert (own["value"], wide["value"]) == (64, 128) and results["axes"][0]["own"] == 64
    assert own["seconds_ratio"] == own["gflop_ratio"] == own["peak_ratio"] == own["time_over_work"] == 1
    assert wide["seconds_ratio"] == 3.0 and wide["seconds_ratio_range"] == [1.5, 3.5]
    assert (wide["gflop_ratio"], wide["peak_ratio"], wide["time_over_work"]) == (2.0, 2.0, 1.5)
    assert [point["teacher_blocks"] for point in results["axes"][1]["points"]] == [3, 6]


def test_the_table_has_a_row_for_each_point_and_a_line_for_each_axis(results):
    lines = table(results).splitlines()
    rows = [line.split() for line in lines]
    assert ["128", "6.000", "3.00", "1.50-3.50", "4.00", "2.00", "1.50", "512", "2.00", "512"] in rows
    assert any(row[:5] == ["teacher", "depth", "4", "(3", "run)"] and "*" in row for row in rows)
    summary = next(line for line in lines if line.startswith("student width 64 to 128"))
    assert all(word in summary for word in ("work x 2.00", "time x 3.00", "memory x 2.00", "1.00 to 1.50"))
    assert lines[-1].endswith("none here")


def test_a_system_that_tells_no_memory_leaves_it_out(results, two_axes):
    steps = [{**step, "peak_gib": None} for step in results["steps"]]
    results |= {"axes": [compare(two_axes[0], steps)], "steps": steps}
    assert results["axes"][0]["points"][1]["peak_ratio"] is None
    assert "memory x" not in table(results)
    (panel,) = growth.draw_growth(results).axes
    assert len(panel.get_legend_handles_labels()[1]) == 2


def test_the_plot_is_a_whole_png_or_nothing(results, tmp_path):
    plot = tmp_path / "growth.png"
    write_plot(plot, results)
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size < 100_000
    (tmp_path / "folder.png").mkdir()
    with refused("--plot", "folder.png"):
        write_plot(tmp_path / "folder.png", results)
    first, second = growth.draw_growth(results).axes
    assert first.get_ylim()[0] == 0
    assert [text.get_text() for text in second.get_xticklabels()] == ["4\n(3)", "8\n(6)"]


@pytest.mark.slow
def test_it_is_measured(tmp_path):
    """One axis, with the plot; every figure is of the same run."""
    words = ["--students", "2", "--mask-ratios", "0.5", "--rounds", "2", "--plot", "growth.png", "--json"]
    done = run(command(["bench", "growth", *RECIPE, *words], ranks=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [step["name"] for step in found["steps"]] == [OWN, "mask ratio 0.5", "students 2"]
    for axis, more in zip(found["axes"], ("mask ratio 0.5", "students 2"), strict=True):
        (point,) = [one for one in axis["points"] if one["step"] == more]
        # More visible patches, or a second student with the one pass of the teacher.
        assert 1 < point["gflop_ratio"] < 2 and point["seconds_ratio"] > 0 and point["peak_ratio"] > 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_small_step_after_a_large_one_has_a_small_peak():
    small = load_config("digits_dmae", ["optim.global_batch=4"])
    large = load_config("digits_dmae", ["optim.global_batch=256"])
    peaks = measure_peaks({"large": large, "small": small})
    assert 0 < peaks["small"] < 0.6 * peaks["large"]

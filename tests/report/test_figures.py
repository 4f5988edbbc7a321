"""Figures: what is drawn, in which colours, and the labels of the axes."""

from types import SimpleNamespace

import numpy as np
import pytest

from dmae_ds.output.theme import to_png, to_svg
from dmae_ds.report.charts import draw_losses
from dmae_ds.report.figures import Curve, draw_bars, draw_curves, draw_grid, draw_mosaic, thin_out

CURVE = Curve("run", 0, [0, 1], [0.4, 0.5])


def test_a_long_curve_is_drawn_as_means_and_a_short_one_as_it_is():
    epochs, values, stretch = thin_out([0, 1, 2, 3, 4], [1, 3, 5, 7, 100], max_points=3)
    assert (epochs.tolist(), values.tolist(), stretch) == ([0.5, 2.5, 4], [2, 6, 100], 2)
    assert thin_out([1, 2], [3, 4])[1].tolist() == [3, 4]
    long = draw_curves("long", [Curve("run", 0, list(range(100_000)), [1.0] * 100_000)], unit="loss")
    assert len(to_svg(long)) < 40_000


def test_a_share_is_drawn_from_0_to_100_with_the_mark_of_a_dead_term():
    figure = draw_curves("share", [CURVE], unit="%", share=True)
    assert figure.axes[0].get_ylim() == (0, 1)
    loss = draw_curves("loss", [CURVE], unit="loss")
    assert "dead term is below 5%" in to_svg(figure) and "dead term" not in to_svg(loss)
    assert to_png(figure)[:4] == b"\x89PNG"


def test_axes_have_units_and_a_mark_its_meaning():
    figure = draw_curves("rank", [CURVE], unit="directions", from_zero=True, mark=(0.3, "collapsed below it"))
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "directions") and axes.get_ylim()[0] == 0
    assert "collapsed below it" in to_svg(figure)


def test_every_chart_of_a_loss_has_a_unit_and_parts_have_their_own():
    columns = {
        name: [1.0, 0.5] for name in ("loss", "pixel", "align/3-6", "val/loss", "val/pixel", "val/cls")
    }
    record = SimpleNamespace(
        losses=["loss", "pixel", "align/3-6"],
        named=lambda prefix: [name for name in columns if name.startswith(prefix)],
        epochs=lambda column: [0, 1],
        column=lambda column: columns.get(column, []),
    )
    units = {name: figure.axes[0].get_ylabel() for name, figure in draw_losses({"run": record}).items()}
    assert set(units) == {"loss", "pixel", "align-3-6", "val-loss", "val-pixel", "val-cls"}
    assert all(units.values()) and len({units["loss"], units["pixel"], units["align-3-6"]}) == 3
    assert units["val-loss"] == units["loss"] and units["val-pixel"] == units["pixel"]


def test_a_grid_is_as_opaque_as_its_values_and_numbered_from_one():
    values = np.array([[0.25, 0.5, 1.2], [-0.1, 0.999, 0.0]])
    figure = draw_grid("grid", values, rows="student", columns="teacher", marked=[(2, 1)])
    cells, frame = figure.axes[0].patches[:6], figure.axes[0].patches[6]
    opaque = [cell.get_facecolor()[3] for cell in cells]
    assert np.array(opaque) / max(opaque) == pytest.approx([0.25, 0.5, 1, 0, 0.999, 0])
    assert cells[0].get_xy() == pytest.approx((0.52, 0.52))
    assert frame.get_xy() == pytest.approx((0.52, 1.52)) and not frame.get_fill()
    assert [text.get_text() for text in figure.axes[0].texts] == [".25", ".50", "1", "0", "1", "0"]
    many = draw_grid("grid", np.full((12, 24), 0.5), rows="student", columns="teacher", marked=[])
    assert [text.get_text() for text in many.legends[0].texts] == ["0", ".25", ".50", ".75", "1"]
    assert not figure.legends
    assert not many.axes[0].texts and many.axes[0].get_xticks().tolist() == [1, 4, 8, 12, 16, 20, 24]


def test_bars_are_as_long_as_the_sum_of_their_parts():
    bars = [("a", 0, [1.0, 2.0, 3.0]), ("b", 1, [0.5, 0.0, 0.5])]
    figure = draw_bars("time", bars, ["data", "teacher", "rest"], unit="s")
    (axes,) = figure.axes
    assert [patch.get_x() for patch in axes.patches] == [0, 1, 3, 0, 0.5, 0.5]
    assert [patch.get_width() for patch in axes.patches] == [1, 2, 3, 0.5, 0, 0.5]
    assert len({patch.get_facecolor()[:3] for patch in axes.patches}) == 2 and axes.get_xlabel() == "s"


def test_a_mosaic_has_labels_at_the_left_and_heads_above():
    figure = draw_mosaic("title", np.zeros((20, 30, 3), np.uint8), ["one", "two"], ["a", "b", "c"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert (axes.get_yticks().tolist(), axes.get_xticks().tolist()) == ([5, 15], [5, 15, 25])

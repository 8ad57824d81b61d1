"""Curves from metrics.csv, and heat maps."""

import cv2
import numpy as np
import pytest

from segmill.report.charts import Curve, curve_charts, heat_map, read_curves, row_shares


def curve(count):
    return Curve(np.arange(count, dtype=float), np.linspace(1, 0, count))


def test_blanks_in_metrics_csv_are_steps_without_a_value(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/mIoU\n0,9,1.5,\n0,9,,0.25\n0,19,1.0,\n")
    curves = read_curves(path)
    assert set(curves) == {"train/loss", "val/mIoU"}
    assert curves["train/loss"].steps.tolist() == [9, 19]
    assert curves["val/mIoU"].values.tolist() == [0.25]


def test_a_resumed_run_continues_its_curve(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n0,3\n1,2\n2,9\n2,1\n3,0.5\n")
    curves = read_curves(path)
    assert curves["train/loss"].values.tolist() == [3, 2, 1, 0.5]


def test_values_of_a_kind_share_a_chart_and_classes_have_none():
    keys = ("train/loss", "train/decode.loss_ce", "lr", "val/mIoU", "val/aAcc", "val/IoU/road")
    charts = curve_charts({key: curve(5) for key in (*keys, "train/grad_norm")})
    assert [chart.title for chart in charts] == ["Scores", "Loss", "Learning rate", "grad_norm"]
    assert [key for _, key in charts[0].legend] == ["val/mIoU", "val/aAcc"]


def test_charts_take_their_colours_from_the_page():
    svg = curve_charts({"train/loss": curve(5)})[0].svg
    assert svg.startswith("<svg")
    assert "var(--line-0)" in svg
    assert "#0a0a" not in svg
    assert "#0b0b" not in svg


def test_a_long_curve_stays_small():
    assert len(curve_charts({"train/loss": curve(50_000)})[0].svg) < 60_000


@pytest.mark.parametrize("values", [[float("nan")] * 3, [1.0, float("nan"), float("inf")]])
def test_a_loss_that_went_wrong_can_still_be_drawn(values):
    assert curve_charts({"train/loss": Curve(np.arange(3.0), np.array(values))})


def test_rows_are_shares_and_absent_classes_are_undefined():
    shares = row_shares(np.array([[3, 1], [0, 0]]))
    assert shares[0].tolist() == [0.75, 0.25]
    assert np.isnan(shares[1]).all()


def test_a_heat_map_is_a_png_of_about_the_asked_size():
    png = heat_map(row_shares(np.eye(150, dtype=np.int64)), side=720)
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (600, 600, 3)
    assert picture[0, 0].sum() < picture[0, -1].sum()

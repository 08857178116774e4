"Figures of the benchmark: what they draw is what the tables say, and gaps do not break them."
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from cromss.config import DataError
from cromss.evidence import Calibration, paired_interval
from cromss.figures import plot_detection, plot_intervals, plot_methods, plot_reliability, plot_tracking, plot_transfer


def drawn(figure, folder):
    "The texts of the figure drawn to a file; it is not wider than a page, and pyplot must not hold it."
    assert plt.get_fignums() == []
    figure.savefig(folder / "figure.png")
    assert plt.imread(folder / "figure.png").shape[1] <= 1000
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def dots(axis):
    "The values of all dots of runs, by row."
    return {line.get_ydata()[0]: sorted(np.round(line.get_xdata(), 6)) for line in axis.lines if line.get_marker() == "o"}


def cells(runs=1):
    rows = [{"kind": kind, "score": score, "auroc": value, "share": share} for kind, share, values in (("any", .4, (.9, .92)), ("blobs", .1, (.97, .95))) for score, value in zip(("S1 own", "S2 own"), values)]
    return pd.concat([pd.DataFrame(rows).assign(run=i) for i in range(runs)])


def test_detection_writes_and_frames_the_best(tmp_path):
    figure = plot_detection(cells())
    texts = drawn(figure, tmp_path)
    assert {"0.900", "0.920", "0.970", "0.950", "S1\nown", "any\n40.0% of pixels"} <= set(texts) and not any("±" in t for t in texts)
    bold = {t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"}
    frames = [p.get_xy() for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert bold == {"0.920", "0.970"} and np.allclose(frames, [(.54, -.44), (-.46, .56)])


def test_detection_averages_runs_and_leaves_gaps(tmp_path):
    table = cells(2).reset_index(drop=True)
    table.loc[(table["run"] == 1) & (table["kind"] == "any"), "auroc"] += .02
    table = table[~((table["kind"] == "blobs") & (table["score"] == "S2 own"))].drop(columns="share")
    texts = drawn(plot_detection(table), tmp_path)
    assert {"0.910", "± 0.014", "± 0.000", "any"} <= set(texts) and "0.950" not in texts
    assert "0.970" in drawn(plot_detection(table.assign(auroc=table["auroc"].where(table["kind"] == "blobs"))), tmp_path)


def runs():
    return pd.DataFrame([(method, sensor, method == "averaged", value + .01 * run) for method, sensor, value in (("averaged", "mean", .6), ("one", "s2", .5), ("two", "s2", .55), ("two", "mean", .62))
                         for run in range(3)], columns=["method", "sensor", "control", "miou"])


def test_methods_has_a_dot_for_each_run_and_sets_controls_apart(tmp_path):
    figure = plot_methods(runs())
    texts = drawn(figure, tmp_path)
    both, optical = figure.axes
    assert dots(optical) == {0: [50, 51, 52], 1: [55, 56, 57]} and dots(both) == {1: [62, 63, 64], 2: [60, 61, 62]}
    assert [t.get_text() for t in both.get_yticklabels()] == ["one", "two", "averaged"] and {"Sentinel-2", "mean of both", "51.0", "mIoU on the truth, %"} <= set(texts)
    hollow = [line.get_markerfacecolor() for line in both.lines if line.get_marker() == "o"]
    assert hollow[-1] == "white" and hollow[0] != "white"


def test_methods_without_controls_and_with_nan(tmp_path):
    table = runs().drop(columns="control")
    table.loc[table["method"] == "one", "miou"] = np.nan
    figure = plot_methods(table.rename(columns={"miou": "oa"}), "oa")
    assert "overall accuracy, %" in drawn(figure, tmp_path) and dots(figure.axes[1]) == {2: [55, 56, 57]}


def test_intervals_fill_dots_whose_interval_leaves_out_zero(tmp_path):
    table = pd.DataFrame([("a − b", "s2", .02, -.01, .04, .01, .03, 6, 6), ("a − b", "s1", .01, -.02, .04, -.01, .02, 4, 6)],
                         columns=["comparison", "sensor", "mean", "low", "high", "low_fixed", "high_fixed", "better", "runs"])
    figure = plot_intervals(table)
    texts = drawn(figure, tmp_path)
    assert {"6 of 6", "4 of 6", "Sentinel-2", "95 %, these scenes", "better in"} <= set(texts)
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert faces == ["#D55E00", "white"]
    ends = [tuple(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() != "o"]
    assert np.allclose(ends, [(0, 0), (-1, 4), (1, 3), (-2, 4), (-1, 2)])


def test_intervals_of_scalar_figures(tmp_path):
    found = paired_interval({0: .6, 1: .7, 2: .66}, {0: .5, 1: .58, 2: .55})
    figure = plot_intervals(pd.DataFrame([{"comparison": "a − b", **found}]), label="difference in AUROC, points")
    assert {"3 of 3", "difference in AUROC, points"} <= set(drawn(figure, tmp_path)) and not figure.legends
    assert [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"] == ["#D55E00"]
    alone = pd.DataFrame([{"comparison": "a − b", **paired_interval({0: .6}, {0: .5})}])
    assert "1 of 1" in drawn(plot_intervals(alone), tmp_path)


def test_tracking_averages_runs_over_the_epochs(tmp_path):
    table = pd.DataFrame([(m, e, what, v + e / 10 + r / 100, r) for m, v in (("a", .1), ("b", .2)) for what in ("auroc", "miou") for e in range(4) for r in (0, 1)], columns=["method", "epoch", "measure", "value", "run"])
    figure = plot_tracking(table)
    assert {"auroc", "miou", "a", "b", "epoch"} <= set(drawn(figure, tmp_path))
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2, 3, 4] and np.allclose(line.get_ydata(), [.105, .205, .305, .405]) and len(figure.axes[0].collections) == 2


def test_tracking_with_sensors_gaps_and_one_epoch(tmp_path):
    table = pd.DataFrame([("a", 0, "auroc", .5, "s1"), ("a", 0, "auroc", .6, "s2"), ("a", 1, "auroc", np.nan, "s2")], columns=["method", "epoch", "measure", "value", "sensor"])
    figure = plot_tracking(table)
    assert {"Sentinel-1", "Sentinel-2"} <= set(drawn(figure, tmp_path)) and [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"]


def test_reliability_names_the_error(tmp_path):
    rng = np.random.default_rng(0)
    found = Calibration()
    found.update(rng.random(5000), rng.random(5000) < .5, np.ones(5000, bool))
    figure = plot_reliability(found.table().assign(method="GCE"))
    assert f"GCE: error {100 * found.ece():.1f} %" in drawn(figure, tmp_path)
    assert sum(figure.axes[1].lines[0].get_ydata()) == pytest.approx(100)


def test_transfer_has_a_panel_for_each_sensor_and_mode(tmp_path):
    table = pd.DataFrame([(start, mode, sensor, value + .01 * r) for start, value in (("random", .4), ("CromSS", .6)) for mode in ("frozen", "fine-tuned") for sensor in ("s2", "s1") for r in range(2)],
                         columns=["start", "mode", "sensor", "miou"])
    figure = plot_transfer(table[~((table["start"] == "random") & (table["mode"] == "fine-tuned"))])
    assert {"Sentinel-2, frozen", "Sentinel-1, fine-tuned", "random", "CromSS"} <= set(drawn(figure, tmp_path))
    assert len(figure.axes) == 4 and dots(figure.axes[0]) == {0: [40, 41], 1: [60, 61]} and dots(figure.axes[3]) == {1: [60, 61]}


@pytest.mark.parametrize("plot", [plot_detection, plot_methods, plot_intervals, plot_tracking, plot_reliability, plot_transfer])
def test_tables_that_lack_a_column_or_are_empty_are_refused(plot):
    with pytest.raises(DataError, match="the table has no column .*; it has other"): plot(pd.DataFrame({"other": [1]}))
    columns = ["kind", "score", "auroc", "method", "sensor", "miou", "comparison", "mean", "low", "high", "epoch", "measure", "value", "confidence", "accuracy", "pixels", "start", "mode"]
    with pytest.raises(DataError, match="the table has no row"): plot(pd.DataFrame(columns=columns))

"Figures: they can be made from what the kit gives them, name only what is there, and do not break on gaps."
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from cromss.classes import IGNORE, SCHEMES
from cromss.config import DataError
from cromss.dataset import Split
from cromss.plots import (class_table, legend, outline, panels, plot_comparison, plot_confidence, plot_confusion, plot_curves, plot_differences, plot_learning, plot_noise, plot_places, plot_predictions, plot_report, plot_samples, plot_selection,
                          plot_smoothing, present, sar_composite, stretch, true_color)
from cromss.scenes import ScenesSource
from cromss.sensors import SENSORS, to_unit

SCHEME = SCHEMES["dynamic-world"]
BOTH = {name: SENSORS[name] for name in ("s1", "s2")}


@pytest.fixture(scope="module")
def place():
    "One built-in scene."
    return ScenesSource(count=1, size=32, sensors=("s1", "s2", "dem")).read("scene-00000")


@pytest.fixture
def shown(place):
    "A sample, as a dataset gives it."
    images = {f"image_{s}": to_unit(place.images[s][1]) for s in ("s1", "s2")}
    return {**images, "mask": place.labels[1].astype(np.int64), "reference": place.reference[1], "key": "scene-00000"}


def drawn(figure, folder):
    "The size in px of the figure drawn to a file, and its texts; pyplot must not hold the figure."
    assert plt.get_fignums() == []
    figure.savefig(folder / "figure.png")
    height, width = plt.imread(folder / "figure.png").shape[:2]
    texts = [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
    return width, height, texts


def legend_of(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()]


def test_samples_with_and_without_reference(shown, tmp_path):
    bare = {k: v for k, v in shown.items() if k != "reference"}
    width, height, texts = drawn(plot_samples([shown, bare], BOTH, SCHEME, titles=["first", "second"]), tmp_path)
    assert width < 1150 and {"first", "second", "reference", "Sentinel-1 GRD"} <= set(texts)
    assert "reference" not in drawn(plot_samples(bare, BOTH, SCHEME), tmp_path)[2]


def test_legend_names_only_what_is_there(shown):
    shown["mask"][:] = 0
    shown["reference"] = np.full_like(shown["mask"], 6)
    assert legend_of(plot_samples([shown], BOTH, SCHEME)) == ["water", "built"]
    shown["mask"][:4] = IGNORE
    assert legend_of(plot_samples([shown], BOTH, SCHEME)) == ["water", "built", "unlabelled"]


def test_one_sensor_or_three(shown, place, tmp_path):
    assert len(plot_samples([shown], {"s2": SENSORS["s2"]}, SCHEME).axes) == 3
    shown["image_dem"] = to_unit(place.images["dem"][1])
    figure = plot_samples([shown], {**BOTH, "dem": SENSORS["dem"]}, SCHEME)
    assert len(figure.axes) == 5 and "Elevation" in drawn(figure, tmp_path)[2]
    with pytest.raises(DataError, match="no image of s3"): plot_samples([shown], {"s3": SENSORS["s1"]}, SCHEME)


def test_tensors_are_taken_too(shown, tmp_path):
    torch = pytest.importorskip("torch")
    as_tensor = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in shown.items()}
    assert drawn(plot_samples([as_tensor], BOTH, SCHEME), tmp_path)[0] > 600
    assert true_color(as_tensor["image_s2"].to(torch.bfloat16), SENSORS["s2"]).shape == (32, 32, 3)
    confidence = {s: torch.rand(1, 32, 32, requires_grad=True) for s in BOTH}
    selection = {k: confidence for k in ("label_confidence", "prediction_confidence", "entangled_label")}
    assert drawn(plot_confidence(as_tensor, selection, BOTH, SCHEME), tmp_path)


def test_true_color_of_band_subsets(shown):
    sensor = SENSORS["s2"].select(("B8", "B4", "B3", "B2"))
    image = shown["image_s2"][SENSORS["s2"].indices(sensor.bands)]
    assert np.allclose(true_color(image, sensor), true_color(shown["image_s2"], SENSORS["s2"]))
    assert true_color(image[:1], SENSORS["s2"].select(("B8",))).shape == (32, 32, 3)
    with pytest.raises(DataError, match="13 bands"): true_color(image, SENSORS["s2"])


def test_pictures_stand_gaps_and_constants():
    image = np.full((2, 8, 8), 0.5, np.float32)
    for picture in (sar_composite(image), sar_composite(np.where(np.eye(8) > 0, np.nan, image)), sar_composite(image * np.nan)):
        assert np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
    assert stretch(np.arange(100.0).reshape(10, 10)).max() == 1


def test_confidence_has_one_colour_bar_and_outlines(shown, tmp_path):
    confidence = {s: np.random.default_rng(0).random((32, 32)).astype(np.float32) for s in BOTH}
    selection = {k: confidence for k in ("label_confidence", "prediction_confidence", "entangled_label")}
    figure = plot_confidence(shown, selection, BOTH, SCHEME)
    width, _, texts = drawn(figure, tmp_path)
    assert 850 < width < 1150 and texts.count("confidence") == 1 and "outlined: label is wrong" in legend_of(figure)
    limits = {image.get_clim() for axis in figure.axes for image in axis.images if image.get_array().ndim == 2 and image.get_array().shape == (32, 32)}
    assert limits == {(0, 1)}
    del shown["reference"]
    assert "outlined: label is wrong" not in legend_of(plot_confidence(shown, selection, BOTH, SCHEME))


def test_confidence_takes_a_selection_object(shown, tmp_path):
    class Selection: label_confidence = prediction_confidence = {"s1": np.ones((32, 32)), "s2": np.ones((32, 32))}; entangled_label = None
    assert drawn(plot_confidence(shown, Selection(), BOTH, SCHEME), tmp_path)


def test_selection_states_the_share_of_full_weights(shown, tmp_path):
    labels = shown["mask"].copy()
    labels[:16] = IGNORE
    half = np.where(np.arange(32) < 16, 1, .3)[None].repeat(32, 0)
    texts = drawn(plot_selection({"s1": np.ones((32, 32))}, {"s1": half}, labels, SCHEME, 1.0, 0.5), tmp_path)[2]
    assert "100% of labels have weight 1" in texts and "50% of labels have weight 1" in texts and "weights, 50% kept" in texts
    assert "none of labels have weight 1" in drawn(plot_selection({"s1": half}, {"s1": half}, labels * 0 + IGNORE, SCHEME, 1, .5), tmp_path)[2]


def test_predictions_state_the_agreement(shown, tmp_path):
    texts = drawn(plot_predictions(shown, {"s1": shown["reference"], "s2": (shown["reference"] + 1) % 9}, SCHEME), tmp_path)[2]
    assert "100% agree" in texts and "0% agree" in texts
    del shown["reference"]
    assert not any("agree" in t for t in drawn(plot_predictions({"mask": shown["mask"]}, {"s1": shown["mask"]}, SCHEME), tmp_path)[2])


def test_noise_with_and_without_kinds(place, tmp_path):
    labels, truth = np.stack(place.labels), np.stack(place.reference)
    figure = plot_noise(labels, truth)
    assert any(t.startswith("wrong ") for t in legend_of(figure)) and len(figure.axes) == 12
    figure = plot_noise(labels[0], truth[0], np.full_like(labels[0], 3))
    assert "blobs 100.0%" in legend_of(figure) and len(figure.axes) == 3


def test_smoothing_of_unlabelled_pixels(shown, tmp_path):
    labels = shown["mask"].copy()
    target = np.eye(9, dtype=np.float32)[labels].transpose(2, 0, 1).copy()
    labels[:4], target[:, :4] = IGNORE, 0
    assert "unlabelled" in drawn(plot_smoothing(labels, target, SCHEME), tmp_path)[2]


def test_curves_leave_out_what_is_absent(tmp_path):
    metrics = pd.DataFrame({"epoch": [0, 1, 2], "train_loss": [3, 2, 1.0], "val_loss": [np.nan, 2, np.nan], "lr": np.nan, "note": ["a", "b", "c"],
                            "val_miou_s1": [.1, .2, .3], "val_miou_reference_s1": [.1, .2, .3], "val_miou_reference_s2": [.2, .3, .4]})
    figure = plot_curves(metrics)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["Loss", "mIoU on noisy labels, validation", "mIoU on the reference, validation"]
    assert all(axis.get_xlabel() == "epoch" and "(" in axis.get_ylabel() for axis in figure.axes)
    assert {line.get_label() for line in figure.axes[2].lines} == {"s1", "s2"}
    assert drawn(figure, tmp_path)[0] < 1100
    assert drawn(plot_curves(metrics[["train_loss"]]), tmp_path) and drawn(plot_curves(metrics.head(1)), tmp_path)
    with pytest.raises(DataError, match="no known metric among the columns epoch"): plot_curves(metrics[["epoch", "lr"]])


def test_curves_of_columns_by_step_and_epoch():
    "Rows of a logger that writes each metric on its own row."
    metrics = pd.DataFrame({"epoch": [0, 0, 1, 1], "train_loss": [3, np.nan, 2, np.nan], "val_loss": [np.nan, 3.1, np.nan, 2.2]})
    assert [len(line.get_xdata()) for line in plot_curves(metrics).axes[0].lines] == [2, 2]


def test_class_table_counts():
    confusion = np.zeros((9, 9), int)
    confusion[0, 0], confusion[0, 1], confusion[1, 1] = 6, 2, 4
    table = class_table(confusion, SCHEME)
    assert table.loc["water"].tolist() == [8, .75, .75, 1.0]
    assert table.loc["trees", "IoU"] == pytest.approx(4 / 6) and table.loc["trees", "precision"] == pytest.approx(4 / 6)
    assert table.loc["bare", ["IoU", "recall", "precision"]].isna().all() and table["pixels"].dtype == np.int64
    with pytest.raises(DataError, match="9 classes"): class_table(confusion[:3, :3], SCHEME)


def test_outlines_follow_the_pixels():
    figure, axes = panels(1, 1)
    where = np.zeros((5, 5), bool)
    where[2, 2] = True
    axes[0, 0].imshow(where)
    outline(axes[0, 0], where)
    segments = np.sort(np.concatenate(axes[0, 0].collections[0].get_segments()), 0)
    assert len(segments) == 8 and segments.min() == 1.5 and segments.max() == 2.5
    outline(axes[0, 0], ~where & False)


def test_empty_legend_and_present():
    figure, _ = panels(1, 1)
    legend(figure, SCHEME, [])
    assert figure.legends == [] and present(np.array([[3, 255]]), None, np.array([[0, 3]])) == [0, 3, 255]


# -- what was prepared ------------------------------------------------------------------------------------------------------------------------------

def prepared(**changes):
    "A report as `prepare` writes it."
    names = SCHEMES["dynamic-world"].names
    return {"kept": 3, "seasons": 9, "dropped": {}, "dropped_seasons": {}, "class_shares": {n: i / 36 for i, n in enumerate(names)}, "counts": {"unlabelled_share": 0.25},
            "histograms": {"s1": {"VV": [1] * 32, "VH": [0] * 32}}} | changes


def test_report_is_drawn():
    figure = plot_report(prepared(dropped={"no label": ["a", "b"]}, dropped_seasons={"bad raster": ["c/1"]}), SCHEMES["dynamic-world"], {"s1": SENSORS["s1"]})
    texts = [t.get_text() for axis in figure.axes for t in (axis.title, *axis.texts, *axis.get_yticklabels())]
    assert "22.2%" in texts and "locations: no label" in texts and "seasons: bad raster" in texts and "VH" in texts and any("25.0% of all are unlabelled" in t for t in texts)
    assert any(t.get_text() == "nothing" for axis in plot_report(prepared(), SCHEMES["dynamic-world"], {"s1": SENSORS["s1"]}).axes for t in axis.texts)


def test_places_are_drawn(tmp_path):
    class Store:
        folder = tmp_path
        def centers(self): return np.array([[10.0, 50], [10.5, 50.2], [np.nan, np.nan]])
    figure = plot_places(Store(), Split("locations", np.array([0, 2]), np.array([1])))
    assert figure.axes[0].get_title() == "2 locations; 1 without a place" and {t.get_text() for t in figure.axes[0].get_legend().get_texts()} == {"to train on: 1", "held out: 1"}
    Store.centers = lambda self: np.full((2, 2), np.nan)
    with pytest.raises(DataError, match="none has a CRS"): plot_places(Store())


# a task with exact labels

def compared(fractions=(1.0,)):
    "A table of two starts, two modes and two seeds."
    rows = [dict(sensors="s2", start=start, mode=mode, fraction=f, seed=seed, miou=.3 + .2 * (start == "ours") + .01 * seed + .1 * f)
            for start in ("random", "ours") for mode in ("frozen", "finetuned") for f in fractions for seed in (0, 1)]
    return pd.DataFrame(rows)


def test_a_comparison_shows_every_run():
    figure = plot_comparison(compared())
    assert [axis.get_title() for axis in figure.axes] == ["frozen", "finetuned"]
    dots = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [d.tolist() for d in dots] == [pytest.approx([40, 41]), pytest.approx([60, 61])]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["random, s2", "ours, s2"]


def test_a_comparison_over_fractions_is_curves():
    figure = plot_comparison(compared((.1, .5, 1.0)))
    line = figure.axes[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [.1, .5, 1.0] and line.get_ydata().tolist() == pytest.approx([31.5, 35.5, 40.5]) and figure.axes[0].get_xscale() == "log"


def test_learning_curves_are_means_over_seeds():
    curves = {"ours": [pd.DataFrame({"epoch": [0, 1], "train_loss": [3.0, 2.0]}), pd.DataFrame({"epoch": [0, 1], "train_loss": [4.0, 2.0]})]}
    line, = plot_learning(curves).axes[0].lines
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [3.5, 2.0]


def test_the_confusion_is_in_percent_of_the_reference_and_of_classes_that_occur():
    counts = np.zeros((9, 9), int)
    counts[0, 0], counts[0, 4], counts[4, 4] = 75, 25, 2000
    axis = plot_confusion(counts, SCHEME).axes[0]
    assert [t.get_text() for t in axis.texts] == ["75", "25", "100"] and [t.get_text() for t in axis.get_yticklabels()] == ["water (100)", "crops (2k)"]


def test_differences_are_drawn_where_the_map_is_wrong():
    truth = np.array([[0, 0], [1, 255]])
    sample = {"image_s2": np.full((13, 2, 2), .5, np.float32), "reference": truth, "prediction": np.array([[0, 1], [1, 1]]), "key": "here"}
    figure = plot_differences([sample], {"s2": SENSORS["s2"]}, SCHEME)
    shown = np.asarray(figure.axes[-1].images[0].get_array())
    assert (shown[0, 0] == 255).all() and (shown[0, 1] == SCHEME.rgb()[1]).all() and (shown[1, 0] == 255).all() and not (shown[1, 1] == 255).all()
    assert "33% wrong" in figure.axes[-1].get_xlabel()

"Class schemes: raw values to ids, faults of values and types, painting, YAML."
import json

import numpy as np
import pytest
import yaml

from cromss.classes import IGNORE, SCHEMES, ClassScheme, load_scheme, safe_colors
from cromss.config import ConfigError, DataError

DW, DFC, OSM = (SCHEMES[k] for k in ("dynamic-world", "dfc2020", "osm"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_every_integer_dtype(dtype):
    raw = np.array([[0, 5, 8]], dtype)
    ids = DW.apply(raw)
    assert ids.dtype == np.uint8 and ids.tolist() == [[0, 5, 8]] and ids is not raw


def test_remaps():
    assert DFC.apply(np.arange(11)[None])[0].tolist() == [IGNORE, 1, 5, IGNORE, 2, 3, 4, 6, IGNORE, 7, 0]
    assert OSM.apply(np.arange(14)[None])[0].tolist() == [IGNORE, *range(13)]
    assert DW.apply(np.array([[255, 3]])).tolist() == [[IGNORE, 3]]
    far = ClassScheme("far", ("a", "b"), remap={1000: 0, 2000: 1, -9999: IGNORE, 0: IGNORE})
    assert far.apply(np.array([[1000, 2000, -9999, 0, 255]])).tolist() == [[0, 1, IGNORE, IGNORE, IGNORE]]


def test_255_may_be_a_class_of_the_raw_values():
    assert ClassScheme("mask", ("no", "yes"), remap={0: 0, 255: 1}).apply(np.array([[0, 255]], np.uint8)).tolist() == [[0, 1]]


def test_unknown_values_are_refused_with_counts():
    for raw in (np.array([[0, 9, 9], [77, 1, 2]], np.uint8), np.array([[0, 9, 9], [77, 1, 2]], np.int32)):
        with pytest.raises(DataError, match=r"label.tif: 3 of 6 labels are no class of dynamic-world: 9 \(2 px\), 77 \(1 px\)"): DW.apply(raw, "label.tif")
    with pytest.raises(DataError, match=r"-1 \(1 px\)"): DW.apply(np.array([[-1, 0]]))
    with pytest.raises(DataError, match=r"70000 \(1 px\)"): DW.apply(np.array([[70000, 0]]))
    with pytest.raises(DataError, match=r"254 \(1 px\)"): DW.apply(np.array([[254, 0]], np.uint8))
    with pytest.raises(DataError, match=r"\.\.\."): DW.apply(np.arange(100)[None])


def test_float_labels_are_refused():
    with pytest.raises(DataError, match="a.tif: labels are float32"): DW.apply(np.zeros((2, 2), np.float32), "a.tif")


def test_paint_and_cmap_agree():
    labels = np.array([[[0, 8], [IGNORE, 4]]])
    picture = DW.paint(labels)
    assert picture.shape == (1, 2, 2, 3) and picture.dtype == np.uint8 and picture[0, 1, 0].tolist() == [230] * 3
    cmap, norm = DW.cmap()
    assert np.array_equal(cmap(norm(labels), bytes=True)[..., :3], picture)
    assert DW.rgb().shape == (9, 3) and DW.paint(labels.astype(np.uint8))[0, 0, 1].tolist() == [0xB3, 0x9F, 0xE1]


def test_round_trip_through_json_and_hash():
    for s in SCHEMES.values(): assert ClassScheme.from_dict(json.loads(json.dumps(s.to_dict()))) == s and hash(s)


@pytest.mark.parametrize("fields, text", [
    ({"names": ["a", "a"]}, "twice"), ({"names": []}, "give 1 to 254"), ({"names": ["a"], "colors": ["red"]}, "form"), ({"names": ["a"], "colors": ["#000000"] * 2}, "2 colours"),
    ({"names": ["a"], "remap": {1: 1}}, "id 1"), ({"names": ["a"], "remap": {"x": 0}}, "whole numbers"), ({"nmaes": ["a"]}, "did you mean 'names'"),
    ({"colors": []}, "names not given"), ({"names": "ab"}, "list of texts"), ({"names": [1, 2]}, "list of texts"), ({"names": ["a"], "remap": [1]}, "remap")])
def test_faulty_schemes(fields, text):
    with pytest.raises(ConfigError, match=text): ClassScheme.from_dict({"name": "x", **fields})


def test_load_scheme(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({"names": ["land", "water"], "remap": {1: 0, 2: 1, 0: 255}}))
    two = load_scheme(path)
    assert two.name == "two" and two.num_classes == 2 and len(two.colors) == 2 and load_scheme(two) is two
    assert load_scheme("osm") is OSM and load_scheme({"name": "x", "names": ["a"]}).name == "x"
    with pytest.raises(ConfigError, match="did you mean 'dfc2020'"): load_scheme("dfc2021")
    with pytest.raises(ConfigError, match="cannot be read"): load_scheme(tmp_path / "none.yml")
    for text in ("names: [a", "- a", "names: [a, a]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="two.yaml"): load_scheme(path)


def test_safe_colours_keep_everything_but_the_colours():
    safe = safe_colors(DFC)
    assert (safe.name, safe.names, safe.remap) == (DFC.name, DFC.names, DFC.remap) and len(set(safe.colors)) == 8 and not set(safe.colors) & set(DFC.colors)
    with pytest.raises(ConfigError, match="13, and only 9 colours"): safe_colors(OSM)

"Sensors: band names, subsets, the published coding, and values in other units."
import warnings

import numpy as np
import pytest
import rasterio

from cromss.config import ConfigError, DataError
from cromss.sensors import (BAND_SUBSETS, SENSORS, Sensor, band_subset, check_values, decode, encode, normalize_band, to_unit, unit_values,
                            value_range)

S1, S2, S2A, DEM = (SENSORS[k] for k in ("s1", "s2", "s2a", "dem"))


def scene(sensor=S2, spread=8, size=24, seed=0):
    "Plausible values: normal about each band's mean."
    values = np.random.default_rng(seed).normal(sensor.mean, np.array(sensor.std) / spread, (size, size, sensor.num_bands))
    return values.transpose(2, 0, 1).clip(1).round() if sensor.units == "DN" else values.transpose(2, 0, 1)


@pytest.mark.parametrize("given, band", [("B01", "B1"), ("b8a", "B8A"), ("B08A", "B8A"), ("B12", "B12"), ("vv", "VV"), (" VH", "VH"), ("elevation", "elevation")])
def test_band_names_have_one_form(given, band): assert normalize_band(given) == band


def test_published_subsets():
    assert S2.indices(BAND_SUBSETS[3]) == [3, 2, 1]
    assert S2.indices(BAND_SUBSETS[9]) == [1, 2, 3, 4, 5, 6, 7, 11, 12]
    assert S2.indices(BAND_SUBSETS[12]) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12] and BAND_SUBSETS[12] == S2A.bands
    assert BAND_SUBSETS[13] == S2.bands


def test_band_choices():
    assert band_subset(S2, None) == S2.bands and band_subset(S2, ["b04", "B08"]) == ("B4", "B8") and band_subset(S2, "B4, B3") == ("B4", "B3")
    assert band_subset(S1, 2) == ("VV", "VH") and band_subset(S2.select(BAND_SUBSETS[9]), 9) == BAND_SUBSETS[9]
    assert band_subset(S2.select(["B2", "B3", "B8A"]), 3) == ("B2", "B3", "B8A")      # its own count, where the published three are not there
    for sensor, choice, text in ((S2A, 13, "no B10"), (S1, 3, "VV, VH"), (S2, ["B99"], "no band B99"), (S2, [], "no band is chosen"), (S2, 5, "it has 13")):
        with pytest.raises(DataError, match=text): band_subset(sensor, choice)


def test_selected_bands_keep_their_statistics():
    rgb = S2.select(["B4", "B3", "B2"])
    assert (rgb.mean[0], rgb.std[2], rgb.name, rgb.level) == (S2.mean[3], S2.std[1], "s2", "L1C")


def test_sensor_round_trip_and_faulty_fields():
    assert all(Sensor.from_dict(s.to_dict()) == s for s in SENSORS.values()) and hash(S1)
    good = S1.to_dict()
    for change, text in (({"std": [1, 0]}, "above 0"), ({"mean": [1]}, "1 values of mean for 2 bands"), ({"bands": ["VV", "vv"]}, "each once"),
                         ({"bnads": 1}, "did you mean 'bands'"), ({"mean": ["a", "b"]}, "numbers"), ({"name": "a/b"}, "name"), ({"std": 3}, "list"),
                         ({"mean": [float("nan"), 0]}, "finite")):
        with pytest.raises(ConfigError, match=text): Sensor.from_dict({**good, **change})
    with pytest.raises(ConfigError, match="units not given"): Sensor.from_dict({k: v for k, v in good.items() if k != "units"})
    with pytest.raises(ConfigError): Sensor.from_dict(["s1"])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_coding_is_the_published_formula_for_every_dtype(dtype):
    values = scene(spread=1).astype(dtype)
    low, high = (np.array(S2.mean)[:, None, None] + k * np.array(S2.std)[:, None, None] for k in (-2, 2))
    published = np.clip((values.astype(np.float64) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    coded, finite = encode(values, S2)
    assert coded.dtype == np.uint8 and finite.all() and (coded != published).sum() <= 2   # the order of the operations may move a tie


@pytest.mark.parametrize("sensor", [S1, S2, S2A, DEM], ids=["s1", "s2", "s2a", "dem"])
def test_decode_inverts_to_half_a_level(sensor):
    values = scene(sensor, spread=4)
    coded = encode(values, sensor)[0]
    inside = (coded > 0) & (coded < 255)
    error = np.abs(decode(coded, sensor) - values) / np.array(sensor.std)[:, None, None] * 255 / 4
    assert error[inside].max() <= 0.51 and np.array_equal(encode(decode(coded, sensor), sensor)[0], coded)


def test_unit_values_are_coded_values():
    values = scene(S1).astype(np.float32)
    values[0, 3, 4], values[1, 5, 6] = np.nan, np.inf
    coded, finite = encode(values, S1)
    assert not finite[3, 4] and not finite[5, 6] and finite.sum() == finite.size - 2 and coded[0, 3, 4] == 0
    unit = unit_values(values, S1)
    assert unit.dtype == np.float32 and np.array_equal(unit, coded.astype(np.float32) / 255) and np.array_equal(unit, to_unit(coded))


def test_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"\(2, H, W\)"): encode(np.zeros((3, 4, 4)), S1)
    with pytest.raises(DataError, match="VV, VH"): check_values(np.zeros((3, 4, 4)), S1, "a.tif")
    with pytest.raises(DataError, match="complex"): check_values(np.zeros((2, 4, 4), complex), S1, "a.tif")


@pytest.mark.parametrize("values, sensor, text", [
    (10 ** (scene(S1) / 10), S1, "not in dB"), (np.sqrt(10 ** (scene(S1) / 10)), S1, "not in dB"), (encode(scene(S1), S1)[0], S1, "not in dB"),
    (scene(S1) * 100, S1, "not in dB"),
    (scene() / 10000, S2, "reflectance"), (scene(S2A) / 10000, S2A, "reflectance"), (encode(scene(), S2)[0], S2, "coded to 0..255"),
    (encode(scene(S2A), S2A)[0].astype(np.int16), S2A, "coded to 0..255"), (scene() - 2000, S2, "negative DN"), (scene() + 1000, S2, "RADIO_ADD_OFFSET=-1000"),
    (np.full((1, 4, 4), -32768.0), DEM, "nodata"),
], ids=["power", "amplitude", "s1 coded", "s1 x 100", "reflectance", "l2a reflectance", "l1c coded", "l2a coded", "offset twice", "offset", "dem void"])
def test_values_in_other_units_are_refused_with_their_range(values, sensor, text):
    with pytest.raises(DataError, match=text) as error: check_values(values, sensor, "a.tif")
    message = str(error.value)
    assert message.startswith("a.tif: ") and "median" in message and "\n" not in message


def test_plausible_scenes_pass_without_a_word():
    rng = np.random.default_rng(1)
    def dn(sensor, levels): return rng.normal(np.broadcast_to(np.reshape(levels, (-1, 1, 1)), (sensor.num_bands, 32, 32)), 8).clip(0).round()
    dark_l1c = dn(S2, [1250, 950, 600, 350, 300, 280, 260, 220, 200, 80, 10, 40, 25])
    dark_l2a = dn(S2A, [150, 120, 90, 40, 30, 25, 20, 18, 15, 12, 8, 5])
    snow = dn(S2, [8000, 8200, 8100, 8400, 8500, 8300, 8200, 7900, 7800, 4000, 60, 900, 700])
    cloud = dn(S2, [6000] * 9 + [3000, 1600, 4000, 3500])                   # thick and high: B10 is bright too
    nothing = np.zeros((13, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values, sensor in ((dark_l1c, S2), (dark_l2a, S2A), (snow, S2), (cloud, S2), (nothing, S2), (np.full((2, 4, 4), np.nan), S1), (scene(DEM), DEM)):
            check_values(values, sensor, "a.tif")


def test_offset_is_only_a_warning_without_b10_and_none_where_the_file_says():
    nine = S2.select(BAND_SUBSETS[9])
    dark = scene(nine) * 0.2 + 1000
    with pytest.warns(UserWarning, match="RADIO_ADD_OFFSET=-1000"): check_values(dark, nine, "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_values(dark, nine, "a.tif", offset_known=True)
        check_values(scene() + 1000, S2, "a.tif", offset_known=True)


def read(path, sensors):
    "Values with NaN for nodata, the offset added, and the sensor that fits the band names."
    with rasterio.open(path) as f:
        values, tags = f.read(masked=True).astype(np.float32).filled(np.nan), f.tags()
        sensor = sensors["s2a" if tags.get("LEVEL") == "L2A" else path.stem].select(f.descriptions)
        return values + float(tags.get("RADIO_ADD_OFFSET", 0)), sensor, values


def test_sample_tiles_pass(sample):
    paths = sorted([*sample.glob("seasons/*/*/s[12].tif"), *sample.glob("scenes/*/*/s[12].tif")])
    assert len(paths) == 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths: check_values(*read(path, SENSORS)[:2], path.name)


def test_sample_scene_with_the_offset_is_flagged(sample):
    values, sensor, raw = read(next(sample.glob("scenes/282D*/*/s2.tif")), SENSORS)
    with pytest.raises(DataError, match="RADIO_ADD_OFFSET=-1000"): check_values(raw, sensor, "s2.tif")


def test_range_of_nothing_is_nan():
    assert np.isnan(value_range(np.full(3, np.nan))).all() and value_range([1, 2, 3]).tolist()[0::2] == [1, 2, 3]

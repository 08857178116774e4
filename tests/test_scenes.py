"The built-in scenes: the same bits everywhere, noise of the promised shares and places, and no setting that fails late."
import pickle
import subprocess
import sys
import zlib
from dataclasses import fields, replace

import numpy as np
import pytest

from cromss.classes import ClassScheme
from cromss.config import ConfigError, DataError
from cromss.scenes import (BARE, CROPS, NOISE_KINDS, SCENE_PRESETS, SNOW, WATER, SceneConfig, ScenesSource, add_noise, class_spectra, make_scene,
                           smooth_field)

KINDS = {name: i for i, name in enumerate(NOISE_KINDS)}


def digest(location):
    "One number for all arrays of a Location."
    arrays = [a for images in location.images.values() for a in images] + location.labels + location.reference
    return zlib.crc32(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))


@pytest.fixture(scope="module")
def sixty():
    "Truth, labels and kinds of sixty scenes of the default preset, and their scenes."
    scenes = [make_scene(np.random.SeedSequence([7, i])) for i in range(60)]
    noisy = [add_noise(scene, seed=np.random.SeedSequence([7, i, 1])) for i, scene in enumerate(scenes)]
    return scenes, np.stack([s.truth for s in scenes]), *(np.stack(part) for part in zip(*noisy))


def test_noise_has_the_promised_shares(sixty):
    _, truth, labels, kind = sixty
    measured = np.bincount(kind.ravel(), minlength=6) / kind.size
    for name, rate in SceneConfig().rates.items(): assert abs(measured[KINDS[name]] - rate) < 0.015, name
    assert abs((labels != truth).mean() - 0.395) < 0.03
    assert np.array_equal(kind > 0, labels != truth) and labels.max() <= 8


def test_all_classes_have_a_usable_share(sixty):
    _, truth, labels, _ = sixty
    for values in (truth, labels): assert (np.bincount(values.ravel(), minlength=9) / values.size).min() > 0.02
    assert 0.1 < np.mean([(t == SNOW).any() for t in truth]) < 0.4


@pytest.mark.parametrize("name", SCENE_PRESETS)
def test_every_preset_keeps_its_rates(name):
    config = SCENE_PRESETS[name]
    kind = np.stack([add_noise(make_scene(100 + i, config=config), seed=i)[1] for i in range(24)])
    measured = np.bincount(kind.ravel(), minlength=6) / kind.size
    for noise, rate in config.rates.items():
        assert measured[KINDS[noise]] == 0 if rate == 0 else abs(measured[KINDS[noise]] - rate) < 0.01 + 0.2 * rate, noise


def test_appearance_noise_follows_the_image(sixty):
    "It lies where the Sentinel-2 spectrum is nearer to the wrong class than other noise does, and cloud attracts it."
    scenes, truth, labels, kind = sixty
    means = class_spectra(4, SceneConfig().likeness)
    season = np.arange(4)[:, None, None]
    seen = np.stack([s.images["s2"].transpose(0, 2, 3, 1) for s in scenes])
    nearer = ((seen - means[season, labels]) ** 2).sum(-1) < ((seen - means[season, truth]) ** 2).sum(-1)
    assert nearer[kind == KINDS["appearance"]].mean() > nearer[kind == KINDS["blobs"]].mean() + 0.25
    cloud = np.stack([s.opacity for s in scenes]) > 0.5
    assert (kind[cloud] == KINDS["appearance"]).mean() > 2 * (kind[~cloud] == KINDS["appearance"]).mean()


def test_boundary_noise_lies_at_boundaries(sixty):
    _, truth, _, kind = sixty
    edge = np.zeros(truth.shape, bool)
    for axis in (2, 3):
        for step in (-1, 1): edge |= truth != np.roll(truth, step, axis)
    near = np.mean(edge[kind == KINDS["boundary"]])
    assert near > 0.5 and near > 2 * np.mean(edge[kind == KINDS["blobs"]])


def test_object_noise_is_half_shared_by_the_seasons(sixty):
    _, _, _, kind = sixty
    wrong = kind == KINDS["object"]
    always = wrong.all(1)[:, None] & wrong
    assert 0.25 < always.sum() / wrong.sum() < 0.75
    season = kind == KINDS["season"]
    assert (season.all(1)[:, None] & season).sum() < 0.1 * season.sum()


def test_half_of_the_crops_lie_bare_once():
    config, fields_seen, bare = replace(SceneConfig(), cold=0.0), 0, 0
    for i in range(40):
        truth = make_scene(i, config=config).truth
        crops = (truth == CROPS).any(0)
        fields_seen += crops.sum(); bare += ((truth == BARE) & crops).any(0).sum()
        assert (((truth == BARE) & crops).sum(0) <= 1).all()
    assert 0.35 < bare / fields_seen < 0.65


def test_a_scene_is_the_same_in_another_process():
    source = ScenesSource(count=5, seed=3, sensors=("s2", "s1", "dem"))
    here = digest(source.read("scene-00004"))
    assert here == digest(pickle.loads(pickle.dumps(source)).read("scene-00004"))
    code = ("import sys; sys.path.insert(0, 'tests'); from test_scenes import digest, ScenesSource;"
            "print(digest(ScenesSource(count=5, seed=3, sensors=('s2', 's1', 'dem')).read('scene-00004')))")
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rsplit("/tests/", 1)[0])
    assert there.stdout.strip() == str(here), there.stderr


def test_the_number_of_scenes_and_sensors_changes_no_scene():
    few, many = ScenesSource(count=3), ScenesSource(count=300, sensors=("s2",))
    for a, b in zip(few.read("scene-00002").images["s2"], many.read("scene-00002").images["s2"]): assert np.array_equal(a, b)
    assert digest(few.read("scene-00001")) != digest(few.read("scene-00002"))
    assert digest(few.read("scene-00001")) != digest(ScenesSource(count=3, seed=1).read("scene-00001"))


def test_a_location_is_whole_and_its_noise_map_fits():
    source = ScenesSource(count=2, size=48, seasons=3, sensors=("s1", "s2", "dem"))
    place = source.read("scene-00001")
    place.check(source.sensors, source.scheme, "uint8")
    assert place.shape == (48, 48) and len(place.seasons) == 3 and place.images["dem"][0].shape == (1, 48, 48)
    assert np.array_equal(source.noise("scene-00001") > 0, np.stack(place.labels) != np.stack(place.reference))


def test_places_do_not_overlap():
    for size in (64, 100, 264):
        source = ScenesSource(count=1000, size=size)
        corners = np.array([source.transform(key)[2::3] for key in source.keys()])
        step = size * 10
        assert len(np.unique(corners, axis=0)) == 1000
        for axis in (0, 1):
            values = np.unique(corners[:, axis])
            assert len(values) == 1 or np.diff(values).min() >= step
        assert 166_000 < corners[:, 0].min() and corners[:, 0].max() + step < 834_000 and corners[:, 1].min() > 0


@pytest.mark.parametrize("size, seasons", [(16, 1), (33, 2), (130, 4), (40, 12)])
def test_any_size_and_number_of_seasons(size, seasons):
    scene = make_scene(5, size, seasons)
    labels, kind = add_noise(scene)
    assert scene.truth.shape == labels.shape == kind.shape == (seasons, size, size)
    assert all(np.isfinite(image).all() for image in scene.images.values())


def test_values_look_like_the_sensors(sixty):
    "Means within one standard deviation of the published statistics; water is dark, snow is bright."
    from cromss.sensors import SENSORS, check_values
    scenes, truth, _, _ = sixty
    for name in ("s1", "s2"):
        values = np.stack([s.images[name] for s in scenes])
        mean, std = values.mean((0, 1, 3, 4)), np.array(SENSORS[name].std)
        assert (np.abs(mean - SENSORS[name].mean) < std).all()
        for scene in scenes[:5]: check_values(scene.images[name][0], SENSORS[name], name)
    nir = np.stack([s.images["s2"][:, 7] for s in scenes])
    clear = np.stack([s.opacity for s in scenes]) == 0
    assert nir[(truth == WATER) & clear].mean() < 1000 < 3500 < nir[(truth == SNOW) & clear].mean()


def test_fewer_looks_are_noisier():
    def rough(looks):
        vv = make_scene(2, config=replace(SceneConfig(), looks=looks, texture=0.0)).images["s1"][:, 0]
        return np.diff(vv, axis=-1).std()
    assert rough(2.0) > 1.5 * rough(20.0)


def test_other_classes_by_a_scheme():
    coarse = ClassScheme("coarse", ("water", "green", "other"), remap={0: 0, 3: 0, 1: 1, 2: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 255})
    place = ScenesSource(count=1, scheme=coarse).read("scene-00000")
    assert set(np.unique(place.labels)) <= {0, 1, 2, 255}
    with pytest.raises(ConfigError, match="Dynamic World"): ScenesSource(scheme="dfc2020")
    with pytest.raises(DataError, match="no class of"): ScenesSource(scheme=ClassScheme("few", ("water", "trees")))


def test_smooth_fields_have_unit_variance():
    for scale in (0.6, 3, 3.2, 10, 30):
        values = smooth_field(np.random.default_rng(0), 100, 48, scale)
        assert values.shape == (100, 48, 48) and values.dtype == np.float32
        assert abs(np.sqrt((values ** 2).mean()) - 1) < 0.15 and abs(values.mean()) < 0.3


@pytest.mark.parametrize("make, message", [
    (lambda: ScenesSource(preset="balanced-4O"), "did you mean 'balanced-40'"),
    (lambda: ScenesSource(sensors=("s1", "s3")), "sensor of scenes"),
    (lambda: ScenesSource(sensors=("s1", "s1")), "twice"),
    (lambda: ScenesSource(sensors=()), "at least one"),
    (lambda: ScenesSource(count=0), "count=0"),
    (lambda: ScenesSource(size=8), "size=8"),
    (lambda: ScenesSource(seasons=13), "seasons=13"),
    (lambda: ScenesSource(seed=-1), "seed=-1"),
    (lambda: SceneConfig(blobs=1.5), "blobs=1.5"),
    (lambda: SceneConfig(blobs="much"), "blobs='much'"),
    (lambda: SceneConfig(appearance=0.9, blobs=0.9), "sum"),
    (lambda: SceneConfig(looks=float("nan")), "looks=nan"),
    (lambda: add_noise(make_scene(0), {"blob": 0.1}), "did you mean 'blobs'"),
])
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message): make()


@pytest.mark.parametrize("key", ["scene-00005", "scene-5", "00001", "scene-00001x", "", None])
def test_unknown_places_are_refused(key):
    with pytest.raises(DataError, match="scene-00000 to scene-00004"): ScenesSource(count=5).read(key)


def test_presets_differ_only_where_they_say():
    base = SceneConfig()
    changed = {name: {f.name for f in fields(base) if getattr(config, f.name) != getattr(base, f.name)} for name, config in SCENE_PRESETS.items()}
    assert changed["balanced-40"] == set() and changed["weak-s1"] == {"looks"} and changed["balanced-20"] == set(NOISE_KINDS[1:])


def test_labels_can_be_the_right_ones_alone_or_the_truth():
    noisy, right, true = (ScenesSource(2, labels=kind).read("scene-00001") for kind in ("noisy", "right", "true"))
    for n, r, t, reference in zip(noisy.labels, right.labels, true.labels, noisy.reference):
        assert (t == reference).all() and (r == np.where(n == reference, n, 255)).all() and 0.2 < (r == 255).mean() < 0.7
    assert all((a == b).all() for a, b in zip(noisy.images["s2"], true.images["s2"])) and "exact labels" in ScenesSource(2, labels="true").describe()
    with pytest.raises(ConfigError, match="did you mean 'right'"): ScenesSource(2, labels="rigt")

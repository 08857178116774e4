"What sensors believe together against hand-worked cases; runs that are taught by earlier ones, and by a first of their own; refusals."
import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_pretraining import folder, last, learned, same, scenes, tiny, unfinished, weights  # noqa: F401 (fixtures)

from cromss import pretraining
from cromss.ablation import keep_network
from cromss.config import ConfigError, PretrainConfig, WeightsError, load_config
from cromss.pretraining import PatchDataModule, configure, load_task, load_teachers, pretrain
from cromss.runs import Run
from cromss.selection import corrected_labels, joint_belief
from cromss.smoothing import one_hot

pytestmark = [pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"), pytest.mark.filterwarnings("ignore:.*srun.*")]
APART = dict(fusion="late", consistency="none", selection=False, smoothing=False)


def pixel(*values): return torch.tensor(values).log().view(1, -1, 1, 1)
def refusal(make, *words):
    with pytest.raises(ConfigError) as e: make()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


# the belief

def test_the_belief_is_the_normalised_product():
    belief = joint_belief({"s1": pixel(.6, .3, .1), "s2": pixel(.5, .1, .4)})
    assert belief.flatten().tolist() == pytest.approx([.30 / .37, .03 / .37, .04 / .37])
    assert belief.dtype == torch.float32 and torch.equal(belief, joint_belief({"s2": pixel(.5, .1, .4), "s1": pixel(.6, .3, .1)}))


def test_a_sensor_that_knows_nothing_changes_nothing_and_one_alone_is_believed():
    own = pixel(.6, .3, .1)
    assert torch.allclose(joint_belief({"s1": own, "s2": pixel(1 / 3, 1 / 3, 1 / 3)}), own.exp()) and torch.allclose(joint_belief({"s1": own}), own.exp())


def test_the_surest_are_not_lost_to_underflow_and_nothing_is_learned_through_it():
    logits = {s: torch.tensor([0., 200., -300.]).view(1, 3, 1, 1).requires_grad_() for s in ("s1", "s2", "dem")}
    belief = joint_belief(logits)
    assert belief.flatten().tolist() == [0, 1, 0] and not belief.requires_grad


def test_the_label_decides_where_the_sensors_do_not_know():
    belief = torch.tensor([.45, .15, .4]).view(1, 3, 1, 1)
    for label, share, expected in ((2, .2, 2), (1, .2, 0), (1, .31, 1), (2, 0, 0), (0, 9, 0)):
        assert corrected_labels(torch.tensor([[[label]]]), belief, share).item() == expected, (label, share)


def test_what_is_unlabelled_stays_so():
    labels = torch.tensor([[[255, 1]]])
    found = corrected_labels(labels, torch.tensor([.9, .1]).view(1, 2, 1, 1).expand(1, 2, 1, 2))
    assert found.tolist() == [[[255, 0]]] and found.dtype == labels.dtype and labels.tolist() == [[[255, 1]]]


def test_other_seasons_are_heard():
    silent, belief = torch.zeros(1, 3, 1, 1), torch.tensor([.5, .3, .2]).view(1, 3, 1, 1)
    def found(seasons, belief, share=.2, season_share=.15): return corrected_labels(torch.tensor([[[seasons[0]]]]), belief, share, torch.tensor(seasons, dtype=torch.uint8).view(1, -1, 1, 1), season_share).item()
    assert found([0, 1, 1, 255], silent) == 1 and found([0, 1, 2, 255], silent) == 0 and found([0, 1, 255, 255], silent) == 0 and found([0, 1, 1, 0], silent) == 0
    assert found([2, 2, 255], belief) == 2                        # .2 + .2 + .15 against .5
    assert found([2, 1, 1], belief) == 1                          # .3 + .3 against .5 and .4
    assert found([2, 255], belief) == corrected_labels(torch.tensor([[[2]]]), belief).item() == 0
    assert found([255, 1, 1], silent) == 255 and belief.flatten().tolist() == pytest.approx([.5, .3, .2]), "what is unlabelled stays so, and the belief as it is"


# runs

def test_seasons_alone_correct_the_labels(scenes, tmp_path):
    config = tiny(tmp_path, name="seasons", season_share=.15, **APART)
    data = PatchDataModule(config, scenes)
    batch = pretraining.to_images(pretraining.collate([data.dataset("train")[i] for i in range(4)]))
    run = pretrain(config, scenes)
    found = load_task(run).corrected(batch, pretraining.images_of(batch, ("s1", "s2")))["mask"]
    votes = torch.stack([one_hot(m.long(), 9) for m in batch["season_masks"].unbind(1)]).sum(0)
    leader = votes.max(1)
    clear = ((votes == leader.values.unsqueeze(1)).sum(1) == 1) & (leader.values >= 2) & (batch["mask"] != 255)
    assert clear.any() and torch.equal(found[clear], leader.indices[clear]), "where most seasons say the same, that is the label"
    assert not torch.equal(found, batch["mask"]) and run.metrics()["train_loss"].notna().all()


@pytest.fixture(scope="module")
def taught(scenes, tmp_path_factory):
    "A run of two sensors apart, and a run that it teaches; a network of four steps knows too little to outvote a label."
    folder = tmp_path_factory.mktemp("taught")
    first = pretrain(tiny(folder, name="one", **APART), scenes)
    return folder, first, pretrain(tiny(folder, name="two", teachers=[str(first.folder)], label_share=0, **APART), scenes)


def test_the_labels_of_a_batch_are_corrected(taught, scenes):
    _, first, run = taught
    data = PatchDataModule(run.config, scenes)
    task, teacher = load_task(run), load_task(first).model
    task.teachers = load_teachers(run.config.teachers, data)
    batch = pretraining.to_images(pretraining.collate([data.dataset("train", augment=False)[i] for i in range(2)]))
    images = pretraining.images_of(batch, ("s1", "s2"))
    with torch.no_grad(): p = {s: l.softmax(1) for s, l in teacher(images).items()}
    product = p["s1"] * p["s2"]
    expected = product.argmax(1)
    found = task.corrected(batch, images)["mask"]
    labelled = batch["mask"] != 255
    assert torch.equal(found[labelled], expected[labelled]) and not torch.equal(found, batch["mask"]) and torch.equal(found[~labelled], batch["mask"][~labelled])
    assert not any(p.requires_grad for t in task.teachers for p in t.parameters()) and not any("teacher" in k for k in last(run)), "teachers are no part of the state"


def test_it_learns_something_else_than_from_the_labels(taught, scenes):
    folder, first, run = taught
    again = pretrain(tiny(folder, name="again", **APART), scenes)
    assert same(last(first), last(again)) and not same(last(first), last(run))
    assert load_config(run.folder / "config.yaml").teachers == (str(first.folder),) and run.metrics()["train_loss"].notna().all()


def test_networks_of_one_sensor_each_teach_together_as_one_of_both(taught, scenes):
    folder, _, _ = taught
    apart = [pretrain(tiny(folder, name=s, sensors=(s,), selection=False, smoothing=False), scenes) for s in ("s1", "s2")]
    data = PatchDataModule(tiny(folder, **APART), scenes)
    assert [list(t.options["bands"]) for t in load_teachers([str(r.folder) for r in apart], data)] == [["s1"], ["s2"]]


@pytest.fixture(scope="module")
def second(scenes, tmp_path_factory):
    "A run that has trained a first of its own."
    folder = tmp_path_factory.mktemp("second")
    return pretrain(tiny(folder, name="run", teachers="first", label_share=0, **APART), scenes)


def test_first_is_a_run_of_the_same_settings_in_its_folder(second, scenes, taught):
    first = Run.open(second.folder / "first")
    assert first.summary() and second.summary() and replace(first.config, teachers=("first",), name="run", runs=second.config.runs, resume=None) == second.config
    assert same(last(first), last(taught[1])) and same(last(second), last(taught[2])), "as if both had been started by hand"


@pytest.mark.parametrize("keep", [pretraining._finish, keep_network], ids=["whole", "network"])
def test_a_run_that_is_stopped_does_not_train_its_first_again(second, scenes, tmp_path, keep):
    config = tiny(tmp_path, name="run", teachers="first", label_share=0, resume="auto", **APART)
    class Stop(Exception): pass
    def finish(run, task, data):
        keep(run, task, data)
        if run.folder.name == "first": raise Stop
    with pytest.raises(Stop): pretrain(config, scenes, finish=finish)
    first = tmp_path / "runs" / "run" / "first"
    files = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file() and not p.name.startswith(".")}
    run = pretrain(config, scenes)
    assert {p: p.stat().st_mtime_ns for p in files} == files and same(last(run), last(second))
    assert pretrain(config, scenes).summary() == run.summary(), "a finished run is left as it is"


# refusals

def test_impossible_settings_are_refused():
    refusal(lambda: PretrainConfig(teachers=["first", "runs/a"]), "give 'first' alone")
    refusal(lambda: PretrainConfig(label_share=-1), "label_share=-1")
    refusal(lambda: PretrainConfig(season_share="much"), "season_share='much'")
    for how in ({"teachers": "first"}, {"season_share": .15}): refusal(lambda: PretrainConfig(**how, selection={"temporal": True}), "change the label")
    assert PretrainConfig(robust={"method": "gce"}, selection=False).smoothing is None, "it would do nothing"
    refusal(lambda: PretrainConfig(selection={"temporal": True, "entangle": "own"}), "hears no other voice")
    assert configure({"teachers": "runs/a,runs/b"}).teachers == ("runs/a", "runs/b") and configure({"teachers": "first"}).teachers == ("first",) and PretrainConfig().teachers == ()


def test_teachers_that_do_not_fit_are_refused_before_anything_is_made(taught, scenes, tmp_path):
    _, first, _ = taught
    def start(**changes): return lambda: pretrain(tiny(tmp_path, **{"name": "x", "teachers": [str(first.folder)], "selection": False, **changes}), scenes)
    refusal(start(teachers=[str(tmp_path / "nowhere")]), "nowhere")
    refusal(start(sensors=("s2",)), "sees s1", "add it")
    refusal(start(bands={"s2": ["B4", "B3", "B2"]}), "other bands of s2", "take another run")
    assert not (tmp_path / "runs").exists()


def copied(run, place): return Run.open(shutil.copytree(run.folder, place))


def test_a_teacher_that_learned_something_else_is_refused(taught, scenes, tmp_path):
    _, first, _ = taught
    data = PatchDataModule(first.config, scenes)
    def changed(name, change):
        run = copied(first, tmp_path / name)
        card = run.encoders / "s2" / "config.json"
        values = json.loads(card.read_text())
        change(values)
        card.write_text(json.dumps(values))
        return lambda: pretraining.trained_network(run, data)
    refusal(changed("bands", lambda v: v["sensor"]["bands"].reverse()), "other bands of s2")
    refusal(changed("classes", lambda v: v["classes"].reverse()), "other classes of s2")
    refusal(changed("mean", lambda v: v["sensor"]["mean"].__setitem__(0, 1.0)), "other statistics of s2")
    unfinished = copied(first, tmp_path / "unfinished")
    (unfinished.folder / "summary.json").unlink()
    refusal(lambda: pretraining.trained_network(unfinished, data), "has not finished", "--resume")


def test_a_damaged_network_is_refused(taught, scenes, tmp_path):
    run = copied(taught[1], tmp_path / "damaged")
    (run.folder / "network.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="network.safetensors: not the tensors of this run's network"): pretraining.trained_network(run, PatchDataModule(run.config, scenes))


def test_a_teacher_that_has_seen_what_is_held_out_is_warned_of(taught, scenes, tmp_path):
    _, first, _ = taught
    data = PatchDataModule(tiny(tmp_path, validation=0.25, **APART), scenes)
    assert data.facts()["held_out"]
    run = copied(first, tmp_path / "all")
    facts = json.loads((run.folder / "data.json").read_text())
    (run.folder / "data.json").write_text(json.dumps(facts | {"held_out": []}))
    with pytest.warns(UserWarning, match="of the locations that are held out here"): load_teachers([str(run.folder)], data)


def test_several_processes_are_refused():
    class Two: world, rank = 2, 0
    refusal(lambda: pretraining._check_devices(PretrainConfig(teachers="first"), Two), "one process", "teachers=its folder")

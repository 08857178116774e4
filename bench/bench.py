"""Times the published training steps, transcribed in published.py, and the package's, by turns in one process, and writes both down as tables.

    python bench/bench.py                      everything, about 10 minutes on two cores; writes bench/results.md and bench/results.json
    python bench/bench.py --quick              smaller shapes and fewer rounds, under a minute, only printed
    python bench/bench.py --only input step    some rows, only printed
    python bench/bench.py --profile            also prints where the time of an input sample goes

A ratio is what counts: absolute times change with the machine and with what else runs on it.
"""
import argparse
import cProfile
import io
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import published
import same
import torch
from torch.utils.data import DataLoader, default_collate

from cromss.config import PretrainConfig, SelectionConfig, SmoothingConfig
from cromss.dataset import PatchDataset, StepSampler, collate, to_images
from cromss.losses import cromss_loss
from cromss.prepare import prepare
from cromss.scenes import ScenesSource
from cromss.selection import select, sensor_log_probabilities
from cromss.smoothing import smooth_labels

EPOCH = 40                       # half way up the ramp: 86 % of every class is kept
EXACT, HISTOGRAM = SelectionConfig(method="exact"), SelectionConfig(method="histogram")
CONFIG = PretrainConfig(selection=HISTOGRAM, smoothing=SmoothingConfig(), rotation=True)


# ---- what is measured, and how it is written down

@dataclass
class Settings:
    "How much is measured."
    rounds: int = 5          # turns of every contender
    least: float = 0.5       # seconds that a turn lasts, at least
    locations: int = 12      # of the input's stores
    batch: int = 8           # of selection and losses
    steps: tuple = (("resnet18", 4, 256), ("resnet50", 4, 256))   # encoder, batch, px
    threads: int = 2         # of everything but the input, which has one
    batches: int = 24        # that the workers deliver in a turn


QUICK = Settings(rounds=3, least=0.05, locations=4, batch=4, steps=(("resnet18", 2, 64),), batches=6)


@dataclass
class Row:
    "A line of the first table."
    what: str
    published: list          # seconds a call, one a round
    ours: list
    unit: str = "ms"         # or what a second yields, such as "samples/s"
    per_call: int = 1        # of those in a call
    aim: str = "–"

    @property
    def ratio(self): return statistics.median(self.published) / statistics.median(self.ours)

    def cells(self):
        turns = [p / o for p, o in zip(self.published, self.ours)]
        ratio = f"**{self.ratio:.2f}** ({min(turns):.2f} to {max(turns):.2f})"
        return self.what, shown(self.published, self.unit, self.per_call), shown(self.ours, self.unit, self.per_call), ratio, self.aim


@dataclass
class Limit:
    "A line of the second table: how far something is from what the machine could do."
    what: str
    ours: float              # seconds
    limit: float             # seconds
    meaning: str             # what the limit is

    def cells(self): return self.what, f"{1e3 * self.ours:.2f} ms", f"{1e3 * self.limit:.2f} ms", f"{self.ours / self.limit:.1f}", self.meaning


@dataclass
class Results:
    "Both tables, and on what machine they were made."
    machine: str
    rows: list = field(default_factory=list)
    limits: list = field(default_factory=list)

    def add(self, row):
        self.rows.append(row)
        print(" | ".join(row.cells()).replace("**", ""), file=sys.stderr, flush=True)


def shown(times, unit, per_call):
    "The median of a list of seconds, as a rate or in milliseconds."
    seconds = statistics.median(times)
    return f"{1e3 * seconds:.1f} ms" if unit == "ms" else f"{per_call / seconds:.3g} {unit}"


def table(head, lines):
    "A Markdown table."
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def report(results, settings):
    "Both tables as Markdown."
    short = "Quick run: smaller shapes and few rounds, not for the record.\n\n" if settings.rounds < 5 else ""
    text = f"# Speed against the published steps\n\n{short}{results.machine}\n\n"
    text += f"Medians of {settings.rounds} rounds, both sides by turns in one process; in brackets the ratios of single rounds. `published` is a plain\n"
    text += "transcription of the published steps (`bench/published.py`), checked before timing to compute the same.\n\n"
    text += table(("what", "published", "ours", "ratio", "aim"), [r.cells() for r in results.rows])
    if results.limits:
        text += "\n## How far from the machine's limits\n\n"
        text += table(("part", "ours", "limit", "times the limit", "the limit is"), [l.cells() for l in results.limits])
    return text


def machine(threads):
    "One line on the machine."
    try: model = next(l.split(":", 1)[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name"))
    except (OSError, StopIteration): model = platform.processor() or platform.machine()
    load = f"load average {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else "load unknown"
    return f"{model}, {os.cpu_count()} cores, {load}; torch {torch.__version__}, threads: {threads} (the input: 1); {date.today()}"


# ---- timing

def seconds_per_call(call, least):
    "Mean seconds of a call, over as many calls as fill `least` seconds."
    count, start = 0, time.perf_counter()
    while True:
        call()
        count, elapsed = count + 1, time.perf_counter() - start
        if elapsed >= least: return elapsed / count


def by_turns(contenders, settings):
    "Seconds a call of every contender, {name: [one a round]}: each is warmed up, then they take turns, so that a busy machine is busy for all."
    for call in contenders.values(): call()
    times = {name: [] for name in contenders}
    for _ in range(settings.rounds):
        for name, call in contenders.items(): times[name].append(seconds_per_call(call, settings.least))
    return times


def copy_speed(megabytes=128):
    "Bytes a second that torch copies from memory to memory with the present number of threads."
    source = torch.ones(megabytes * 2 ** 18)
    target = torch.empty_like(source).copy_(source)
    return source.nbytes / min(seconds_per_call(lambda: target.copy_(source), 0.1) for _ in range(3))


def median(times): return {name: statistics.median(t) for name, t in times.items()}


# ---- input

class Unreferenced(ScenesSource):
    "Scenes without their truth, which the published records do not hold either."
    def read(self, key): return replace(super().read(key), reference=None)


def make_stores(folder, locations, size=264):
    "The same locations as a store of the package and as published records: a Store and the folder of the records."
    store = prepare(Unreferenced(count=locations, size=size, seed=1), Path(folder) / "store", progress=False)
    seasons = range(store.season_count)
    def stacked(i, sensor): return np.stack([store.read(i, s, [sensor])["images"][sensor] for s in seasons])
    published.write_records(folder, [{s: stacked(i, s) for s in same.SENSORS} | {"label": store.read_labels(i)} for i in range(locations)])
    return store, folder


class Draws:
    "Calls that give a dataset's next samples, epoch after epoch."
    def __init__(self, dataset, epochs=True): self.dataset, self.epochs, self.count = dataset, epochs, 0

    def __call__(self, number=8):
        where = [divmod(n, len(self.dataset)) for n in range(self.count, self.count + number)]
        self.count += number
        return [self.dataset[at if self.epochs else at[1]] for at in where]


def training_set(store, later=False, **options):
    "The PatchDataset of a training run; `later`: as it is for a GPU, which blurs the priors itself."
    dataset = PatchDataset(store, rotation=True, smoothing=SmoothingConfig(), lean=True, **options)
    dataset.later = later
    return dataset


FORMATS = {"SSL4EO-S12 (all forms, pretraining LMDBs): 264 px, 4 seasons": (264, 4), "DFC2020: 256 px, 1 season": (256, 1), "SSL4EO-S12@DW, @OSM: 510 px, 1 season": (510, 1),
           "tiles of 224 px, 4 seasons, crops of 224": (224, 4)}


def bench_formats(results, settings):
    "Batches of our samples from stores of the published formats' sizes, with one thread: smoothed here (left), and with the priors left to a GPU."
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for name, (size, seasons) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            store = prepare(Unreferenced(count=max(2, settings.locations // 2), size=size, seasons=seasons, seed=1), Path(folder) / "store", progress=False)
            draws = {later: Draws(training_set(store, later, crop=min(256, size))) for later in (False, True)}
            t = by_turns({later: lambda d=d: collate(d()) for later, d in draws.items()}, settings)
            results.add(Row(f"input, both ours, one core, {name}: smoothed (left) against priors left to a GPU", t[False], t[True], "samples/s", 8))


def bench_input(results, settings):
    "Samples, and batches of 8 of them, with one thread."
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        store, records = make_stores(folder, settings.locations)
        theirs = published.PublishedDataset(records, len(store))
        same.check_priors(store, theirs)
        theirs, ours = Draws(theirs, epochs=False), Draws(training_set(store))
        whole, later = Draws(PatchDataset(store, rotation=True, smoothing=SmoothingConfig())), Draws(training_set(store, later=True))
        t = by_turns({"published": lambda: default_collate(theirs()), "ours": lambda: to_images(collate(ours())),
                      "later": lambda: to_images(collate(later())), "published samples": theirs, "our samples": whole}, settings)
        what = "input with smoothing, 264 px in, 256 px out, one core"
        results.add(Row(f"{what}: batches of 8 floats, as a step gets them", t["published"], t["ours"], "samples/s", 8, "10 (20 wished)"))
        results.add(Row(f"{what}: batches of 8 for a GPU, which blurs the priors itself (not timed)", t["published"], t["later"], "samples/s", 8))
        results.add(Row(f"{what}: single samples with all fields, not batched", t["published samples"], t["our samples"], "samples/s", 8))
        results.limits += input_limits(store, statistics.median(t["ours"]) / 8, settings)


def parts_of_a_sample(store, settings):
    "Seconds a sample of our datasets, whole and with parts left out, and of reading, checking and blurring by themselves."
    def draws(smoothing=None, augment=True): return Draws(PatchDataset(store, augment=augment, rotation=True, smoothing=smoothing, lean=True), epochs=augment)
    places, labels = range(len(store)), [store.read_labels(i) for i in range(len(store))]
    seasons, taps = [store.read(i, 0)["images"] for i in places], cv2.getGaussianKernel(25, 3)
    votes = np.random.default_rng(0).random((published.CLASSES, *store.shape(0)), np.float32)
    blurred = np.empty_like(votes)
    def read(): return [(store.read(i, 0), store.read_labels(i)) for i in places]
    def check(): return [zlib.crc32(a) for i in places for a in (*seasons[i].values(), labels[i])]
    def blur(): return [cv2.sepFilter2D(v, cv2.CV_32F, taps, taps, dst=b, borderType=cv2.BORDER_REFLECT) for v, b in zip(votes, blurred)]
    calls = {"smooth": draws(SmoothingConfig()), "plain": draws(), "still": draws(augment=False), "read": read, "check": check, "blur": blur}
    samples = {"smooth": 8, "plain": 8, "still": 8, "read": len(store), "check": len(store), "blur": 1}
    return {name: seconds / samples[name] for name, seconds in median(by_turns(calls, settings)).items()}


def sample_bytes(store):
    "Bytes of a sample: what is read, what is given without the prior, and the prior."
    sample = PatchDataset(store, smoothing=SmoothingConfig())[(0, 0)]
    read = sum(a.nbytes for a in store.read(0, 0)["images"].values()) + store.read_labels(0).nbytes
    return read, sum(v.nbytes for k, v in sample.items() if torch.is_tensor(v) and k != "prior"), sample["prior"].nbytes


def input_limits(store, whole, settings):
    "The parts of a sample against the least that the machine could spend on them."
    speed, t, (coded, images, prior) = copy_speed(), parts_of_a_sample(store, settings), sample_bytes(store)
    def limit(what, seconds, size, how, more=0.0):
        return Limit(f"input: {what}", max(seconds, 0), size / speed + more, f"{how}, {size / 1e6:.1f} MB at {speed / 1e9:.1f} GB/s")
    return [limit("a whole sample", whole, coded + images + prior, "copying what is read and what is given"),
            limit("reading from LMDB, the checksum included", t["read"], coded, "copying a season's images and all labels"),
            limit("the checksum alone", t["check"], coded, "copying the same bytes"),
            limit("crop, scaling to tensors", t["still"] - t["read"], images, "copying the sample without its prior"),
            limit("flips and free rotation, the mean of all samples", t["plain"] - t["still"], 0.6 * images, "copying the 6 samples in 10 that it changes"),
            limit("the prior, its augmentation included", t["smooth"] - t["plain"], prior, "blurring nine maps by OpenCV, and copying them", t["blur"])]


def profile_input(settings, samples=200, lines=20):
    "Print the functions that take the most time in our samples."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, _ = make_stores(folder, settings.locations)
        draws = Draws(training_set(store))
        draws(len(store))
        profile = cProfile.Profile()
        profile.runcall(draws, samples)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    print(f"\n{samples} samples of ours, one core\n{text.getvalue()}")


# ---- workers

def bench_workers(results, settings):
    "Samples that a DataLoader with two workers delivers against one; both ours."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, _ = make_stores(folder, settings.locations)
        for later, what in ((False, ""), (True, ", priors left to a GPU")):
            dataset = training_set(store, later)
            loaders = {n: DataLoader(dataset, batch_sampler=StepSampler(len(dataset), 8, min_steps=settings.batches), collate_fn=collate,
                                     num_workers=n, persistent_workers=True) for n in (1, 2)}
            t = by_turns({n: lambda loader=loader: [None for _ in loader] for n, loader in loaders.items()}, settings)
            results.add(Row(f"DataLoader, both ours{what}: 1 worker (left) against 2", t[1], t[2], "samples/s", 8 * settings.batches, "2"))
            for loader in loaders.values(): loader._iterator = None      # ends the workers before the store goes


# ---- selection and losses, from logits

def named(values): return dict(zip(same.SENSORS, values))


def log_softmax(logits): return [torch.log_softmax(l, 1) for l in logits]


def bench_selection(results, settings):
    "Selection from the logits of both sensors, as published and by both of our methods."
    torch.set_num_threads(settings.threads)
    logits, labels, _ = same.example(settings.batch)
    same.check_selection(logits, labels, EPOCH)
    shared = sensor_log_probabilities(named(logits))
    t = by_turns({
        "topk": lambda: published.select(logits, labels, EPOCH),
        "kthvalue": lambda: published.select(logits, labels, EPOCH, rank="kthvalue"),
        "histogram": lambda: select(named(logits), labels, EPOCH, HISTOGRAM), "exact": lambda: select(named(logits), labels, EPOCH, EXACT),
        "shared": lambda: select(shared, labels, EPOCH, HISTOGRAM), "limit": lambda: log_softmax(logits)}, settings)
    what = f"selection, 2 x {tuple(logits[0].shape)}"
    results.add(Row(f"{what}: histogram", t["topk"], t["histogram"], aim="4 (10 wished)"))
    results.add(Row(f"{what}: exact", t["topk"], t["exact"], aim="1"))
    results.add(Row(f"{what}: histogram, log-probabilities already there, as in a step", t["topk"], t["shared"]))
    results.add(Row(f"{what}: exact, against the published steps with kthvalue in place of topk", t["kthvalue"], t["exact"]))
    size, speed = 2 * logits[0].nbytes, copy_speed()
    m, reading = median(t), f"reading the log-probabilities once, {size / 1e6:.0f} MB at {speed / 1e9:.1f} GB/s"
    results.limits += [Limit("selection by histogram", m["histogram"], m["limit"] + size / speed, f"log_softmax and {reading}"),
                       Limit("selection by histogram, log-probabilities already there", m["shared"], size / speed, reading)]


def their_loss(logits, labels, targets): return published.losses(logits, targets, *published.select(logits, labels, EPOCH))


def our_loss(logits, labels, targets):
    log_p = sensor_log_probabilities(named(logits))
    return cromss_loss(log_p, targets, select(log_p, labels, EPOCH, HISTOGRAM), CONFIG).total


def bench_losses(results, settings):
    "Losses, forward and backward, from given weights; and selection with them."
    torch.set_num_threads(settings.threads)
    logits, labels, targets = same.example(settings.batch, grad=True)
    same.check_losses(logits, labels, targets, EPOCH)
    theirs, ours = published.select(logits, labels, EPOCH), select(named(logits), labels, EPOCH, HISTOGRAM)
    def gradients(loss): return torch.autograd.grad(loss, logits)
    t = by_turns({
        "published": lambda: gradients(published.losses(logits, targets, *theirs)),
        "ours": lambda: gradients(cromss_loss(named(logits), targets, ours, CONFIG).total),
        "published both": lambda: gradients(their_loss(logits, labels, targets)),
        "our both": lambda: gradients(our_loss(logits, labels, targets)),
        "limit": lambda: torch.autograd.grad(log_softmax(logits), logits, [targets, targets])}, settings)
    what = f"2 x {tuple(logits[0].shape)}, forward and backward"
    results.add(Row(f"losses, {what}", t["published"], t["ours"]))
    results.add(Row(f"selection and losses, {what}", t["published both"], t["our both"]))
    size, speed, m = 3 * targets.nbytes, copy_speed(), median(t)
    meaning = f"log_softmax forward and backward, and reading log-probabilities and targets once, {size / 1e6:.0f} MB at {speed / 1e9:.1f} GB/s"
    results.limits += [Limit("losses, forward and backward", m["ours"], m["limit"] + size / speed, meaning),
                       Limit("selection and losses, forward and backward", m["our both"], m["limit"] + size / speed, meaning)]


# ---- the whole step

def has_bfloat16():
    "Whether the processor multiplies bfloat16 in hardware."
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def make_batch(size, side):
    "A batch of ready tensors, random but for its blocks of labels."
    _, labels, _ = same.example(size, side)
    g = torch.Generator().manual_seed(0)
    def random(*shape): return torch.rand(size, *shape, side, side, generator=g)
    prior, valid = random(published.CLASSES).softmax(1), torch.ones_like(labels, dtype=torch.bool)
    return {"s1": random(2), "s2": random(13), "label": labels, "prior": prior, "valid": valid}


def autocast(bfloat16): return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)


def make_optimizer(model): return torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-8, fused=True)     # as the package does


def our_step(model, optimizer, batch, bfloat16):
    "A training step by the package's public functions; the loss, a float."
    with autocast(bfloat16):
        log_p = sensor_log_probabilities(model({s: batch[s] for s in same.SENSORS}))
        selection = select(log_p, batch["label"], EPOCH, CONFIG.selection, batch["valid"])
        loss = cromss_loss(log_p, smooth_labels(batch["label"], batch["prior"]), selection, CONFIG).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def network_alone(model, batch, bfloat16):
    "Forward and backward of the network with nothing behind it."
    with autocast(bfloat16): logits = model({s: batch[s] for s in same.SENSORS})
    model.zero_grad()
    torch.autograd.backward(list(logits.values()), [torch.ones_like(l) for l in logits.values()])


def bench_step(results, settings):
    "Whole training steps, in float32 and, where the processor has it, bfloat16."
    torch.set_num_threads(settings.threads)
    for encoder, size, side in settings.steps: time_step(results, settings, encoder, size, side)


def time_step(results, settings, encoder, size, side):
    torch.manual_seed(0)
    net, batch = published.MiddleFusion(encoder=encoder), make_batch(size, side)
    model = same.twin(net, encoder)
    same.check_network(net, model, batch)
    theirs, ours = published.make_optimizer(net), make_optimizer(model)
    kinds = {"float32": False} | ({"bfloat16": True} if has_bfloat16() else {})
    calls = {"published": lambda: published.training_step(net, theirs, batch, EPOCH)}
    for kind, bf16 in kinds.items():
        calls[kind] = lambda bf16=bf16: our_step(model, ours, batch, bf16)
        calls[f"alone {kind}"] = lambda bf16=bf16: network_alone(model, batch, bf16)
    t = by_turns(calls, settings)
    for kind in kinds:
        what, aim, m = f"training step, {encoder} U-Net, {side} px, batch {size}", "1.3", median(t)
        results.add(Row(f"{what}: published float32, ours {kind}", t["published"], t[kind], "pairs/s", size, aim))
        results.limits.append(Limit(f"{what}, {kind}", m[kind], m[f"alone {kind}"], "forward and backward of the network alone"))


# ---- processes

def command_seconds(data, folder, name, processes, settings):
    "Seconds a step of `cromss pretrain` in some processes of one thread each: a ResNet-18 U-Net at 128 px, 8 crops a step; from timing.csv, the first epoch left out."
    options = {"data": data, "runs": folder, "name": name, "devices": processes, "batch_size": 8 // processes, "crop": 128, "epochs": 3, "min_steps": settings.batches // 3,
               "validation": 0, "loggers": "[]", "precision": "32-true"}
    command = [sys.executable, "-c", "import sys; from cromss.cli import main; sys.exit(main())", "pretrain", *(f"--{k}={v}" for k, v in options.items())]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = (Path(folder) / name / "timing.csv").read_text().splitlines()
    return statistics.mean(float(line.split(",")[1]) for line in lines[2:]) / (settings.batches // 3)


def bench_processes(results, settings, rounds=2):
    "Steps of the command in two processes against one, both ours; the crops of a step are the same."
    with tempfile.TemporaryDirectory() as folder:
        store = prepare(ScenesSource(count=settings.locations, size=128, seed=1), Path(folder) / "store", progress=False)
        times = {n: [] for n in (1, 2)}
        for i in range(rounds):
            for n, t in times.items(): t.append(command_seconds(store.folder, Path(folder) / "runs", f"{n}-{i}", n, settings))
        results.add(Row("cromss pretrain, both ours: 1 process of one thread (left) against 2, the crops of a step the same", times[1], times[2], "pairs/s", 8, "2"))


# ---- the command

BENCHES = {"input": bench_input, "formats": bench_formats, "workers": bench_workers, "processes": bench_processes, "selection": bench_selection, "losses": bench_losses, "step": bench_step}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="smaller shapes and fewer rounds, only printed")
    p.add_argument("--only", nargs="+", choices=BENCHES, metavar="NAME", help=f"some of {', '.join(BENCHES)}, only printed")
    p.add_argument("--out", type=Path, help="Markdown file to write, with a JSON file beside it (default: results.md here, for a full run)")
    p.add_argument("--profile", action="store_true", help="also print where the time of an input sample goes")
    p.add_argument("--threads", type=int, help="threads of everything but the input (default: 2)")
    return p.parse_args(argv)


def write(results, settings, out):
    "The tables as Markdown, and all times as JSON beside it."
    out.write_text(report(results, settings), encoding="utf-8")
    rows = [asdict(r) | {"ratio": r.ratio} for r in results.rows]
    values = {"machine": results.machine, "settings": asdict(settings), "rows": rows, "limits": [asdict(l) for l in results.limits]}
    out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(argv=None):
    args = arguments(argv)
    settings = replace(QUICK if args.quick else Settings(), **({"threads": args.threads} if args.threads else {}))
    results = Results(machine(settings.threads))
    for name in args.only or BENCHES: BENCHES[name](results, settings)
    print(report(results, settings))
    if args.profile: profile_input(settings)
    full = not (args.quick or args.only)
    out = args.out or (Path(__file__).parent / "results.md" if full else None)
    if out: write(results, settings, out)


if __name__ == "__main__":
    main()

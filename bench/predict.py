"""Maps of scenes: memory and time by the size of the scene, and what windows change, each measured in a process of its own.

    python bench/predict.py                                   memory and time, then seams: about half an hour on two cores, 3 GB of memory and 2 GB of disk
    python bench/predict.py --only memory --sizes 1500 3000   smaller scenes
    python bench/predict.py --only memory --margin 32         fewer windows
    python bench/predict.py --only settings                   other windows, batches and layouts of the smallest scene
    python bench/predict.py --only seams                      what windows change

Peak memory is that of the process, less what it has after its imports. CPU seconds are of one thread, and change less than seconds with what else runs on the machine.
Scenes are mosaics of one built-in scene of 512 px, Sentinel-2 with 13 bands; the network is a U-Net with a ResNet-18 of depth 4.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.windows import Window
from torch import nn

from cromss.classes import DYNAMIC_WORLD
from cromss.inputs import InputContract, InputLayer
from cromss.models import build_network
from cromss.predict import predict_array, predict_scene, reach
from cromss.scenes import make_scene
from cromss.sensors import SENSORS

S2 = SENSORS["s2"]
UNET = dict(architecture="unet", encoder="resnet18", encoder_depth=4, decoder_channels=(64, 48, 32, 16))
NETWORKS = {"U-Net, depth 4": UNET, "PSPNet": dict(architecture="pspnet", encoder="resnet18"),
            "DeepLabV3+": dict(architecture="deeplabv3plus", encoder="resnet18")}


class Predictor(nn.Module):
    "A network for Sentinel-2."
    def __init__(self, **options):
        super().__init__()
        self.sensors, self.scheme, self.inputs = {"s2": S2}, DYNAMIC_WORLD, InputLayer(InputContract(S2))
        self.network = build_network(S2.num_bands, DYNAMIC_WORLD.num_classes, **options)
        self.stride = self.network.encoder.output_stride

    def forward(self, values):
        x = self.inputs(values["s2"])
        height, width = x.shape[-2:]
        return self.network(nn.functional.pad(x, (0, -width % self.stride, 0, -height % self.stride)))[..., :height, :width]


def fitted(**options):
    "A predictor after some steps on a scene, so that its classes are not all the same; and the scene, (13, 512, 512)."
    torch.manual_seed(0)
    predictor, scene, draw = Predictor(**options), make_scene(3, size=512, seasons=1), np.random.default_rng(0)
    image, truth, optimizer = scene.images["s2"][0].astype(np.float32), torch.from_numpy(scene.truth[0]).long(), torch.optim.Adam(predictor.parameters(), 2e-3)
    for _ in range(40):
        crops = [(slice(r, r + 64), slice(c, c + 64)) for r, c in draw.integers(0, 449, (8, 2))]
        logits = predictor({"s2": torch.stack([torch.from_numpy(image[(slice(None), *crop)]) for crop in crops])})
        loss = nn.functional.cross_entropy(logits, torch.stack([truth[crop] for crop in crops]))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return predictor.eval(), image


def mosaic(path, image, side, **layout):
    "Write a scene of this side as GeoTIFF, row by row of mosaic pieces."
    image, repeats = np.rint(image).clip(1, 65535).astype(np.uint16), -(-side // 512)
    row = np.tile(image, (1, 1, repeats))[:, :, :side]
    with rasterio.open(path, "w", driver="GTiff", count=S2.num_bands, height=side, width=side, dtype="uint16", nodata=0, compress="deflate", zlevel=1,
                       crs="EPSG:32631", transform=from_origin(5e5, 56e5, 10, 10), **layout) as file:
        for top in range(0, side, 512): file.write(row[:, :side - top], window=Window(0, top, side, min(512, side - top)))
        file.descriptions = S2.bands


def memory(what): return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(what))) / 1024


def child(weights, scene, out, window, margin, batch_size, threads):
    "Predict a scene, and say what it took."
    torch.set_num_threads(threads)
    predictor = Predictor(**UNET)
    predictor.load_state_dict(torch.load(weights, weights_only=True))
    imported, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    done = predict_scene(predictor.eval(), {"s2": scene}, out, window=window, margin=margin, batch_size=batch_size)
    print(json.dumps({"peak": memory("VmHWM") - imported, "imported": imported, "seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "pixels": done.pixels}))


def measure(weights, scene, out, window=512, margin=128, batch_size=1, threads=1):
    given = json.dumps([str(weights), str(scene), str(out), window, margin, batch_size, threads])
    done = subprocess.run([sys.executable, __file__, "--child", given], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def table(rows):
    "Measure rows of (side, layout, options) and print them."
    print("| side, px | file | window, margin, batch | peak memory, MB | seconds | CPU seconds | CPU s/Mpx |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder, (predictor, image) = Path(folder), fitted(**UNET)
        torch.save(predictor.state_dict(), folder / "weights.pt")
        for number, (side, layout, options) in enumerate(rows):
            mosaic(folder / "scene.tif", image, side, **(dict(tiled=True, blockxsize=512, blockysize=512) if layout == "tiles" else {}))
            found = measure(folder / "weights.pt", folder / "scene.tif", folder / f"map{number}.tif", **options)
            how = ", ".join(str(v) for v in (dict(window=512, margin=128, batch_size=1) | options).values())
            print(f"| {side:,} | {layout} | {how} | {found['peak']:.0f} | {found['seconds']:.0f} | {found['cpu']:.0f} | {found['cpu'] / found['pixels'] * 1e6:.1f} |", flush=True)


def seams(side=2048):
    "What windows change in the logits of networks."
    print(f"\n| network, {side:,} px | reach, px | window, margin | same class | largest difference of a logit | of logits within |\n|---|---|---|---|---|---|", flush=True)
    for name, options in NETWORKS.items():
        predictor, image = fitted(**options)
        scene = {"s2": np.roll(np.tile(image, (1, 4, 4)), (100, 200), (1, 2))[:, :side, :side]}
        far, whole = reach(predictor), predict_array(predictor, scene, window=side)
        for margin in (0, 128, 144) if far < 144 else (0, 128):
            logits = predict_array(predictor, scene, window=512, margin=margin)
            same, largest = (logits.argmax(0) == whole.argmax(0)).mean(), np.abs(logits - whole).max()
            print(f"| {name} | {far if far < 240 else 'over 240'} | 512, {margin} | {same:.4%} | {largest:.2g} | {whole.min():.0f} to {whole.max():.0f} |", flush=True)


def main():
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "settings", "seams"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1500, 3000, 6000])
    parser.add_argument("--margin", type=int, default=128)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child: return child(*json.loads(given.child))
    if given.only in (None, "memory"): table([(side, "tiles", dict(margin=given.margin)) for side in given.sizes])
    if given.only == "settings": table([(given.sizes[0], "tiles", dict(window=1024)), (given.sizes[0], "tiles", dict(batch_size=4)), (given.sizes[0], "strips", dict())])
    if given.only in (None, "seams"): seams()


if __name__ == "__main__": main()

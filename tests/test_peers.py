"Other pretrained models: their contracts are TorchGeo's, their files are read in every published layout, and what is read computes what the real model does."
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchgeo.models
from torchvision.transforms.v2 import Normalize

from cromss import peers
from cromss.config import ConfigError, WeightsError
from cromss.inputs import InputLayer
from cromss.models import build_network
from cromss.peers import PEERS, TRANSFORMERS, WAVELENGTHS, open_weights, peer_table
from cromss.sensors import SENSORS, normalize_band
from cromss.weights import save_encoder

ENCODERS = peers.smp.encoders.encoders

REAL = {   # smp's name of an encoder: TorchGeo's function
    "resnet18": "resnet18", "resnet50": "resnet50", "resnet152": "resnet152", "swin-v2-tiny": "swin_v2_t", "swin-v2-base": "swin_v2_b",
    "vit-small-patch16": "vit_small_patch16_224", "vit-base-patch16": "vit_base_patch16_224", "vit-large-patch16": "vit_large_patch16_224",
    "vit-small-patch14": "vit_small_patch14_dinov2", "vit-base-patch14": "vit_base_patch14_dinov2", "vit-huge-patch14": "vit_huge_patch14_224",
    "dofa-base-patch16": "dofa_base_patch16_224", "dofa-large-patch16": "dofa_large_patch16_224"}
HEADS = ("fc.", "head.", "norm.", "fc_norm.")


SMALL = {   # encoder: what smp builds a small one with, and what TorchGeo does
    "resnet50": (dict(layers=[1, 1, 1, 1]), dict(layers=(1, 1, 1, 1))),
    "vit-small-patch14": (dict(embed_dim=48, num_heads=3, blocks=8), dict(embed_dim=48, num_heads=3, depth=8)),
    "vit-small-patch16": (dict(embed_dim=48, num_heads=3, blocks=8), dict(embed_dim=48, num_heads=3, depth=8)),
    "swin-v2-tiny": (dict(embed_dim=24, num_heads=[1, 2, 3, 6], depths=[1, 1, 2, 1]), None),
    "dofa-base-patch16": (dict(width=48, heads=3, blocks=8), dict(embed_dim=48, num_heads=3, depth=8)),
}


@pytest.fixture
def small_encoders(monkeypatch):
    "Encoders of few layers under their own names."
    for name, (ours, _) in SMALL.items(): monkeypatch.setitem(ENCODERS[name], "params", ENCODERS[name]["params"] | ours)


def real(encoder, bands, small=True):
    "TorchGeo's model with random weights, with this many bands; of few layers as `small_encoders` makes them, or whole."
    options = {} if encoder.startswith(("swin", "dofa")) else {"in_chans": bands, "num_classes": 0}
    if encoder in ("vit-small-patch14", "vit-base-patch14"): options["img_size"] = 224
    if small and encoder in SMALL: options |= SMALL[encoder][1] or {}
    build = torchgeo.models.DOFA if encoder.startswith("dofa") else getattr(torchgeo.models, REAL[encoder])
    model = build(**options)
    if encoder.startswith("swin"): model.features[0][0] = torch.nn.Conv2d(bands, model.features[0][0].out_channels, 4, 4)
    for p in model.parameters(): p.data.add_(0.02 * torch.randn_like(p))       # norms, biases and embeddings that begin as 0 or 1
    return model.eval()


def values(contract, side, batch=1):
    "Values in the sensor's units, within what a byte of Satlas holds."
    sensor = SENSORS[contract.sensor.name].select(contract.sensor.bands)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (sensor.mean, sensor.std))
    spread = mean + std * torch.randn(batch, len(mean), side, side)
    return spread if contract.sensor.units == "dB" else spread.clamp(0, 3500)


def published(name, x):
    "What TorchGeo's transforms make of values; Satlas and DOFA take bytes of the true-colour image, which end at 3558 DN."
    x = x.clone()
    if name.startswith(("satlas", "dofa")): x[:, :3] *= 255 / 3558
    if name.startswith("dofa"):
        x[:, 3:] /= 32
        return (x - torch.tensor(peers._DOFA_MEAN).view(-1, 1, 1)) / torch.tensor(peers._DOFA_STD).view(-1, 1, 1)
    transforms = peers._record(name, PEERS[name]).transforms
    for step in transforms if isinstance(transforms, torch.nn.Sequential) else ():
        if isinstance(step, Normalize): x = step(x)
    return x


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


# --- the registry


@pytest.mark.parametrize("name", PEERS)
def test_contract_is_torchgeos(name):
    peer, record = PEERS[name], peers._record(name, PEERS[name])
    x = values(peer.contract, 8, 2)
    torch.testing.assert_close(InputLayer(peer.contract)(x), published(name, x), rtol=1e-5, atol=1e-5)
    assert peer.citation.split()[1] in record.meta["publication"] and peer.licence
    assert peer.contract.sensor.units == ("dB" if peer.sensor == "s1" else "DN") and peer.contract.sensor.name == peer.sensor
    if not name.startswith("dofa"):
        assert tuple(normalize_band(b) for b in record.meta["bands"]) == peer.contract.sensor.bands and record.meta["in_chans"] == peer.contract.sensor.num_bands
    if "152" not in name: assert record.meta["model"] == REAL[peer.encoder]      # TorchGeo calls Satlas' ResNet-152 a resnet50


def test_satlas_is_cut_as_published():
    x = torch.tensor([-50.0, 0, 1779, 3558, 9000, 20000]).view(1, 1, 1, -1).repeat(1, 9, 1, 1)
    seen = InputLayer(PEERS["satlas-si-r50-s2"].contract)(x)[0, :, 0]
    torch.testing.assert_close(seen[0], torch.tensor([0, 0, 0.5, 1, 1, 1]))
    torch.testing.assert_close(seen[8], torch.tensor([0, 0, 1779 / 8160, 3558 / 8160, 1, 1]))
    torch.testing.assert_close(InputLayer(PEERS["satlas-si-r50-rgb"].contract)(x[:, :3])[0, 0, 0], seen[0])


def test_dofa_sees_standardised_bytes():
    "One band of each kind by hand: byte 255 of the true-colour image is 3558 DN, other bytes are DN / 32."
    x = torch.zeros(1, 9, 1, 2)
    x[0, 0, 0], x[0, 3, 0] = torch.tensor([3558.0, 3558 * 114.1099739 / 255]), torch.tensor([32 * 84.33539309, 32 * (84.33539309 + 64.57022983)])
    seen = InputLayer(PEERS["dofa-base-s2"].contract)(x)[0, :, 0]
    torch.testing.assert_close(seen[[0, 3]], torch.tensor([[(255 - 114.1099739) / 77.84352553, 0], [0, 1]]), rtol=1e-5, atol=1e-5)
    assert PEERS["dofa-base-s2"].contract.sensor.bands == ("B4", "B3", "B2", "B5", "B6", "B7", "B8", "B11", "B12")


def test_every_encoder_has_the_names_and_shapes_of_the_real_model():
    for encoder in {p.encoder for p in PEERS.values()}:
        with torch.device("meta"): model = getattr(torchgeo.models, REAL[encoder])(**({"img_size": 224} if encoder in ("vit-small-patch14", "vit-base-patch14") else {}))
        theirs = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(HEADS)}
        ours = {k: v.shape for k, v in peers._blank(encoder, 3).items() if k != "wavelengths"}
        assert ours == theirs, encoder
    assert set(TRANSFORMERS) < {p.encoder for p in PEERS.values()} | {"resnet18"} and set(REAL) == {p.encoder for p in PEERS.values()}


def test_table_for_people():
    table = peer_table()
    assert list(table.index) == list(PEERS) and not table.isna().any().any()
    assert table.loc[["moco-r50-s2", "closp-r50-s1", "softcon-vits14-s1"], "input"].tolist() == ["DN / 10000", "dB, as they are", "(dB - mean) / std"]
    assert table.loc["satlas-mi-swinb-s2", "input"] == "DN / 3558 or 8160, cut to 0..1" and table.loc["seco-eco-r50-s2", "sensor"] == "Sentinel-2 L2A"


def test_older_names_of_torchgeo(monkeypatch):
    class Old: __members__ = {"SENTINEL1_ALL_MOCO": "the older record"}
    monkeypatch.setattr(torchgeo.models, "ResNet50_Weights", Old)
    assert peers._record("moco-r50-s1", PEERS["moco-r50-s1"]) == "the older record"
    with pytest.raises(ConfigError, match="no ResNet50_Weights.SENTINEL2_ALL_DECUR"): open_weights("decur-r50-s2")


# --- files in every published layout


def under(prefix, tensors, factor=1): return {prefix + k: v * factor for k, v in tensors.items()}


def moco(tensors):
    other = under("module.encoder_k.", tensors, 0) | {"module.encoder_q.fc.0.weight": torch.rand(8, 8), "module.queue": torch.rand(4, 4)}
    return {"epoch": 99, "arch": "resnet50", "state_dict": under("module.encoder_q.", tensors) | other, "optimizer": {"state": {}}}


def dino(tensors):
    teacher = under("module.backbone.", tensors) | {"module.head.mlp.0.weight": torch.rand(4, 4)}
    return {"student": under("module.backbone.", tensors, 0), "teacher": teacher, "epoch": 100, "args": Namespace(arch="resnet50")}


def decur(side):
    other = {"module.projector1.0.weight": torch.rand(4, 4)}
    return lambda tensors: {"epoch": 100, "model": under(f"module.backbone_{side}.", tensors) | under(f"module.backbone_{3 - side}.", tensors, 0) | other}


def satlas(tensors): return under("backbone.resnet.", tensors) | {"intermediates.0.layer.weight": torch.rand(4, 4)}
def satlas_swin(tensors): return under("backbone.backbone.", tensors)
def mae(tensors): return {"model": tensors | {"mask_token": torch.rand(1, 1, 8), "decoder_pos_embed": torch.rand(1, 4, 8)}, "epoch": 99}
def plain(tensors): return tensors


LAYOUTS = {   # what is read: peer, how its file is laid out, whether in few layers
    "moco": ("moco-r50-s2", moco, True), "dino": ("dino-r50-s2", dino, True), "satlas": ("satlas-mi-r50-s2", satlas, True), "softcon": ("softcon-r50-s2", plain, True),
    "decur-1": ("decur-r50-s1", decur(1), True), "decur-2": ("decur-r50-s2", decur(2), True), "dofa": ("dofa-base-s2", plain, True),
    "mae": ("mae-vits16-s1", mae, True), "moco-vit": ("moco-vits16-s2", moco, True), "swin": ("satlas-si-swint-s2", satlas_swin, False),
    "whole resnet": ("moco-r50-s1", plain, False), "whole vit": ("softcon-vits14-s2", plain, False)}


def real_features(encoder, model, x, bands):
    "The real model's own feature maps, four of them."
    if encoder.startswith("resnet"):
        x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
        return [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    if encoder.startswith("swin"):
        maps = []
        for i, part in enumerate(model.features):
            x = part(x)
            if i % 2: maps.append(x.permute(0, 3, 1, 2))
        return maps
    if encoder.startswith("vit"): return model.forward_intermediates(x, indices=[len(model.blocks) * q // 4 - 1 for q in (1, 2, 3, 4)], intermediates_only=True)
    maps, blocks = [], model.blocks
    def keep(block, given, tokens): maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14)))
    for q in (1, 2, 3, 4): blocks[len(blocks) * q // 4 - 1].register_forward_hook(keep)
    model.forward_features(x, [WAVELENGTHS[b] for b in bands])
    return maps


@pytest.mark.parametrize("case", LAYOUTS)
@torch.no_grad()
def test_what_is_read_computes_what_the_real_model_does(tmp_path, request, case):
    name, layout, small = LAYOUTS[case]
    if small: request.getfixturevalue("small_encoders")
    peer = PEERS[name]
    model = real(peer.encoder, peer.contract.sensor.num_bands, small)
    torch.save(layout(model.state_dict()), tmp_path / "file.pth")
    weights = open_weights(f"{name}:{tmp_path}/file.pth", sensor=peer.sensor, bands=peer.contract.sensor)
    assert weights.contract == peer.contract and weights.depth is None and weights.encoder == peer.encoder and name in weights.origin
    side = 224 if peer.encoder.startswith(("vit", "dofa")) else 64
    x = values(peer.contract, side)
    ours = weights.build()(InputLayer(weights.contract)(x))
    theirs = real_features(peer.encoder, model, published(name, x), peer.contract.sensor.bands)
    assert len(ours) == 6 and len(theirs) == 4
    for stride, a, b in zip((4, 8, 16, 32), ours[2:], theirs):
        if b.shape[-1] != side // stride: b = F.interpolate(b, scale_factor=side / stride / b.shape[-1], mode="bilinear")
        assert a.shape[-2:] == (side // stride, side // stride)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@torch.no_grad()
def test_other_sizes_are_those_of_timm(tmp_path, small_encoders):
    "At 64 px timm itself interpolates the position embeddings."
    model = timm.create_model("vit_small_patch16_224", in_chans=2, num_classes=0, dynamic_img_size=True, **SMALL["vit-small-patch16"][1]).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    encoder, x = open_weights(f"mae-vits16-s1:{tmp_path}/vit.pth").build(), torch.randn(1, 2, 64, 96)
    torch.testing.assert_close(encoder(x)[4], model.forward_intermediates(x, indices=[5], intermediates_only=True)[0], rtol=1e-5, atol=1e-5)


# --- encoders


@pytest.mark.parametrize("encoder", ["vit-small-patch14", "vit-small-patch16", "swin-v2-tiny", "dofa-base-patch16"])
@pytest.mark.parametrize("depth", [1, 3, 5])
@torch.no_grad()
def test_pyramid_of_any_size(encoder, depth, small_encoders):
    module = peers.smp.encoders.get_encoder(encoder, 5, depth, None).eval()
    for height, width in ((64, 64), (37, 90)):
        features = module(torch.rand(2, 5, height, width))
        assert [tuple(f.shape) for f in features] == [(2, c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(module.out_channels)]
        assert all(f.isfinite().all() for f in features)
    assert module.out_channels[:2] == [5, 0][: depth + 1] and len(features) == depth + 1


@torch.no_grad()
def test_features_lie_where_the_image_has_them(small_encoders):
    "A bright spot is found at its place in every map, with a patch of 14 px too."
    for encoder in ("vit-small-patch14", "vit-small-patch16"):
        module = peers.smp.encoders.get_encoder(encoder, 1, 5, None).eval()
        module.maps = lambda x: [F.avg_pool2d(x, module.patch)] * 4       # tokens that are the mean of their patch
        x = torch.zeros(1, 1, 224, 224)
        x[..., 40:120, 130:200] = 1
        for i, f in enumerate(module(x)[2:], 2):
            rows, columns = torch.nonzero(f[0, 0] > 0.5, as_tuple=True)
            centre = torch.stack([rows.float().mean(), columns.float().mean()]) * 2**i + 2**i / 2
            assert (centre - torch.tensor([80.0, 165.0])).abs().max() <= 2**i / 2 + 2, (encoder, i, centre)


@pytest.mark.parametrize("architecture", ["upernet", "fpn", "pspnet", "unet", "segformer"])
@pytest.mark.parametrize("encoder", ["vit-small-patch14", "swin-v2-tiny"])
def test_architectures_take_them_and_every_weight_learns(architecture, encoder, small_encoders):
    network = build_network(2, 3, architecture, encoder).train()
    logits = network(torch.rand(2, 2, 64, 96))
    assert logits.shape == (2, 3, 64, 96)
    logits.square().mean().backward()
    assert not [n for n, p in network.encoder.named_parameters() if p.grad is None]


def test_dilation_and_other_depths_are_refused(small_encoders):
    for architecture in ("deeplabv3plus", "deeplabv3", "pan"):
        with pytest.raises(ConfigError, match="no strides to dilate.*upernet"): build_network(2, 3, architecture, "vit-small-patch16")
    for encoder in ("vit-small-patch16", "swin-v2-tiny", "dofa-base-patch16"):
        with pytest.raises(ConfigError, match="depth"): build_network(2, 3, "fpn", encoder, encoder_depth=6)


def test_weights_fill_a_shallower_network(tmp_path, small_encoders):
    model = real("vit-small-patch14", 2)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    weights = open_weights(f"softcon-vits14-s1:{tmp_path}/vit.pth")
    network = build_network(2, 3, "pspnet", "vit-small-patch14")
    weights.fill(network.encoder)
    assert len(network.encoder.blocks) == 4 and torch.equal(network.encoder.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)


def test_bands_by_name(tmp_path, small_encoders):
    model = real("resnet50", 9)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    place = f"satlas-si-r50-s2:{tmp_path}/s.pth"
    weights = open_weights(place, bands=["B02", "B8", "B4"], match="name")
    assert weights.contract.sensor.bands == ("B2", "B8", "B4") and weights.contract.sensor.std == (3558, 8160, 3558)
    assert torch.equal(weights.build().conv1.weight, model.conv1.weight[:, [2, 6, 0]])
    with pytest.raises(WeightsError, match="expected bands B2, B8, B4.*match='name'"): open_weights(place, bands=["B2", "B8", "B4"])
    with pytest.raises(WeightsError, match="lacking B1"): open_weights(place, bands=["B1"], match="name")
    with pytest.raises(WeightsError, match="level L1C, expected L2A"): open_weights(place, bands=SENSORS["s2a"])


def test_wavelengths_go_with_the_bands(tmp_path, small_encoders):
    model = real("dofa-base-patch16", 9)
    torch.save(model.state_dict() | {"mask_token": torch.rand(1, 1, 4)}, tmp_path / "d.pth")
    weights = open_weights(f"dofa-base-s2:{tmp_path}/d.pth", bands=["B11", "B2"], match="name")
    encoder = weights.build()
    torch.testing.assert_close(encoder.wavelengths, torch.tensor([[1.61, 0.49]]))
    with torch.no_grad(): tokens = model.patch_embed(x := torch.rand(1, 2, 32, 32), torch.tensor([1.61, 0.49]))[0]
    torch.testing.assert_close(encoder.patch_embed(x, encoder.wavelengths[0])[0], tokens)


# --- what is refused


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A file of moco-r18-s2."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("peers") / "r18.pth"
    torch.save(real("resnet18", 13).state_dict(), path)
    return path


def refused(place, message, error=WeightsError, **wanted):
    with pytest.raises(error, match=message) as e: open_weights(place, **wanted)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_other_sensors_and_other_files_are_refused(small):
    assert open_weights(f"moco-r18-s2:{small}").tensors.keys() >= {"conv1.weight", "layer4.1.bn2.running_var"}
    refused(f"moco-r18-s2:{small}", "sensor s2, expected s1", sensor="s1")
    refused(f"moco-r18-rgb:{small}", r"conv1.weight .*\(64, 13, 7, 7\) instead of .*\(64, 3, 7, 7\); it takes B4, B3, B2 \(3\)")
    refused(f"moco-r50-s2:{small}", "not the file of moco-r50-s2: .* missing")
    refused(f"mae-vits16-s2:{small}", "blocks.0.attn.* missing, bn1.bias.* there")
    refused(f"moco-r18-s2:{small.parent}/nothing.pth", "cannot be read")
    refused(f"moco-r18-s2:{small.parent}", "cannot be read")


def test_unknown_names(small, tmp_path, monkeypatch):
    refused("moco-r50-s3", "did you mean 'moco-r50-s2'", ConfigError)
    refused(f"mocco-r18-s2:{small}", "unknown peer 'mocco-r18-s2'; did you mean 'moco-r18-s2'", ConfigError)
    refused("dino", "did you mean 'dino-r50-s2' or 'dino-vits16-s2'", ConfigError)
    refused("nothing-of-the-kind", "nothing-of-the-kind")
    refused(tmp_path / "folder", "no encoder there")


def test_anything_else_is_read_as_before(tmp_path, monkeypatch):
    from cromss.models import CrossModalSegmenter
    model = CrossModalSegmenter({"s1": 2}, encoder="resnet18", encoder_depth=3, decoder_channels=(16, 8, 8))
    folder = save_encoder(model, "s1", tmp_path / "moco-r50-s2x")         # nearly a peer's name
    monkeypatch.chdir(tmp_path)
    assert open_weights(folder, bands=SENSORS["s1"]).contract.scaling == "clip" and open_weights("moco-r50-s2x").encoder == "resnet18"


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_damaged_files_are_refused(small, tmp_path):
    tensors = torch.load(small, weights_only=True)
    def written(content): torch.save(content, tmp_path / "bad.pth"); return f"moco-r18-s2:{tmp_path}/bad.pth"
    refused(written({k: v for k, v in tensors.items() if k != "layer2.0.conv1.weight"}), "layer2.0.conv1.weight missing")
    refused(written(tensors | {"bn1.weight": torch.full((64,), torch.nan)}), "NaN")
    refused(written(tensors | {"bn1.weight": tensors["bn1.weight"].half()}), "bn1.weight float16")
    refused(written(tensors | {"bn1.weight": tensors["bn1.weight"].to_sparse()}), "no dense tensor")
    refused(written(tensors | {"bn1.weight": "weight"}), "bn1.weight missing")
    refused(written([1, 2]), "no tensors by name")
    refused(written({"state_dict": {}}), "no tensors by name")
    refused(written({1: torch.ones(2), "state_dict": {"module.encoder_q.": torch.ones(2)}}), "missing")
    for cut in (10, 4000, small.stat().st_size - 50):
        (tmp_path / "bad.pth").write_bytes(small.read_bytes()[:cut])
        refused(f"moco-r18-s2:{tmp_path}/bad.pth", "bad.pth: ")
    blob = bytearray(small.read_bytes())
    blob[len(blob) // 2] ^= 255
    (tmp_path / "bad.pth").write_bytes(blob)
    refused(f"moco-r18-s2:{tmp_path}/bad.pth", "CRC")


class Payload:
    def __reduce__(self): return Path.touch, (Path("touched"),)


def test_hostile_files_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "hook": Payload()}, tmp_path / "bad.pth")
    refused(f"moco-r18-s2:{tmp_path}/bad.pth", "refused, nothing was executed")
    assert not (tmp_path / "touched").exists()


# --- downloads and TorchGeo


@pytest.fixture
def hosted(small, tmp_path, monkeypatch):
    "TorchGeo's record of moco-r18-s2 with another address, and a cache of its own."
    record = torchgeo.models.ResNet18_Weights.SENTINEL2_ALL_MOCO.value
    source = tmp_path / "host" / "r18-00000000.pth"
    source.parent.mkdir()
    source.write_bytes(small.read_bytes())
    monkeypatch.setattr(record, "url", source.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return source


def test_download_once(hosted, tmp_path):
    first = open_weights("moco-r18-s2", sensor="s2", bands=SENSORS["s2"])
    hosted.unlink()
    again = open_weights("moco-r18-s2")
    assert torch.equal(first.tensors["conv1.weight"], again.tensors["conv1.weight"])
    assert [p.name for p in (tmp_path / "cache/checkpoints").iterdir()] == ["r18-00000000.pth"]


def test_failed_download_leaves_nothing(hosted, tmp_path):
    hosted.unlink()
    refused("moco-r18-s2", "cannot be downloaded.*moco-r18-s2:FILE")
    assert list((tmp_path / "cache/checkpoints").iterdir()) == []
    (tmp_path / "cache/checkpoints").rmdir()
    (tmp_path / "cache/checkpoints").write_text("a file in the way")
    refused("moco-r18-s2", "cannot be downloaded")


def test_without_torchgeo(small, monkeypatch):
    for module in ("torchgeo", "torchgeo.models"): monkeypatch.setitem(sys.modules, module, None)
    refused("moco-r18-s2", r'pip install "cromss\[peers\]"', ConfigError)
    refused(f"dofa-base-s2:{small}", r'pip install "cromss\[peers\]"', ConfigError)
    with pytest.raises(ConfigError, match=r"cromss\[peers\]"): build_network(9, 2, "upernet", "dofa-base-patch16")
    assert open_weights(f"moco-r18-s2:{small}").encoder == "resnet18"       # a file needs no TorchGeo
    assert len(peer_table()) == len(PEERS)

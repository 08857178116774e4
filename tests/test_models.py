"Shapes, what is shared and stays shared, names in the state, and refusals, over several architectures."
import copy
import warnings

import pytest
import segmentation_models_pytorch as smp
import torch

from cromss.config import ConfigError, DataError
from cromss.models import CrossModalSegmenter, build_network, keeps_statistics, tie

ARCHITECTURES = ("unet", "fpn", "deeplabv3plus", "pspnet", "manet", "upernet", "segformer", "linknet")
FORMS = [("mid", "per-sensor"), ("mid", "shared"), ("late", "per-sensor")]
BANDS = {"s1": 2, "s2": 13}
SMALL = dict(encoder="mobilenet_v2", encoder_depth=3, decoder_channels=(16, 8, 8))


def model(bands=BANDS, seed=0, **options):
    torch.manual_seed(seed)
    return CrossModalSegmenter(bands, **{**SMALL, **options})


def outline(bands=BANDS, **options):
    "A model without values: names, shapes and sharing only, made at once."
    with torch.device("meta"): return model(bands, **{"encoder": "resnet18", **options})


def images(bands=BANDS, batch=2, size=64, device="cpu"): return {s: torch.rand(batch, n, size, size, device=device) for s, n in bands.items()}


def parameters(module): return dict(module.named_parameters(remove_duplicate=False))


def buffers(module): return dict(module.named_buffers(remove_duplicate=False))


def tied(m, a="s1", b="s2"):
    "Whether the decoders and heads of two sensors have the same tensors for parameters."
    pairs = [(m.nets[a].decoder, m.nets[b].decoder), (m.nets[a].segmentation_head, m.nets[b].segmentation_head)]
    return all(parameters(x)[k] is parameters(y)[k] for x, y in pairs for k in parameters(x))


def same(a, b): return all(torch.equal(a[s], b[s]) for s in a)


# ---- shapes and sharing

@pytest.mark.parametrize("fusion, norm", FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_fuses(architecture, fusion, norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # FPN's decoder has group norm
        m = outline(num_classes=5, fusion=fusion, norm=norm, architecture=architecture, encoder_depth=None, decoder_channels=None)
    bands = BANDS if norm == "per-sensor" and fusion == "mid" else {"s2": 13}
    assert {s: l.shape for s, l in m(images(bands, device="meta")).items()} == {s: (2, 5, 64, 64) for s in bands}
    first, second = m.nets["s1"].decoder, m.nets["s2"].decoder
    mine, other = parameters(first), parameters(second)
    assert mine.keys() == other.keys() and mine
    assert all((mine[k] is other[k]) == (fusion == "mid") for k in mine) and tied(m) == (fusion == "mid")
    assert (first is second) == (norm == "shared")
    assert all((b is buffers(second)[k]) == (norm == "shared") for k, b in buffers(first).items())
    assert not keeps_statistics(m.nets["s1"].segmentation_head)             # or the head's would have to be split too
    assert not {id(p) for p in m.encoder("s1").parameters()} & {id(p) for p in m.encoder("s2").parameters()}
    parts = [p for n in m.nets.values() for part in (n.encoder, n.decoder, n.segmentation_head) for p in part.parameters()]
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in {id(p): p for p in parts}.values())


@pytest.mark.parametrize("fusion, norm", FORMS)
def test_logits_and_gradients(fusion, norm):
    m = model(fusion=fusion, norm=norm, encoder="resnet18")
    out = m(images())
    sum(l.square().mean() for l in out.values()).backward()
    assert all(l.shape == (2, 9, 64, 64) and l.isfinite().all() for l in out.values())
    heads = [n.segmentation_head[0].weight.grad for n in m.nets.values()]
    assert all(g is not None and g.abs().sum() > 0 for g in heads) and (heads[0] is heads[1]) == (fusion == "mid")


@pytest.mark.parametrize("num_classes", [2, 13])
def test_any_number_of_classes(num_classes): assert model(num_classes=num_classes)(images())["s2"].shape == (2, num_classes, 64, 64)


@pytest.mark.parametrize("fusion, norm", FORMS)
def test_three_sensors(fusion, norm):
    bands = {"dem": 1, **BANDS}
    m = model(bands, fusion=fusion, norm=norm)
    assert m.sensors == ("dem", "s1", "s2") and {s: l.shape for s, l in m(images(bands)).items()} == {s: (2, 9, 64, 64) for s in bands}
    assert all(tied(m, "dem", s) == (fusion == "mid") for s in ("s1", "s2"))


def test_one_sensor():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = model({"s2": 13})
    assert m(images({"s2": 13}))["s2"].shape == (2, 9, 64, 64)


@pytest.mark.parametrize("fusion, norm", FORMS)
def test_a_part_of_the_sensors_is_enough(fusion, norm):
    m, given = model(fusion=fusion, norm=norm).eval(), images()
    with torch.no_grad():
        both = m(given)
        for s in BANDS:
            alone = m({s: given[s]})
            assert list(alone) == [s] and torch.equal(alone[s], both[s])
    assert m({}) == {}


def test_the_encoder_is_the_sensors_own():
    m = outline()
    assert m.encoder("s2") is m.nets["s2"].encoder and m.encoder("s2").conv1.in_channels == 13 and m.encoder("s1").conv1.in_channels == 2


# ---- ties hold

def stepped(m):
    optimizer = torch.optim.Adam(m.parameters(), 1e-2)
    sum(l.square().mean() for l in m(images()).values()).backward()
    optimizer.step()
    return m


def reloaded(m):
    other = model(seed=1)
    other.load_state_dict(m.state_dict())
    assert same(other.eval()(x := images()), m.eval()(x))
    return other


@pytest.mark.parametrize("change", [copy.deepcopy, reloaded, stepped, lambda m: m.to(torch.float64), lambda m: m.half().float(), lambda m: m.eval().train(),
                                    lambda m: copy.deepcopy(stepped(m)).to(torch.float64)],
                         ids=["deepcopy", "load_state_dict", "step", "float64", "half and back", "eval and back", "all"])
def test_ties_hold(change):
    m = model()
    changed = change(m)
    assert tied(changed) and changed.nets["s1"].decoder is not changed.nets["s2"].decoder
    assert len(list(changed.parameters())) == len(list(m.parameters())) == len({id(p) for p in changed.parameters()})     # an optimizer sees each once
    assert all(a is not b for a, b in zip(buffers(changed.nets["s1"].decoder).values(), buffers(changed.nets["s2"].decoder).values(), strict=True))


def test_a_copy_shares_nothing_with_its_original():
    m = outline()
    twin = copy.deepcopy(m)
    assert not {id(p) for p in m.parameters()} & {id(p) for p in twin.parameters()}


def test_tie_reaches_every_layer():
    decoder = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)), "b": torch.nn.Linear(2, 2)})
    decoder.scale = torch.nn.Parameter(torch.ones(1))
    twin = tie(decoder)
    assert all(parameters(twin)[k] is p for k, p in parameters(decoder).items()) and all(buffers(twin)[k] is not b for k, b in buffers(decoder).items())


# ---- statistics

def test_both_norms_train_alike():
    own, shared = model(), model(norm="shared")
    shared.load_state_dict(own.state_dict())
    for m in (own, shared): m.optimizer = torch.optim.SGD(m.parameters(), 0.1)
    for step in range(3):
        torch.manual_seed(step)
        given, found = images(), []
        for m in (own, shared):
            found.append(m.train()(given))
            m.optimizer.zero_grad(), sum(l.square().mean() for l in found[-1].values()).backward(), m.optimizer.step()
        for s in given: torch.testing.assert_close(found[0][s], found[1][s], atol=1e-5, rtol=1e-4)
    assert not same(own.eval()(given), shared.eval()(given))                # in evaluation they part


@pytest.mark.parametrize("norm", ["per-sensor", "shared"])
def test_whose_statistics_a_batch_moves(norm):
    m = model(norm=norm)
    before = {k: b.clone() for k, b in buffers(m.nets["s1"].decoder).items()}
    m.train()({"s2": images()["s2"]})
    moved = [k for k, b in buffers(m.nets["s1"].decoder).items() if not torch.equal(b, before[k])]
    assert bool(moved) == (norm == "shared") and any("running_mean" in k for k in before)


@pytest.mark.parametrize("options", [dict(architecture="fpn", decoder_channels=None), dict(decoder_use_norm="identity"), dict(decoder_use_norm=False)])
def test_a_decoder_without_batch_norm_has_nothing_to_split(options):
    "FPN's decoder has group norm."
    with pytest.warns(UserWarning, match="splits nothing: this decoder has no batch norm"): assert tied(outline(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outline(norm="shared", **options), outline(fusion="late", **options), outline({"s2": 13}, **options)


def test_a_decoder_with_batch_norm_is_split_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outline(), outline({**BANDS, "dem": 1})


# ---- names in the state

def test_the_published_form_has_smps_own_names():
    m = model(norm="shared")
    def plain(bands): return smp.Unet(SMALL["encoder"], 3, None, decoder_channels=(16, 8, 8), in_channels=bands, classes=9)
    nets = {s: plain(n) for s, n in BANDS.items()}
    assert list(m.state_dict()) == [f"nets.{s}.{k}" for s, net in nets.items() for k in net.state_dict()]
    m.nets["s1"].load_state_dict(nets["s1"].state_dict())                   # a plain U-Net's weights fit as they are
    x = images()["s1"]
    assert torch.equal(m.eval()({"s1": x})["s1"], nets["s1"].eval()(x))


@pytest.mark.parametrize("fusion, norm", FORMS)
def test_every_form_has_the_same_names(fusion, norm): assert list(outline(fusion=fusion, norm=norm).state_dict()) == list(outline(norm="shared").state_dict())


def test_options_make_the_model_again():
    m = model({"s1": 2, "s2": 9}, num_classes=4, norm="shared", decoder_channels=(32, 16, 16), decoder_attention_type="scse")
    again = CrossModalSegmenter(**m.options)
    again.load_state_dict(m.state_dict())
    x = images({"s1": 2, "s2": 9})
    assert same(again.eval()(x), m.eval()(x))


# ---- refusals

@pytest.mark.parametrize("options, text", [
    (dict(architecture="unett"), "architecture='unett'.*refuses"), (dict(encoder="resnet19"), "encoder='resnet19'.*refuses"),
    (dict(encoder="tu-no_such_model"), "no_such_model"), (dict(encoder_depth=9, decoder_channels=None), "depth"),
    (dict(decoder_channels=(16, 8)), "decoder_channels"), (dict(decoder_attention_type="none"), "refuses"), (dict(decoder_use_norm="groupnorm"), "groupnorm"),
    (dict(fusion="early"), "fusion='early': choose one of 'mid', 'late'"), (dict(norm="own"), "norm='own': choose one of 'per-sensor', 'shared'"),
    (dict(bands={}), "bands={} is empty"),
])
def test_what_does_not_fit_is_refused_in_one_line(options, text):
    with pytest.raises(ConfigError, match=text) as refusal: outline(**options)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize("options", [dict(decoder_use_norm="instancenorm"), dict(architecture=3)])
def test_what_smp_fails_on_is_refused_too(options):
    with pytest.raises(ConfigError): outline(**options)


def test_a_misspelled_option_is_refused():
    with pytest.raises(ConfigError, match="decoder_atention_type"): outline(decoder_atention_type="scse")


def test_build_network_is_smps():
    net = build_network(3, 2, "linknet", "resnet18")
    assert isinstance(net, smp.Linknet) and net.encoder.conv1.in_channels == 3


@pytest.mark.parametrize("fusion", ["mid", "late"])
def test_images_that_do_not_fit_are_refused(fusion):
    m = outline(fusion=fusion)
    with pytest.raises(DataError, match="s2: 12 bands given, the model was made for 13"): m({"s2": torch.rand(1, 12, 64, 64)})
    with pytest.raises(DataError, match="no sensor 'dem'; it has s1, s2"): m({"dem": torch.rand(1, 1, 64, 64)})
    with pytest.raises(DataError, match="no sensor 'dem'"): m.encoder("dem")

"""Networks: published and hand-counted sizes, other libraries' outputs for the same weights, and a head on features.

What needs shapes alone runs on the meta device, where the largest networks cost nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from models import MODELS, make_model
from models.network import Network

PRETRAINED = "resnet50-imagenet:pretrained"
FROM_SCRATCH = [name for name in MODELS if name != PRETRAINED]
Case = tuple[Network, Tensor]


def make(name: str, num_classes: int = 10, in_channels: int = 3, size: int | None = None, dropout: float = 0.0) -> Network:
    """For images of ``size`` pixels a side; by default 8, or the fewest that the network takes."""
    size = size or max(8, MODELS[name].min_size)
    return make_model(name, in_channels=in_channels, image_size=size, num_classes=num_classes, dropout=dropout)


DEEPER = ("resnet34", "preact-resnet34")  # the blocks of resnet18 and preact-resnet18, and more of them


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in DEEPER)) for name in FROM_SCRATCH]
)
def case(request: pytest.FixtureRequest) -> Case:
    """Each network with dropout of 0.5, and four images for it."""
    torch.manual_seed(0)
    size = max(8, MODELS[request.param].min_size)
    return make(request.param, dropout=0.5), torch.randn(4, 3, size, size)


def num_parameters(name: str, num_classes: int, size: int | None = None, in_channels: int = 3) -> int:
    with torch.device("meta"):
        network = make(name, num_classes, in_channels, size)
    return sum(parameter.numel() for parameter in network.parameters())


def convolutions(*shapes: tuple[int, int]) -> int:
    """Weights of 3 x 3 convolutions from and to so many channels."""
    return sum(9 * num_in * num_out for num_in, num_out in shapes)


def test_small_networks_counted_by_hand() -> None:
    hidden = 64 * 128 + 128 + 128 * 128 + 128
    assert num_parameters("mlp", 10, size=8, in_channels=1) == hidden + 128 * 10 + 10
    norms = 2 * 32 + 2 * 64
    grey, colour = convolutions((1, 32), (32, 64)), convolutions((3, 32), (32, 64))
    assert num_parameters("small-cnn", 10, size=8, in_channels=1) == grey + norms + 256 * 10 + 10
    assert num_parameters("small-cnn", 100, size=32) == colour + norms + 256 * 100 + 100


def test_plain_networks_counted_by_hand() -> None:
    """Three vectors for each convolution: its bias, and batch normalisation's weight and bias."""
    weights = convolutions((3, 64), (64, 64), (64, 128), (128, 128), (128, 196), (196, 196))
    hidden = 196 * 4 * 4 * 256 + 3 * 256
    assert num_parameters("cnn8", 10, size=32) == weights + 3 * 2 * (64 + 128 + 196) + hidden + 256 * 10 + 10
    weights = convolutions((3, 128), (128, 128), (128, 128), (128, 256), (256, 256), (256, 256))
    weights += convolutions((256, 512), (512, 256), (256, 128))
    assert num_parameters("cnn9", 10, size=32) == weights + 3 * (3 * 128 + 3 * 256 + 512 + 256 + 128) + 128 * 10 + 10


def test_residual_networks_counted_by_hand() -> None:
    """Batch normalisation follows each convolution in ResNet-18 and precedes each but the first in the others."""
    stages = (64, 128), (128, 256), (256, 512)
    projections = sum(before * after for before, after in stages)
    weights = convolutions((3, 64), *4 * [(64, 64)], *stages, *3 * [(128, 128), (256, 256), (512, 512)]) + projections
    after = 64 + 4 * 64 + 5 * (128 + 256 + 512)
    before = 4 * 64 + (64 + 3 * 128) + (128 + 3 * 256) + (256 + 3 * 512)
    assert num_parameters("resnet18", 10) == weights + 2 * after + 512 * 10 + 10 == 11_173_962
    assert num_parameters("preact-resnet18", 10) == weights + 2 * before + 512 * 10 + 10 == 11_171_146
    deeper = convolutions(*2 * [(64, 64)], *4 * [(128, 128)], *8 * [(256, 256)], *2 * [(512, 512)])
    more_norms = 2 * 64 + 4 * 128 + 8 * 256 + 2 * 512
    assert num_parameters("resnet34", 10) == 11_173_962 + deeper + 2 * more_norms == 21_282_122
    assert num_parameters("preact-resnet34", 10) == 11_171_146 + deeper + 2 * more_norms == 21_279_306
    stages = (16, 160), (160, 320), (320, 640)
    projections = sum(before * after for before, after in stages)
    weights = convolutions((3, 16), *stages, *7 * [(160, 160), (320, 320), (640, 640)]) + projections
    norms = (16 + 7 * 160) + (160 + 7 * 320) + (320 + 7 * 640) + 640
    assert num_parameters("wrn-28-10", 10) == weights + 2 * norms + 640 * 10 + 10 == 36_479_194


@pytest.mark.parametrize(
    ("name", "num_classes", "published"),
    [
        ("resnet50", 10, 23_520_842),
        ("wrn-28-10", 10, 36.5e6),  # its paper
        ("vgg19-bn", 1000, 143_678_248),  # torchvision's documentation
        ("resnet50-imagenet", 1000, 25_557_032),  # torchvision's documentation
        ("inception-resnet-v2", 1000, 55.84e6),  # timm's table of results
    ],
)
def test_published_sizes(name: str, num_classes: int, published: float) -> None:
    tolerance = 0 if isinstance(published, int) else 1e-3
    assert num_parameters(name, num_classes) == pytest.approx(published, rel=tolerance, abs=0)


def copy_in_order(theirs: nn.Module, ours: nn.Module) -> None:
    """All weights and statistics of one network into another whose layers come in the same order."""
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_resnet_with_our_stem_and_weights_gives_the_same(name: str) -> None:
    import torchvision

    theirs = getattr(torchvision.models, name)(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = make(name)
    copy_in_order(theirs, ours)
    theirs, ours, images = theirs.double(), ours.double(), torch.randn(2, 3, 16, 16).double()
    torch.testing.assert_close(ours(images), theirs(images))  # in training, and then with the statistics of that batch
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(
    ("name", "stem", "widths", "depths"),
    [("preact-resnet18", 64, (64, 128, 256, 512), [2, 2, 2, 2]), ("wrn-28-10", 16, (160, 320, 640), [4, 4, 4])],
)
def test_timms_preactivation_resnet_with_our_stem_and_weights_gives_the_same(
    name: str, stem: int, widths: tuple[int, ...], depths: list[int]
) -> None:
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    theirs = ResNetV2(
        depths,
        widths,
        num_classes=0,
        stem_chs=stem,
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
    )
    theirs.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
    if name == "preact-resnet18":
        theirs.norm = nn.Identity()  # see the docstring of preact_resnet
    ours = make(name).features
    copy_in_order(theirs, ours)
    theirs, ours, images = theirs.double(), ours.double(), torch.randn(2, 3, 16, 16).double()
    torch.testing.assert_close(ours(images), theirs(images).flatten(1))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images).flatten(1))


def test_vgg19_bn_is_torchvisions_layer_by_layer() -> None:
    from torchvision.models import vgg19_bn

    def leaves(network: nn.Module) -> list[str]:
        every = [module for module in network.modules() if not list(module.children())]
        return [repr(module) for module in every if not isinstance(module, nn.Flatten)]  # a function there

    with torch.device("meta"):
        assert leaves(make("vgg19-bn", dropout=0.5)) == leaves(vgg19_bn(num_classes=10))


def test_pretrained_weights_are_read_from_torch_hubs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import resnet50

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = resnet50()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / "resnet50-0676ba61.pth")
    ours = make(PRETRAINED, num_classes=1000)
    assert not torch.equal(ours.head.weight, theirs.fc.weight)
    ours.head = theirs.fc
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_pretrained_weights_that_cannot_be_had_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> NoReturn:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    path = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    start = rf"^{PRETRAINED}: weights can be neither read from {path} nor fetched from https://\S+/{path.name}: "
    with pytest.raises(ValueError, match=start + r".*no route to host.*$"):
        make(PRETRAINED)
    torch.save(torch.zeros(1000), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=start + r".+$") as error:
        make(PRETRAINED)
    assert "\n" not in str(error.value)


def test_pretrained_weights_are_for_colour_images() -> None:
    with pytest.raises(ValueError, match=rf"^{PRETRAINED} needs images of 3 channels, not 1$"):
        make(PRETRAINED, in_channels=1)


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_shapes(name: str) -> None:
    smallest = MODELS[name].min_size
    for in_channels, size in (1, smallest), (3, max(64, smallest + 2)):
        with torch.device("meta"):
            network = make(name, num_classes=7, in_channels=in_channels, size=size)
            images = torch.randn(2, in_channels, size, size)
        features = network.features(images)
        assert features.shape == (2, network.num_features)
        assert network.head(features).shape == (2, 7)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.min_size > 1])
def test_fewer_pixels_than_allowed_would_not_do(name: str) -> None:
    model = MODELS[name]
    size = model.min_size - 1
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"too small|Kernel size can't be greater"):
        model.build(3, size, 10, 0.0)(torch.randn(2, 3, size, size))
    with pytest.raises(ValueError, match=f"^{name} needs images of at least {model.min_size} pixels a side, not {size}$"):
        make(name, size=size)


def test_the_network_is_its_head_on_its_features(case: Case) -> None:
    network, images = case
    network.eval()
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (4, 10)
        assert logits.isfinite().all()
        assert torch.equal(network.head(network.features(images)), logits)
        assert torch.equal(network(images), logits)


def test_dropout_acts_on_the_features_before_the_head(case: Case) -> None:
    network, images = case
    seen: list[Tensor] = []
    hooks = [
        network.features.register_forward_hook(lambda _, __, features: seen.append(features)),
        network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ]
    with torch.no_grad():
        network.train()(images)
    for hook in hooks:
        hook.remove()
    features, dropped = seen
    active = features != 0
    kept = dropped[active] != 0
    assert torch.allclose(dropped[active][kept], 2 * features[active][kept])
    assert abs(float(kept.float().mean()) - 0.5) < 0.15


def test_every_parameter_learns(case: Case) -> None:
    network, images = case
    loss = cross_entropy(network.train()(images), torch.arange(4))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    for (key, _), gradient in zip(network.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all(), key
        assert float(gradient.abs().sum()) > 0, key


QUICK = ("mlp", "small-cnn", "cnn8", "resnet18", "preact-resnet18", "resnet50-imagenet")  # one of each kind of block


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FROM_SCRATCH])
def test_a_virtual_step_can_be_differentiated(name: str) -> None:
    """Meta-Weight-Net's double backward: a sample's weight has for gradient -rate <its gradient, the loss's after the step>."""
    torch.manual_seed(0)
    network, size, rate = make(name), max(8, MODELS[name].min_size), 1e-4
    images, labels = torch.randn(4, 3, size, size), torch.arange(4)
    weights = torch.full((4,), 0.25, requires_grad=True)
    named = dict(network.named_parameters())
    losses = cross_entropy(network(images), labels, reduction="none")
    gradients = torch.autograd.grad((weights * losses).sum(), list(named.values()), create_graph=True)
    moved = {key: p.detach() - rate * gradient for (key, p), gradient in zip(named.items(), gradients, strict=True)}
    buffers = {key: buffer.clone() for key, buffer in network.named_buffers()}
    loss = cross_entropy(functional_call(network, moved | buffers, (images,)), labels)
    (found,) = torch.autograd.grad(loss, weights, retain_graph=True)
    after = torch.autograd.grad(loss, list(moved.values()), retain_graph=True)
    for number in range(4):
        of_sample = torch.autograd.grad(losses[number], list(named.values()), retain_graph=True)
        products = [rate * (one.double() * other.double()) for one, other in zip(of_sample, after, strict=True)]
        size_of_sum = sum(float(product.square().sum()) for product in products) ** 0.5
        assert float(found[number]) == pytest.approx(-sum(float(p.sum()) for p in products), rel=1e-3, abs=1e-3 * size_of_sum)


def test_convolutions_start_from_he_and_norms_from_one() -> None:
    for name in ("resnet18", "preact-resnet18", "wrn-28-10"):
        for module in make(name).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 1e4:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()


@pytest.mark.parametrize("name", QUICK)
def test_two_networks_start_differently(name: str) -> None:
    assert not any(
        torch.equal(one, other)
        for one, other in zip(make(name).parameters(), make(name).parameters(), strict=True)
        if one.ndim > 1
    )


def test_torchvision_and_timm_are_imported_where_they_are_used() -> None:
    code = """
import sys
from models import make_model
make_model("resnet18", in_channels=3, image_size=8, num_classes=10, dropout=0.0)
assert not {"torchvision", "timm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown model 'x'; known are mlp, small-cnn, cnn8, [a-z0-9, :-]*$"):
        make_model("x", in_channels=1, image_size=8, num_classes=10, dropout=0.0)

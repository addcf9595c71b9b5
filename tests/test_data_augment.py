"""Batched augmentation against torchvision, sample by sample for equal parameters and by frequency for what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from data import augment
from data.views import VIEWS, make_views


def random_images(num_images: int, channels: int = 3, height: int = 16, width: int = 0, seed: int = 0) -> Tensor:
    drawn = torch.randint(256, (num_images, channels, height, width or height), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def copies(num_images: int, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return random_images(1, channels, size, seed=seed).expand(num_images, -1, -1, -1)


def spread(low: float, high: float, num: int, seed: int = 1) -> Tensor:
    """Values for ``num`` samples, both ends among them."""
    values = low + (high - low) * torch.rand(num, generator=torch.Generator().manual_seed(seed))
    values[:2] = torch.tensor([low, high])
    return values


def each(function: Callable[..., Tensor], images: Tensor, values: Tensor) -> Tensor:
    return torch.stack([function(image, value) for image, value in zip(images, values.tolist(), strict=True)])


def levels_apart(ours: Tensor, theirs: Tensor) -> Tensor:
    assert ours.dtype == theirs.dtype == torch.uint8
    return (ours.int() - theirs.int()).abs()


def chi_square(counts: Tensor, shares: Tensor | None = None) -> float:
    shares = torch.full((len(counts),), 1 / len(counts)) if shares is None else shares
    expected = counts.sum() * shares.double()
    return float(((counts - expected) ** 2 / expected).sum())


def bound(freedom: int) -> float:
    """Of chi-square at p = 0.001, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def rate_bound(probability: float, num: int) -> float:
    return 4 * (probability * (1 - probability) / num) ** 0.5


# --- levels -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_factors_are_torchvisions(name: str, channels: int) -> None:
    images, change = random_images(80, channels, 12, 20), spread(-1.0, 0.9, 80)
    ours = getattr(augment, name)(images, change)
    theirs = each(getattr(reference, f"adjust_{name}"), images, 1 + change.double())
    # equal here; where the value is whole, another processor's fused multiply-add may cut off a level more
    apart = levels_apart(ours, theirs)
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-4
    assert torch.equal(getattr(augment, name)(images, torch.zeros(80)), images)


def test_hue_is_torchvisions() -> None:
    images, turn = random_images(200), spread(-0.5, 0.5, 200)
    images[:20] = images[:20, :1]  # grey
    images[20:40, 1] = images[20:40, 0]  # two channels are largest or smallest
    images[40:60, 2] = images[40:60, 1]
    images[60:80] = images[60:80] // 128 * 255
    apart = levels_apart(augment.hue(images, turn), each(reference.adjust_hue, images, turn))
    # torchvision goes through saturation and a hue of 0..1, ours does not: the rounding errors differ
    assert apart.max() <= 1
    assert apart.float().mean() < 2e-4
    assert torch.equal(augment.hue(images, torch.zeros(200)), images)


def test_posterize_and_solarize_are_torchvisions() -> None:
    images = random_images(64)
    bits = torch.arange(64) % 8 + 1
    assert torch.equal(augment.posterize(images, bits.float()), each(reference.posterize, images, bits))
    threshold = spread(0, 255, 64)
    threshold[2:8] = torch.tensor([127.0, 128.0, 127.5, 1.0, 254.0, 254.5])
    assert torch.equal(augment.solarize(images, threshold), each(reference.solarize, images, threshold))


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (40, 33)])
def test_histograms_are_torchvisions(name: str, height: int, width: int) -> None:
    images = random_images(60, 3, height, width)
    images[:10] = 60 + images[:10] // 8
    images[10:20, 1] = 77
    images[20:30, :, 1:] = 255
    images[30:40] = images[30:40] // 64 * 64
    images[40:50] = images[40:50].clamp(max=3)
    assert torch.equal(getattr(augment, name)(images), getattr(reference, name)(images))
    grey_images = images[:, :1]
    assert torch.equal(getattr(augment, name)(grey_images), getattr(reference, name)(grey_images))


def test_grey_is_torchvisions_with_its_probability() -> None:
    images = random_images(4000, 3, 4)
    torch.manual_seed(0)
    changed = augment.grey(images, 0.2)
    is_grey = (changed == reference.rgb_to_grayscale(images, 3)).flatten(1).all(dim=1)
    is_same = (changed == images).flatten(1).all(dim=1)
    assert torch.equal(is_grey, ~is_same)
    assert abs(is_grey.float().mean() - 0.2) < rate_bound(0.2, 4000)


@pytest.mark.parametrize("channels", [1, 2])
def test_images_without_colour_keep_their_levels(channels: int) -> None:
    images = random_images(8, channels)
    assert torch.equal(augment.saturation(images, spread(-1, 0.9, 8)), images)
    assert torch.equal(augment.hue(images, spread(-0.5, 0.5, 8)), images)
    assert torch.equal(augment.grey(images, 1.0), images)


@pytest.mark.parametrize("seed", range(6))
def test_colour_jitter_is_torchvisions_in_an_order_per_batch(seed: int) -> None:
    images, reach = random_images(30), (0.4, 0.3, 0.2, 0.1)
    torch.manual_seed(seed)
    ours = augment.colour_jitter(images, reach)
    torch.manual_seed(seed)
    change = (2 * torch.rand(4, 30) - 1) * torch.tensor(reach)[:, None]
    theirs = images
    for number in torch.randperm(4).tolist():
        name = ("brightness", "contrast", "saturation", "hue")[number]
        factors = change[number].double() + (name != "hue")
        theirs = each(getattr(reference, f"adjust_{name}"), theirs, factors)
    apart = levels_apart(ours, theirs)
    assert (apart > 0).float().mean() < 1e-3  # a level that differs before contrast may differ by more after
    assert apart.max() <= 3


def test_colour_jitter_draws_each_factor_uniformly_and_skips_samples() -> None:
    images = torch.full((6000, 3, 4, 4), 150, dtype=torch.uint8)
    torch.manual_seed(0)
    factor = augment.colour_jitter(images, (0.4, 0.0, 0.0, 0.0))[:, 0, 0, 0] / 150
    assert 0.59 < factor.min() < 0.61
    assert 1.39 < factor.max() < 1.41
    assert chi_square(torch.histc(factor, 8, 0.6 - 1 / 300, 1.4 - 1 / 300)) < bound(7)
    changed = augment.colour_jitter(random_images(4000, 3, 4), (0.4, 0.4, 0.4, 0.1), probability=0.8)
    same = (changed == random_images(4000, 3, 4)).flatten(1).all(dim=1)
    assert abs(same.float().mean() - 0.2) < rate_bound(0.2, 4000)


# --- places -----------------------------------------------------------------------------------------------------------------


def test_window_is_a_crop_of_each_sample() -> None:
    images = random_images(40, 2, 9, 13)
    top, left = torch.randint(5, (40,)), torch.randint(6, (40,))
    expected = [reference.crop(image, *place, 5, 8) for image, *place in zip(images, top.tolist(), left.tolist(), strict=True)]
    assert torch.equal(augment.window(images, top, left, 5, 8), torch.stack(expected))


def test_crops_are_uniform_over_those_within_the_image() -> None:
    image = torch.arange(7 * 8, dtype=torch.uint8).view(1, 1, 7, 8)
    torch.manual_seed(0)
    parts = augment.crop(image.expand(9000, -1, -1, -1), 5, 5)
    corner = parts[:, 0, 0, 0].long()
    assert torch.equal(parts, augment.window(image.expand(9000, -1, -1, -1), corner // 8, corner % 8, 5, 5))
    assert corner.unique().tolist() == [8 * row + column for row in range(3) for column in range(4)]
    assert chi_square(corner.bincount()[corner.unique()]) < bound(11)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 8), (8, 9, 5), (9, 8, 4), (11, 7, 6), (10, 10, 7)])
def test_centre_crop_is_torchvisions(height: int, width: int, size: int) -> None:
    images = random_images(3, 2, height, width)
    assert torch.equal(augment.centre_crop(images, size), reference.center_crop(images, [size, size]))


def test_half_of_the_images_are_flipped() -> None:
    images = random_images(4000, 1, 4)
    torch.manual_seed(0)
    changed = augment.flip(images)
    flipped = (changed == reference.horizontal_flip(images)).flatten(1).all(dim=1)
    assert torch.equal(flipped, ~(changed == images).flatten(1).all(dim=1))
    assert abs(flipped.float().mean() - 0.5) < rate_bound(0.5, 4000)
    assert chi_square((2 * flipped[::2] + flipped[1::2]).bincount()) < bound(3)  # neighbours are drawn apart


def test_erase_is_torchvisions_with_its_frequencies() -> None:
    images = random_images(6000, 2, 6).float() + 1
    torch.manual_seed(0)
    changed = augment.erase(images.clone(), 4)
    corner = changed[:, 0].eq(0).flatten(1).int().argmax(dim=1)
    for number in range(50):
        row, column = divmod(int(corner[number]), 6)
        expected = reference.erase(images[number], row, column, 4, 4, torch.zeros(1))
        assert torch.equal(changed[number], expected)
    assert corner.unique().tolist() == [6 * row + column for row in range(3) for column in range(3)]
    assert chi_square(corner.bincount()[corner.unique()]) < bound(8)


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    images, num = torch.zeros(5000, 1, 48, 40, dtype=torch.uint8), 5000
    torch.manual_seed(0)
    ours = torch.stack(augment.draw_boxes(images, (0.2, 1.0), (3 / 4, 4 / 3)), dim=1)
    transform = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    drawn = [transform.make_params([images[0]]) for _ in range(num)]
    theirs = torch.tensor([[sample[name] for name in ("top", "left", "height", "width")] for sample in drawn]).float()

    def features(boxes: Tensor) -> Tensor:
        top, left, height, width = boxes.unbind(dim=1)
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= 48).all()
        assert (left + width <= 40).all()
        area, ratio = height * width, width / height
        return torch.stack([top, left, height, width, area, ratio, top / (49 - height), left / (41 - width)])

    assert len(ours.unique(dim=0)) > 2000
    for mine, other in zip(features(ours), features(theirs), strict=True):
        points = torch.cat([mine, other]).unique()
        below = [(values[:, None] <= points).float().mean(dim=0) for values in (mine, other)]
        assert (below[0] - below[1]).abs().max() < 1.95 * (2 / num) ** 0.5  # Kolmogorov and Smirnov, p = 0.001


def test_boxes_that_cannot_fit_are_the_whole_image() -> None:
    boxes = augment.draw_boxes(random_images(20), (1.0, 1.0), (1.2, 1.3))
    assert [value.unique().tolist() for value in boxes] == [[0], [0], [16], [16]]
    assert torch.equal(augment.resize_boxes(random_images(20), boxes, 16), random_images(20))


@pytest.mark.parametrize("size", [5, 16, 30])
def test_resized_boxes_are_torchvisions_without_antialiasing(size: int) -> None:
    images = random_images(60, 3, 24, 20)
    torch.manual_seed(0)
    boxes = augment.draw_boxes(images, (0.1, 1.0), (3 / 4, 4 / 3))
    ours = augment.resize_boxes(images, boxes, size)
    places = [[int(value) for value in box] for box in zip(*boxes, strict=True)]
    size_of = {"size": [size, size], "antialias": False}
    floats = [reference.resized_crop(image.float(), *place, **size_of) for image, place in zip(images, places, strict=True)]
    assert (ours - torch.stack(floats)).abs().max() < 0.5 + 1e-3
    theirs = [reference.resized_crop(image, *place, **size_of) for image, place in zip(images, places, strict=True)]
    assert levels_apart(ours, torch.stack(theirs)).max() <= 1  # on uint8 torch interpolates with weights of a few bits


# --- policies ---------------------------------------------------------------------------------------------------------------


def operated(image: Tensor, name: str, magnitude: float) -> Tensor:
    transform = v2.RandAugment()
    changed: Tensor = transform._apply_image_or_video_transform(image, name, magnitude, "nearest", transform._fill)
    return changed


def test_magnitudes_are_torchvisions() -> None:
    bins = 31
    table = augment.magnitudes(bins, 33, 20)
    for name, (make, signed) in v2.RandAugment._AUGMENTATION_SPACE.items():
        theirs = make(bins, 33, 20)
        theirs = torch.zeros(bins) if theirs is None else theirs.float()
        ours = table[augment.OPERATIONS.index(name)]
        assert torch.equal(ours, theirs.trunc() if name.startswith("Translate") else theirs), name
        assert signed == (1 <= augment.OPERATIONS.index(name) <= augment._LAST_SIGNED)


def halfway(name: str, magnitude: float, height: int, width: int) -> Tensor:
    """bool [H, W]: where the nearest neighbour is one of two, but for rounding errors."""
    y, x = torch.arange(height).double()[:, None] + 0.5, torch.arange(width).double() + 0.5
    angle = torch.tensor(magnitude, dtype=torch.float64).deg2rad()
    if name == "Rotate":
        x, y = x - width / 2, y - height / 2
        places = [angle.cos() * x - angle.sin() * y + width / 2, angle.sin() * x + angle.cos() * y + height / 2]
    else:
        places = [magnitude * y + x] if name == "ShearX" else [magnitude * x + y]
    return torch.stack([(place - place.round()).abs() < 1e-4 for place in places]).any(dim=0)  # pixels begin at whole numbers


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 32, 32), (3, 24, 13), (3, 4, 4)])
def test_operations_are_torchvisions(channels: int, height: int, width: int) -> None:
    """Every operation at every magnitude and with both signs, shuffled into one batch."""
    table = augment.magnitudes(31, height, width)
    cases = [
        (number, sign * float(table[number, step]))
        for number in range(len(augment.OPERATIONS))
        for step in range(31)
        for sign in ((1, -1) if 1 <= number <= augment._LAST_SIGNED else (1,))
    ]
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(0))
    operation = torch.tensor([number for number, _ in cases])[order]
    magnitude = torch.tensor([value for _, value in cases])[order]
    images = random_images(len(cases), channels, height, width)
    ours = augment.operate(images, operation, magnitude)
    for image, changed, number, amount in zip(images, ours, operation.tolist(), magnitude.tolist(), strict=True):
        name = augment.OPERATIONS[number]
        apart = levels_apart(changed, operated(image, name, amount))
        if name in ("ShearX", "ShearY", "Rotate"):  # torchvision scales coordinates to -1..1 and back, which decides ties
            apart[:, halfway(name, amount, height, width)] = 0
        # levels with a factor are equal here; as above, another processor may round otherwise
        assert apart.max() <= (name in ("Color", "Contrast", "Sharpness")), (name, amount)


def outcomes(images: Tensor, expected: list[tuple[float, Tensor]]) -> tuple[Tensor, Tensor]:
    """How often each of the expected images [C, H, W] was made, and its probability; the same image twice is one."""
    known = torch.stack([image for _, image in expected]).flatten(1)
    known, group = known.unique(dim=0, return_inverse=True)
    shares = torch.zeros(len(known)).index_add_(0, group, torch.tensor([share for share, _ in expected]))
    made, counts = images.flatten(1).unique(dim=0, return_counts=True)
    apart = (made[:, None].int() - known.int()).abs().amax(dim=2)
    assert apart.min(dim=1).values.max() <= 1, "an image that no draw can make"
    return torch.zeros(len(known), dtype=torch.int64).index_add_(0, apart.argmin(dim=1), counts), shares


def agree(counts: Tensor, shares: Tensor) -> bool:
    """Chi-square at p = 0.001; what is rare is counted together."""
    rare = shares * counts.sum() < 8
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        shares = torch.cat([shares[~rare], shares[rare].sum()[None]])
    return chi_square(counts, shares) < bound(len(counts) - 1)


@pytest.mark.parametrize("magnitude", [10, 20, 30])
def test_rand_augment_draws_operations_and_signs_as_torchvision(magnitude: int) -> None:
    images = copies(8000)
    torch.manual_seed(0)
    ours = augment.rand_augment(images, num_ops=1, magnitude=magnitude)
    expected = []
    for name, (make, signed) in v2.RandAugment._AUGMENTATION_SPACE.items():
        steps = make(31, 16, 16)
        value = 0.0 if steps is None else float(steps[magnitude])
        signs = (1, -1) if signed else (1,)
        expected += [(1 / 14 / len(signs), operated(images[0], name, sign * value)) for sign in signs]
    counts, shares = outcomes(ours, expected)
    assert len(counts) > 18
    assert agree(counts, shares)


def test_rand_augment_draws_each_operation_anew() -> None:
    images = random_images(40)
    torch.manual_seed(0)
    twice = augment.rand_augment(images, num_ops=2, magnitude=10)
    torch.manual_seed(0)
    once = augment.rand_augment(images, num_ops=1, magnitude=10)
    assert torch.equal(twice, augment.rand_augment(once, num_ops=1, magnitude=10))
    assert torch.equal(augment.rand_augment(images, num_ops=0), images)


# --- all of them ------------------------------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda images: augment.shift(images, 2),
    "crop": lambda images: augment.crop(images, 12, 12),
    "flip": augment.flip,
    "resized_crop": lambda images: augment.resized_crop(images, 12),
    "grey": lambda images: augment.grey(images, 0.5),
    "colour_jitter": lambda images: augment.colour_jitter(images, (0.4, 0.4, 0.4, 0.1), 0.8),
    "rand_augment": augment.rand_augment,
}
RANDOM |= {
    f"{kind} {name}": view
    for kind in VIEWS
    for name, view in zip(
        ("weak", "strong"), make_views([0.4] * 3, [0.2] * 3, 16, kind, 12 * (kind in ("crop", "imagenet")))[1:], strict=True
    )
}


@pytest.mark.parametrize("name", RANDOM)
def test_samples_are_drawn_apart_from_a_seed_and_images_stay(name: str) -> None:
    function, images = RANDOM[name], random_images(32)
    kept = images.clone()
    torch.manual_seed(5)
    first = function(images)
    assert torch.equal(images, kept)
    assert not torch.equal(function(images), first)
    torch.manual_seed(5)
    assert torch.equal(function(images), first)
    same = function(copies(200))
    neighbours = (same[::2] == same[1::2]).flatten(1).all(dim=1).float().mean()
    assert neighbours < (0.7 if name in ("flip", "grey") else 0.3)


@pytest.mark.parametrize("name", [name for name in RANDOM if name != "crop"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [16, 17])
def test_any_number_of_channels(name: str, channels: int, size: int) -> None:
    if " " in name:  # a view's means belong to its channels
        kind, which = name.split()
        views = make_views([0.4] * channels, [0.2] * channels, size, kind)
        made = views[("plain", "weak", "strong").index(which)](random_images(6, channels, size))
        assert made.shape == (6, channels, size, size)
        assert made.dtype == torch.float32
        assert made.isfinite().all()
    else:
        made = RANDOM[name](random_images(6, channels, size))
        assert made.shape[:2] == (6, channels)
        assert made.dtype == torch.uint8


# --- a device of our own: what would wait for a GPU is refused ---------------------------------------------------------------


class OnDevice(Tensor):
    """Stands for a tensor on a GPU. It says that it is on "meta", the one other device that torch always has."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype, device="meta")
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("outside the device")


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal", "bincount", "_unique2", "unique_dim"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Device(TorchDispatchMode):
    """Runs what happens to such tensors on their values, and refuses what a GPU would refuse or wait for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, OnDevice) for tensor in tensors)
        name, target = function.overloadpacket.__name__, kwargs.get("device")
        goes = target is not None and torch.device(target).type == "meta"
        if there:
            assert name not in WAITS, f"{name} waits for the device"
            assert target is None or goes, f"{name} brings a tensor back from the device"
            for tensor in tensors:
                assert isinstance(tensor, OnDevice) or tensor.dim() == 0, f"{name} mixes host and device"
                assert name not in INDEXES or tensor.dtype not in (torch.bool, torch.uint8), f"{name} by a mask waits"
        elif goes and name == "_to_copy":
            assert kwargs.get("non_blocking"), "a copy to the device that blocks"
        kwargs |= {"device": torch.device("cpu")} if goes else {}
        args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        result = function(*args, **kwargs)
        return tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result) if there or goes else result


@pytest.fixture
def device() -> Iterator[torch.device]:
    with Device():
        yield torch.device("meta")


def mixed(images: Tensor) -> Tensor:
    return images + torch.ones(images.shape)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda images: images.sum().item(),
    "float": lambda images: float(images[0, 0, 0, 0]),
    "if": lambda images: bool((images > 3).any()),
    "mask": lambda images: images[images > 3],
    "mask_set": lambda images: images.float().masked_fill(images > 3, 0.0).index_put_((images > 3,), torch.tensor(1.0)),
    "nonzero": lambda images: images.nonzero(),
    "masked_select": lambda images: images.masked_select(images > 3),
    "cpu": lambda images: images.cpu(),
    "blocking": lambda images: torch.ones(3).to(images.device),
    "mixed": mixed,
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_device_refuses_what_would_wait(name: str, device: torch.device) -> None:
    with pytest.raises(AssertionError, match=r"waits|brings|mixes|blocks"):
        REFUSED[name](OnDevice(random_images(4)))


@pytest.mark.parametrize("name", RANDOM)
def test_nothing_waits_for_the_device(name: str) -> None:
    function, images = RANDOM[name], random_images(40)
    torch.manual_seed(0)
    expected = function(images)
    torch.manual_seed(0)
    with Device():
        made = function(OnDevice(images))
    assert isinstance(made, OnDevice)
    assert torch.equal(made.held, expected)

"""Views against loops over samples, and the frequencies of what is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data import augment
from data.views import VIEWS, make_views

MEAN, STD = (0.3, 0.5), (0.2, 0.4)


def random_images(num_images: int, size: int, seed: int = 0) -> Tensor:
    """uint8 [B, 2, size, size] without a zero, so that what moved in can be told."""
    drawn = torch.randint(1, 256, (num_images, 2, size, size), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def shifted(image: Tensor, reach: int, row: int, column: int) -> Tensor:
    """By padding with pixel value 0 and cropping: [C, H, W]."""
    size = image.shape[-1]
    return functional.pad(image, (reach,) * 4)[:, row : row + size, column : column + size]


def matches(outputs: Tensor, images: Tensor, reach: int, ignore: Tensor | None = None) -> Tensor:
    """bool [B, (2 reach + 1) ** 2]: which shift each output is, off the pixels ``ignore`` [B, 1, H, W]."""
    found = []
    for row in range(2 * reach + 1):
        for column in range(2 * reach + 1):
            expected = normalised(torch.stack([shifted(image, reach, row, column) for image in images]))
            agree = (outputs.double() - expected).abs() < 1e-5
            found.append((agree if ignore is None else agree | ignore).flatten(1).all(dim=1))
    return torch.stack(found, dim=1)


def chi_square(counts: Tensor) -> float:
    expected = counts.double().sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_plain_normalises() -> None:
    images = random_images(4, 8)
    view = make_views(MEAN, STD, 8)[0](images)
    assert view.dtype == torch.float32
    assert torch.allclose(view.double(), normalised(images), atol=1e-5)


@pytest.mark.parametrize(("size", "reach"), [(8, 1), (4, 1), (17, 2)])
def test_weak_is_a_shift_of_each_sample(size: int, reach: int) -> None:
    images = random_images(40, size)
    frozen = images.clone()
    torch.manual_seed(0)
    view = make_views(MEAN, STD, size)[1](images)
    assert view.dtype == torch.float32
    assert torch.equal(images, frozen)
    found = matches(view, images, reach)
    assert found.sum(dim=1).tolist() == [1] * 40
    assert len(found.int().argmax(dim=1).unique()) > 5  # not one shift for the batch


def test_weak_shifts_are_uniform() -> None:
    images = random_images(1, 8).expand(9000, -1, -1, -1)
    torch.manual_seed(0)
    view = make_views(MEAN, STD, 8)[1](images)
    candidates = torch.stack([normalised(shifted(images[0], 1, row, column)) for row in range(3) for column in range(3)])
    same = (view[:, None] - candidates.float()).abs().flatten(2).amax(dim=2) < 1e-4
    assert same.sum(dim=1).eq(1).all()
    assert chi_square(same.sum(dim=0)) < 26.1  # 8 degrees of freedom, p = 0.001


def test_views_follow_the_default_generator() -> None:
    images = random_images(64, 8)
    for view in make_views(MEAN, STD, 8)[1:]:
        torch.manual_seed(3)
        first = view(images)
        assert not torch.equal(view(images), first)
        torch.manual_seed(3)
        assert torch.equal(view(images), first)


@pytest.mark.parametrize(("size", "reach", "side"), [(8, 2, 2), (16, 4, 4), (4, 2, 2)])
def test_strong_is_a_larger_shift_and_one_erased_square(size: int, reach: int, side: int) -> None:
    images = random_images(30, size)
    torch.manual_seed(0)
    view = make_views(MEAN, STD, size)[2](images)
    # random pixels of these means and deviations are never exactly the mean: 0.3 * 255 = 76.5, 0.5 * 255 = 127.5
    erased = view.eq(0).all(dim=1, keepdim=True)
    assert erased.flatten(1).sum(dim=1).tolist() == [side**2] * 30
    for sample in erased[:, 0]:
        rows, columns = sample.nonzero().unbind(dim=1)
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == side - 1
    found = matches(view, images, reach, erased)
    assert found.any(dim=1).all()


def test_strong_shifts_and_squares_are_uniform_and_drawn_apart() -> None:
    images = random_images(1, 8).expand(50_000, -1, -1, -1)
    torch.manual_seed(0)
    view = make_views(MEAN, STD, 8)[2](images)
    erased = view.eq(0).all(dim=1)
    corner = erased.flatten(1).int().argmax(dim=1)
    assert sorted(corner.unique().tolist()) == [8 * row + column for row in range(7) for column in range(7)]
    assert chi_square(torch.bincount(corner)[corner.unique()]) < 84.0  # 48 degrees of freedom, p = 0.001
    shifts = [(row, column) for row in range(5) for column in range(5)]
    candidates = torch.stack([normalised(shifted(images[0], 2, row, column)) for row, column in shifts]).float()
    same = torch.stack(
        [(((view - candidate).abs() < 1e-4) | erased[:, None]).flatten(1).all(dim=1) for candidate in candidates], dim=1
    )
    assert same.sum(dim=1).eq(1).all()
    assert chi_square(same.sum(dim=0)) < 51.2  # 24 degrees of freedom, p = 0.001
    drawn = same.int().argmax(dim=1)
    below, right = drawn // 5 - 2, corner // 8 - 3
    assert abs(torch.corrcoef(torch.stack([below, right]).double())[0, 1]) < 4 / 50_000**0.5


def test_shifts_are_one_block_of_draws_rows_first() -> None:
    """What trials of earlier versions were trained on."""
    images = random_images(20, 8)
    torch.manual_seed(0)
    view = make_views(MEAN, STD, 8)[1](images)
    torch.manual_seed(0)
    corner = torch.randint(3, (2, 20, 1))[:, :, 0].T.tolist()
    expected = torch.stack([shifted(image, 1, row, column) for image, (row, column) in zip(images, corner, strict=True)])
    assert torch.allclose(view.double(), normalised(expected), atol=1e-5)


@pytest.mark.parametrize(("size", "reach"), [(32, 4), (8, 1), (4, 1)])
def test_flip_crop_weak_is_a_shift_and_a_flip_of_each_sample(size: int, reach: int) -> None:
    images = random_images(200, size)
    torch.manual_seed(0)
    plain, weak, _ = make_views(MEAN, STD, size, "flip-crop")
    assert torch.equal(plain(images), make_views(MEAN, STD, size)[0](images))
    view = weak(images)
    straight, mirrored = matches(view, images, reach), matches(view.flip(3), images, reach)
    assert (straight.sum(dim=1) + mirrored.sum(dim=1)).tolist() == [1] * 200
    assert 70 < mirrored.sum() < 130  # of 200 halves, 4 deviations
    rows = (straight | mirrored).int().argmax(dim=1) // (2 * reach + 1)
    assert rows.unique().tolist() == list(range(2 * reach + 1))


def test_flip_crop_strong_is_weak_then_two_operations_of_magnitude_10_and_a_square() -> None:
    images = torch.cat([random_images(50, 32), random_images(50, 32, seed=1)[:, :1]], dim=1)
    means, deviations = (0.3, 0.5, 0.7), (0.2, 0.4, 0.3)
    plain, weak, strong = make_views(means, deviations, 32, "flip-crop")
    torch.manual_seed(0)
    view = strong(images)
    torch.manual_seed(0)
    moved = augment.flip(augment.shift(images, 4))
    changed = plain(augment.rand_augment(moved, num_ops=2, magnitude=10, bins=31))
    # means times 255 are no whole numbers, so that 0 is where the square is
    erased = view.eq(0).all(dim=1)
    for sample in erased:
        rows, columns = sample.nonzero().unbind(dim=1)
        assert len(rows) == 256
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 15
    assert torch.equal(view, changed.masked_fill(erased[:, None], 0.0))
    torch.manual_seed(0)
    assert torch.equal(weak(images), plain(moved))


@pytest.mark.parametrize(("size", "input_size"), [(12, 9), (9, 6), (16, 16), (5, 4)])
def test_imagenet_plain_is_the_middle_and_weak_any_part(size: int, input_size: int) -> None:
    images = random_images(1, size).expand(1500, -1, -1, -1)
    plain, weak, strong = make_views(MEAN, STD, size, "imagenet", input_size)
    margin = size - input_size
    parts = images[:1].unfold(2, input_size, 1).unfold(3, input_size, 1).flatten(2, 3)[0].transpose(0, 1)
    middle = round(margin / 2)
    assert torch.allclose(plain(images[:1])[0].double(), normalised(parts[middle * (margin + 1) + middle]), atol=1e-5)
    torch.manual_seed(0)
    view = weak(images)
    candidates = normalised(torch.cat([parts, parts.flip(3)])).float()
    same = (view[:, None] - candidates).abs().flatten(2).amax(dim=2) < 1e-4
    assert same.sum(dim=1).eq(1).all()
    assert chi_square(same.sum(dim=0)) < {2: 10.8, 8: 26.1, 32: 62.5}[len(candidates)]  # p = 0.001
    assert strong(images[:4]).shape == (4, 2, input_size, input_size)


def test_imagenet_without_an_input_size_keeps_that_of_the_images() -> None:
    images = random_images(3, 8)
    for view, other in zip(make_views(MEAN, STD, 8, "imagenet"), make_views(MEAN, STD, 8, "imagenet", 8), strict=True):
        torch.manual_seed(0)
        made = view(images)
        torch.manual_seed(0)
        assert torch.equal(made, other(images))
        assert made.shape == images.shape


def test_imagenet_strong_draws_colours_with_its_probabilities() -> None:
    """On images of one colour, which no crop and no flip changes."""
    colour = torch.tensor([120, 90, 60], dtype=torch.uint8)
    images = colour[:, None, None].expand(6000, 3, 8, 8)
    strong = make_views((0.0,) * 3, (1.0,) * 3, 8, "imagenet", 6)[2]
    torch.manual_seed(0)
    made = (255 * strong(images)).round()
    assert (made == made[:, :, :1, :1]).all()
    made = made[:, :, 0, 0]
    is_grey = (made == made[:, :1]).all(dim=1)
    assert abs(is_grey.float().mean() - 0.2) < 4 * (0.2 * 0.8 / 6000) ** 0.5
    assert abs((made == colour).all(dim=1).float().mean() - 0.16) < 4 * (0.16 * 0.84 / 6000) ** 0.5
    # its hue is 30 degrees, which are turned by -36..36 in 0.8 of the cases; past 60 green is the largest
    leads = made[~is_grey].argmax(dim=1).bincount(minlength=3) / (~is_grey).sum()
    assert abs(leads[1] - 0.8 * 6 / 72) < 0.015
    assert leads[2] == 0


def test_imagenet_strong_is_a_resized_part_a_flip_and_colours() -> None:
    images = torch.randint(256, (40, 3, 20, 20), dtype=torch.uint8)
    plain, _, strong = make_views((0.3,) * 3, (0.2,) * 3, 20, "imagenet", 16)
    torch.manual_seed(0)
    view = strong(images)
    torch.manual_seed(0)
    parts = augment.flip(augment.resized_crop(images, 16, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)))
    changed = augment.grey(augment.colour_jitter(parts, (0.4, 0.4, 0.4, 0.1), 0.8), 0.2)
    assert torch.equal(view, plain(changed))


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("size", [4, 5, 8, 28])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_kind_takes_any_size_and_number_of_channels(kind: str, size: int, channels: int) -> None:
    images = torch.randint(256, (7, channels, size, size), dtype=torch.uint8)
    kept = images.clone()
    for view in make_views([0.4] * channels, [0.2] * channels, size, kind):
        made = view(images)
        assert made.shape == images.shape
        assert made.dtype == torch.float32
        assert made.isfinite().all()
        assert torch.equal(images, kept)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'flipped'; known are shift, flip-crop, crop, imagenet"):
        make_views(MEAN, STD, 8, "flipped")
    for kind in ("shift", "flip-crop"):
        with pytest.raises(ValueError, match=rf"'{kind}' keep the size of images, 8; input_size is 6"):
            make_views(MEAN, STD, 8, kind, 6)
        assert make_views(MEAN, STD, 8, kind, 8)[0](random_images(2, 8)).shape == (2, 2, 8, 8)
    with pytest.raises(ValueError, match=r"9 pixels from images of 8"):
        make_views(MEAN, STD, 8, "imagenet", 9)


def test_a_channel_that_never_changes_is_zero() -> None:
    images = torch.randint(256, (4, 2, 8, 8), dtype=torch.uint8)
    images[:, 1] = 7
    plain, weak, strong = make_views([0.5, 7 / 255], [0.25, 0.0], 8)
    assert bool((plain(images)[:, 1].abs() < 1e-6).all())
    assert all(bool(view(images).isfinite().all()) for view in (weak, strong))


@pytest.mark.parametrize(("kind", "input_size"), [("shift", 16), ("crop", 12)])
@pytest.mark.parametrize("view", ["weak", "strong"])
def test_what_never_mirrors_leaves_an_arrow_its_direction(kind: str, input_size: int, view: str) -> None:
    """Brighter to the right before is brighter to the right after, in each of a thousand draws; their twins mirror half."""
    ramp = torch.arange(16, dtype=torch.uint8).mul(12).add(40).expand(1000, 3, 16, 16)

    def share_to_the_right(kind: str) -> float:
        seen = make_views((0.5,) * 3, (0.2,) * 3, 16, kind, input_size)[("plain", "weak", "strong").index(view)](ramp)
        places = torch.arange(input_size) - (input_size - 1) / 2
        # the middle rows and columns, in which nothing has moved in; an erased square is level
        inner = seen.mean(dim=1)[:, :, 4:-4] if kind in ("shift", "flip-crop") else seen.mean(dim=1)
        places = places[4:-4] if kind in ("shift", "flip-crop") else places
        slope = (inner - inner.mean(dim=2, keepdim=True)).mul(places).sum(dim=(1, 2))
        return float((slope > 0).double().mean())

    torch.manual_seed(0)
    twin = {"shift": "flip-crop", "crop": "imagenet"}[kind]
    assert share_to_the_right(kind) == 1.0
    assert 0.4 < share_to_the_right(twin) < 0.6

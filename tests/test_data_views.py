"""Views against loops over samples, and the frequencies of what is drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data.views import make_views

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

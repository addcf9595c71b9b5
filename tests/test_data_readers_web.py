"""ANIMAL-10N, Clothing1M and WebVision, a few images of each in the layout in which they are published."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.cache import open_table
from data.sources import TEST, TRAIN, Options, RawTable, Source, find_source


def save(path: Path, red: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path, "JPEG", quality=95)


def reds(table: RawTable) -> list[int]:
    return torch.cat([block.images for block in table.blocks(range(table.shape[0]))])[:, 0, 0, 0].tolist()


def find(data: str, root: Path) -> Source:
    return find_source(data, Options(root=root))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path_factory.mktemp("cache")))


def refused(data: str, root: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        open_table(find(data, root), fresh=True)
    assert "\n" not in str(caught.value)


def columns(table: RawTable) -> tuple[list[int], list[int], list[int]]:
    """Given labels, truth and split."""
    found: list[Tensor | None] = [table.given, table.truth, table.split]
    given, truth, split = (column.tolist() for column in found if column is not None)
    return given, truth, split


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- ANIMAL-10N -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    for label in range(10):
        save(tmp_path / "ANIMAL-10N" / "raw_image" / "training" / f"{label}_{9 - label:04}.jpg", 10 * label, (64, 64))
    for label in (3, 7):
        save(tmp_path / "ANIMAL-10N" / "raw_image" / "testing" / f"{label}_0.jpg", 200 + label, (64, 64))
    return tmp_path


def test_animal10n(animals: Path) -> None:
    source = find("animal10n", animals)
    table = source.build()
    assert table.shape == (12, 3, 64, 64)
    assert table.classes[3] == "coyote"
    given, truth, split = columns(table)
    assert given == [*range(10), 3, 7]
    assert truth == [-1] * 10 + [3, 7]
    assert split == [TRAIN] * 10 + [TEST] * 2
    assert reds(table) == pytest.approx([*range(0, 100, 10), 203, 207], abs=3)
    assert source.defaults == {"noise": "none", "model": "vgg19-bn", "batch_size": 128, "augmentation": "weak"}
    assert (source.name, source.key, source.views, source.input_size) == ("animal10n", "animal10n", "flip-crop", 0)
    raw = animals / "ANIMAL-10N" / "raw_image"
    for part in ("training", "testing"):
        (raw / part).rename(raw.parent / part)
    raw.rmdir()
    assert columns(find("animal10n", animals).build()) == (given, truth, split)
    before = find("animal10n", animals).stamp()
    (raw.parent / "training" / "0_0009.jpg").rename(raw.parent / "training" / "1_0009.jpg")
    assert find("animal10n", animals).stamp() != before


def test_animal10n_that_is_damaged(animals: Path, tmp_path: Path) -> None:
    refused("animal10n", tmp_path / "none", "there is no folder .*/none/ANIMAL-10N; put it there")
    refused("animal10n:5", animals, "'5' is not allowed after it")
    training = animals / "ANIMAL-10N" / "raw_image" / "training"
    for name in ("10_0.jpg", "cat_0.jpg", "x.jpg"):
        save(training / name, 0, (64, 64))
        refused("animal10n", animals, rf"image .*/{name}: '.*' before the first _ is no label; labels are 0\.\.9$")
        (training / name).unlink()
    (training / "4_0005.jpg").write_bytes(b"")
    refused("animal10n", animals, r"training/4_0005.jpg cannot be read")
    (training.parent / "testing").rename(training.parent / "test")
    refused("animal10n", animals, r"testing is not in .*/raw_image")


# --- Clothing1M -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """Of class c, 3 + c % 2 noisy images and 2 clean ones; one of the noisy ones of class 0 has a clean label, 5, too."""
    folder = tmp_path / "Clothing1M"
    noisy = [(f"images/{row % 10}/{label}/{row}.jpg", label) for row in range(4) for label in range(14) if row < 3 + label % 2]
    clean = [(f"images/9/clean/{label}-{row}.jpg", label) for row in range(2) for label in range(14)]
    for number, (key, _) in enumerate([*noisy, *clean]):
        save(folder / key, 2 * number, (256, 260))
    for name, pairs in (("noisy", noisy), ("clean", [(noisy[0][0], 5), *clean])):
        (folder / f"{name}_label_kv.txt").write_text("".join(f"{key} {label}\n" for key, label in pairs))
    (folder / "noisy_train_key_list.txt").write_text("".join(f"{key}\n" for key, _ in noisy))
    (folder / "clean_test_key_list.txt").write_text("".join(f"{key}\n" for key, _ in clean))
    return tmp_path


def test_clothing1m(clothes: Path) -> None:
    source = find("clothing1m", clothes)
    table = source.build()
    assert table.shape == (3 * 14 + 28, 3, 256, 256)
    assert table.classes[8] == "Down Coat"
    given, truth, split = columns(table)
    assert split == [TRAIN] * 42 + [TEST] * 28
    assert Counter(given[:42]) == dict.fromkeys(range(14), 3)
    assert given[42:] == truth[42:] == [*range(14)] * 2
    assert truth[:42] == [5] + [-1] * 41  # the first noisy image is drawn: all of class 0 are
    assert (source.views, source.input_size, source.key) == ("imagenet", 224, "clothing1m")
    assert source.defaults == {"noise": "none", "model": "resnet50-imagenet", "batch_size": 64, "augmentation": "weak"}
    pixels = reds(table)
    assert pixels == sorted(pixels)  # in the order of the lists


def test_a_subset_of_clothing1m_is_balanced_the_same_each_time_and_part_of_a_larger_one(clothes: Path) -> None:
    found = {}
    for number in (1, 2, 3):
        source = find(f"clothing1m:{number}", clothes)
        assert (source.name, source.key) == (f"clothing1m:{number}", f"clothing1m-{number}")
        table, again = source.build(), source.build()
        given, _, split = columns(table)
        assert Counter(given[: 14 * number]) == dict.fromkeys(range(14), number)
        assert reds(table) == reds(again)
        found[number] = set(reds(table)[: split.count(TRAIN)])
    assert found[1] < found[2] < found[3]
    assert max(Counter(red // 28 for red in found[1]).values()) < 14  # not the first of each class
    refused("clothing1m:4", clothes, "4 per class are too many; T-Shirt has 3$")
    for argument in ("0", "-1", "x", "1.5"):
        refused(
            f"clothing1m:{argument}", clothes, f"'{argument}' is not allowed after it; write clothing1m or clothing1m:PER_CLASS"
        )


def test_clothing1m_without_the_folder_or_the_prefix(clothes: Path) -> None:
    folder, expected = clothes / "Clothing1M", reds(find("clothing1m", clothes).build())
    for path in (folder / "images").iterdir():
        path.rename(folder / path.name)
    (folder / "images").rmdir()
    assert reds(find("clothing1m", clothes).build()) == expected
    for path in folder.glob("*.txt"):
        path.write_text(path.read_text().replace("images/", ""))
    assert reds(find("clothing1m", clothes).build()) == expected


@pytest.mark.parametrize(
    ("file", "old", "new", "match"),
    [
        (
            "noisy_label_kv.txt",
            "images/0/1/0.jpg 1",
            "images/0/1/0.jpg",
            r"noisy_label_kv.txt, line 2: 'images/0/1/0.jpg' is not a path",
        ),
        (
            "noisy_label_kv.txt",
            "images/0/1/0.jpg 1",
            "images/0/1/0.jpg x",
            "noisy_label_kv.txt, line 2: .* a space and a label",
        ),
        ("noisy_label_kv.txt", "images/0/1/0.jpg 1", "", "noisy_label_kv.txt, line 2: '' is not a path"),
        (
            "noisy_label_kv.txt",
            "images/0/1/0.jpg",
            "../../x.jpg",
            "noisy_label_kv.txt, line 2: '../../x.jpg 1' is not a path inside",
        ),
        ("noisy_label_kv.txt", "images/0/1/0.jpg", "images/../x.jpg", "line 2: 'images/../x.jpg 1' is not a path inside"),
        (
            "noisy_label_kv.txt",
            "images/0/1/0.jpg",
            "/etc/x.jpg",
            "noisy_label_kv.txt, line 2: '/etc/x.jpg 1' is not a path inside",
        ),
        (
            "clean_label_kv.txt",
            "13-1.jpg 13",
            "13-1.jpg 14",
            r"clean_label_kv.txt, line 29: label 14 is not allowed; labels are 0\.\.13",
        ),
        (
            "noisy_train_key_list.txt",
            "images/0/2/0.jpg",
            "images/0/2/7.jpg",
            r"list.txt, line 3: 'images/0/2/7.jpg' has no label",
        ),
        ("clean_test_key_list.txt", "0-0.jpg", "\xff", r"line 1: .* has no label"),
    ],
)
def test_clothing1m_with_damaged_lists(file: str, old: str, new: str, match: str, clothes: Path) -> None:
    change(clothes / "Clothing1M" / file, old, new)
    refused("clothing1m", clothes, match)


def test_clothing1m_with_missing_files(clothes: Path) -> None:
    before = find("clothing1m", clothes).stamp()
    images = clothes / "Clothing1M" / "images"
    for row in range(2):
        (images / "9" / "clean" / f"3-{row}.jpg").unlink()
    refused("clothing1m", clothes, "^data set clothing1m: 9/clean/3-0.jpg is missing in .*/images, and 1 more$")
    assert find("clothing1m", clothes).stamp() == before  # of the lists
    change(clothes / "Clothing1M" / "noisy_label_kv.txt", "images/0/1/0.jpg 1\n", "images/0/1/0.jpg 3\n")
    assert find("clothing1m", clothes).stamp() != before
    (clothes / "Clothing1M" / "clean_label_kv.txt").write_bytes(b"a 1\n\xe9 1\n")
    refused("clothing1m", clothes, "clean_label_kv.txt, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8$")
    (clothes / "Clothing1M" / "clean_label_kv.txt").unlink()
    refused("clothing1m", clothes, r"clean_label_kv.txt is not in .*/Clothing1M; it must be there as it is published")


# --- WebVision --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """60 of the thousand classes, an image of each; ILSVRC's folders are in another order than the classes."""
    folder, (train, val) = tmp_path / "WebVision", ([], [])
    (folder / "info").mkdir(parents=True)
    wnids = [f"n{(label * 37) % 60:08}" for label in range(60)]
    for label, wnid in enumerate(wnids):
        train.append(f"google/q{label:04}/a b.jpg {label}\n")
        val.append(f"val{label:06}.jpg {label}\n")
        if label < 50:  # images of other classes are not asked for
            save(folder / "google" / f"q{label:04}" / "a b.jpg", label, (280, 256))
            save(folder / "val_images_256" / f"val{label:06}.jpg", 100 + label, (256, 256))
            save(tmp_path / "ILSVRC2012" / "val" / wnid / f"ILSVRC2012_val_{label:08}.JPEG", 200 + label, (300, 400))
    (folder / "info" / "train_filelist_google.txt").write_text("".join(train))
    (folder / "info" / "val_filelist.txt").write_text("".join(val))
    (folder / "info" / "synsets.txt").write_text("".join(f"{wnid} name {n}, other\n" for n, wnid in enumerate(wnids)))
    return tmp_path


@pytest.mark.parametrize(("data", "base"), [("webvision", 100), ("webvision:ilsvrc12", 200)])
def test_webvision(data: str, base: int, web: Path) -> None:
    source = find(data, web)
    table = source.build()
    assert table.shape == (100, 3, 256, 256)
    assert table.num_classes == 50
    assert table.classes[7] == "name 7"
    given, truth, split = columns(table)
    assert given == [*range(50)] * 2
    assert truth == [-1] * 50 + [*range(50)]
    assert split == [TRAIN] * 50 + [TEST] * 50
    assert reds(table) == pytest.approx([*range(50), *range(base, base + 50)], abs=3)
    assert (source.name, source.key, source.views, source.input_size) == (data, data.replace(":", "-"), "imagenet", 227)
    assert source.defaults == {"noise": "none", "model": "inception-resnet-v2", "batch_size": 32, "augmentation": "weak"}


def test_webvision_that_is_damaged(web: Path, tmp_path: Path) -> None:
    info = web / "WebVision" / "info"
    refused("webvision:imagenet", web, "'imagenet' is not allowed after it; write webvision or webvision:ilsvrc12")
    (web / "WebVision" / "val_images_256" / "val000003.jpg").unlink()
    refused("webvision", web, "WebVision/val_images_256/val000003.jpg is missing in [^,]*$")
    assert find("webvision:ilsvrc12", web).build().shape[0] == 100
    (web / "ILSVRC2012" / "val" / "n00000037" / "ILSVRC2012_val_00000001.JPEG").unlink()
    refused("webvision:ilsvrc12", web, "ILSVRC2012/val holds no images of class 1, n00000037")
    (web / "ILSVRC2012" / "val" / "n00000037").rmdir()
    refused("webvision:ilsvrc12", web, "ILSVRC2012/val holds no images of class 1, n00000037")
    (web / "ILSVRC2012").rename(web / "imagenet")
    refused(
        "webvision:ilsvrc12", web, r"no folder .*/ILSVRC2012/val; put .* there, one folder per WNID, as valprep.sh sorts them"
    )
    for number in range(3):
        save(web / "ILSVRC2012" / "val" / f"ILSVRC2012_val_{number:08}.JPEG", 0, (8, 8))
    flat = r"/ILSVRC2012/val holds 3 images in no folder of a class; it needs one folder per WNID, as valprep.sh sorts them \("
    refused("webvision:ilsvrc12", web, flat)
    change(info / "train_filelist_google.txt", "q0058/a b.jpg 58", "q0058/a b.jpg 1058")
    refused("webvision", web, r"train_filelist_google.txt, line 59: label 1058 is not allowed; labels are 0\.\.999")
    change(info / "synsets.txt", "n00000014", "14")
    refused("webvision", web, "synsets.txt, line 3: '14' is no WNID")
    (info / "synsets.txt").write_text("n00000000 x\n")
    refused("webvision", web, "synsets.txt has 1 lines; at least 50 are needed")
    (info / "val_filelist.txt").unlink()
    refused("webvision", web, r"val_filelist.txt is not in .*/info")


def test_lists_as_other_programs_save_them(web: Path) -> None:
    """With a byte order mark, in UTF-16, or with the ends of lines that Windows has; and what is packed is called so."""
    before = find("webvision", web).build()
    info = web / "WebVision" / "info"
    lists = ("train_filelist_google.txt", "val_filelist.txt", "synsets.txt")
    texts = {name: (info / name).read_text() for name in lists}
    for encoding, end in (("utf-8-sig", "\n"), ("utf-16", "\n"), ("utf-8", "\r\n"), ("utf-16", "\r\n")):
        for name, text in texts.items():
            (info / name).write_bytes(text.replace("\n", end).encode(encoding))
        table = find("webvision", web).build()
        assert table.classes == before.classes
        assert columns(table) == columns(before)
        assert find("webvision", web).stamp() != ""
    (info / "synsets.txt").write_bytes(gzip.compress(texts["synsets.txt"].encode()))
    refused("webvision", web, r"info/synsets.txt is compressed \(gzip\); unpack it first$")

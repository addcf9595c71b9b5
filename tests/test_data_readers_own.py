"""A user's own images: folders, manifests, sizes, and damage that is named."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.cache import open_table
from data.readers import images as reader
from data.sources import TEST, TRAIN, VALIDATION, Options, RawTable, find_source

NO_IMAGE = "it is no PNG, JPEG, BMP, WEBP or GIF image"
COLOURS = {"cat": (200, 10, 30), "dog": (20, 180, 60), "eel": (5, 60, 250)}


def save(path: Path, colour: tuple[int, int, int] = (9, 9, 9), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def decoded(table: RawTable, start: int = 0) -> Tensor:
    return torch.cat(list(table.blocks(start)))


def refused(data: str, match: str, **options: int) -> None:
    """Somewhere on the way from the name to the last image there is a ValueError of one line."""
    with pytest.raises(ValueError, match=match) as caught:
        decoded(find_source(data, Options(**options)).build())
    assert "\n" not in str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Two cats, one of them in a folder of its own, a dog and an eel, and what is not an image."""
    top = tmp_path / "animals"
    save(top / "dog" / "a.BMP", COLOURS["dog"])
    save(top / "cat" / "2.png", COLOURS["cat"])
    save(top / "cat" / "young" / "1.webp", COLOURS["cat"])
    save(top / "eel" / "x.jpeg", COLOURS["eel"])
    save(top / ".hidden" / "y.png")
    for name in ("cat/notes.txt", "cat/.hidden.png", "README"):
        (top / name).write_text("no image")
    return top


def test_a_folder_per_class(animals: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = find_source(f"folder:{animals}")
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        table = source.build()
    (record,) = caplog.records
    assert record.getMessage() == f"data set folder:{animals}: files that are no images are left out: 2"
    assert table.classes == ("cat", "dog", "eel")
    assert table.given is not None
    assert table.given.tolist() == [0, 0, 1, 2]
    assert table.truth is None
    assert table.split is None
    assert table.shape == (4, 3, 8, 8)
    found = decoded(table)
    assert found.dtype == torch.uint8
    for image, name in zip(found, ("cat", "cat", "dog", "eel"), strict=True):
        exact = image.int() - torch.tensor(COLOURS[name])[:, None, None]
        assert int(exact.abs().max()) <= 6  # JPEG and WebP are lossy


def test_what_a_folder_brings(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(f"folder:{animals}")
    assert source.name == f"folder:{animals}"
    assert re.fullmatch("folder-animals-[0-9a-f]{8}", source.key)
    assert source.stream == "folder"
    assert source.defaults == {"noise": "none", "model": "small-cnn", "batch_size": 128, "augmentation": "weak"}
    assert (source.views, source.input_size, source.image_size) == ("flip-crop", 0, 8)
    again = find_source(source.name, Options(image_size=source.image_size))  # as a trial does
    assert (again.key, again.defaults, again.views) == (source.key, source.defaults, source.views)
    assert find_source(source.name, Options(image_size=9)).key != source.key
    monkeypatch.chdir(animals.parent)
    assert find_source("folder:animals/../animals/").name == source.name
    monkeypatch.setenv("HOME", str(animals.parent))
    assert find_source("folder:~/animals").key == source.key


def test_a_folder_that_is_split(tmp_path: Path) -> None:
    for name in ("train/dog/1.png", "train/cat/1.png", "train/cat/2.png", "val/cat/3.png", "test/dog/4.png"):
        save(tmp_path / name)
    table = find_source(f"folder:{tmp_path}").build()
    assert table.classes == ("cat", "dog")
    assert table.split is not None
    assert table.given is not None
    assert table.truth is not None
    assert table.split.tolist() == [TRAIN, TRAIN, TRAIN, VALIDATION, TEST]
    assert table.given.tolist() == [0, 0, 1, 0, 1]
    assert table.truth.tolist() == [-1, -1, -1, -1, 1]  # a test label is taken to be clean, no other is


def test_a_folder_that_is_refused(tmp_path: Path) -> None:
    refused("folder:", "^data set folder needs a path; write folder:PATH$")
    refused(f"folder:{tmp_path}/none", "none: there is no such folder$")
    refused(f"folder:{tmp_path}", "has no class folders")
    save(tmp_path / "one" / "cat" / "1.png")
    refused(f"folder:{tmp_path}/one", "there must be at least two classes, not 1")
    (tmp_path / "one" / "dog").mkdir()
    (tmp_path / "one" / "dog" / "1.gif").write_text("")
    refused(f"folder:{tmp_path}/one", r"class folder .*/one/dog holds no images \(.png, .jpg, .jpeg, .bmp, .webp\)")
    save(tmp_path / "two" / "test" / "cat" / "1.png")
    save(tmp_path / "two" / "val" / "cat" / "1.png")
    refused(f"folder:{tmp_path}/two", "two has val, test, but no train")
    for name in ("cat", "dog"):
        save(tmp_path / "two" / "train" / name / "1.png")
    save(tmp_path / "two" / "test" / "dogs" / "1.png")
    refused(f"folder:{tmp_path}/two", r"class folder .*/two/test/dogs: 'dogs' is not in train \(did you mean 'dog'\?\)")
    (tmp_path / "one" / "dog" / "2.png").symlink_to("nowhere.png")
    refused(f"folder:{tmp_path}/one", "dog/2.png is missing")


def test_links_of_a_folder_stay_inside_it(animals: Path) -> None:
    data = f"folder:{animals}"
    save(animals.parent / "secret.png")
    link = animals / "cat" / "zlink.png"
    link.symlink_to(animals.parent / "secret.png")
    refused(data, r"'cat/zlink.png' leads out of .*; images must lie in that folder$")
    link.unlink()
    link = animals / "cat" / "zlink"
    link.symlink_to(animals.parent)
    refused(data, "cat/zlink is a link to a folder that it lies in$")
    link.unlink()
    other = animals.parent / "other"
    save(other / "1.png")
    link.symlink_to(other)
    refused(data, r"'cat/zlink/1.png' leads out of ")
    link.unlink()
    link.symlink_to("../dog")
    assert len(decoded(find_source(data).build())) == 5


# --- manifests --------------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str, name: str = "list.csv") -> str:
    (folder / name).write_text(text, "utf-8")
    return f"manifest:{folder / name}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(5):
        save(tmp_path / "sub" / f"{number}.png", (10 * number, 0, 0))
    return tmp_path


def test_a_manifest_with_all_columns_in_any_order(pictures: Path) -> None:
    text = (
        "\ufeffsplit,truth, label,path\r\n"
        "train,,dog,sub/3.png\r\n"
        'val,cat,dog,"sub/1.png"\r\n'
        "\r\n"
        "train,dog,cat,./sub/0.png\r\n"
        "train,,eel,sub/2.png\r\n"
        "test,cat,dog,sub/4.png\r\n"
    )
    source = find_source(write(pictures, text))
    table = source.build()
    assert table.classes == ("cat", "dog", "eel")
    assert (table.given, table.truth, table.split) != (None, None, None)
    assert table.given is not None
    assert table.truth is not None
    assert table.split is not None
    assert table.given.tolist() == [1, 1, 0, 2, 1]
    assert table.truth.tolist() == [-1, 0, 1, -1, 0]
    assert table.split.tolist() == [TRAIN, VALIDATION, TRAIN, TRAIN, TEST]
    assert decoded(table)[:, 0, 0, 0].tolist() == [30, 10, 0, 20, 40]
    assert re.fullmatch("manifest-list-[0-9a-f]{8}", source.key)
    assert source.stream == "manifest"


def test_a_manifest_of_integers_is_in_numerical_order(pictures: Path) -> None:
    table = find_source(write(pictures, "path,label,truth\nsub/0.png,10,9\nsub/1.png,9,\nsub/2.png,010,\n")).build()
    assert table.classes == ("9", "10")
    assert table.given is not None
    assert table.truth is not None
    assert table.given.tolist() == [1, 0, 1]
    assert table.truth.tolist() == [0, -1, -1]
    names = find_source(write(pictures, "path,label\nsub/0.png,10\nsub/1.png,9\nsub/2.png,x\n", "b.csv")).build()
    assert names.classes == ("10", "9", "x")


def test_a_manifest_without_truth_has_none(pictures: Path) -> None:
    rows = "sub/0.png,a{0}\nsub/1.png,b{0}\n"
    assert find_source(write(pictures, "path,label\n" + rows.format(""))).build().truth is None
    split = "path,label,truth,split\n" + rows.format(",,train")
    assert find_source(write(pictures, split + "sub/2.png,a,,val\n")).build().truth is None
    truth = find_source(write(pictures, split + "sub/2.png,b,,test\n")).build().truth
    assert truth is not None
    assert truth.tolist() == [-1, -1, 1], "a test row's label is its clean one"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty; its first line must name the columns: path, label, truth, split"),
        ("path,label\n", "has no rows"),
        (
            "path,lable\nsub/0.png,a\n",
            r"column 'lable' is not known \(did you mean 'label'\?\); allowed are path, label, truth",
        ),
        ("path,label,weight\n", "column 'weight' is not known; allowed"),
        ("path,label,label\nsub/0.png,a,a\n", "column 'label' is there 2 times"),
        ("path,truth\nsub/0.png,a\n", "column 'label' is there 0 times"),
        ("path,label\nsub/0.png,a\nsub/1.png\n", "line 3: 1 cells; the header has 2"),
        ("path,label\nsub/0.png,a\nsub/1.png,b,c\n", "line 3: 3 cells; the header has 2"),
        ("path,label\nsub/0.png,a\nsub/1.png,\n", "line 3: path and label must not be empty"),
        ("path,label\nsub/0.png,a\n,b\n", "line 3: path and label must not be empty"),
        ("path,label\nsub/0.png,a\nsub/1.png,a\n", "there must be at least two classes, not 1"),
        ("path,label\nsub/0.png,0\nsub/1.png,-1\n", "label -1 is not allowed; integers must not be negative"),
        ("path,label\nsub/0.png,a\nsub/0.png,b\n", "line 3: 'sub/0.png' is listed twice"),
        ("path,label\nsub/0.png,a\n./sub/0.png,b\n", "line 3: './sub/0.png' is listed twice, first as 'sub/0.png'"),
        (
            "path,label,truth\nsub/0.png,cat,cta\nsub/1.png,dog,\n",
            r"line 2: truth 'cta' is not one of the labels \(did you mean",
        ),
        ("path,label,truth\nsub/0.png,0,2\nsub/1.png,1,\n", "line 2: truth '2' is not one of the labels"),
        (
            "path,label,split\nsub/0.png,a,train\nsub/1.png,b,Test\n",
            r"line 3: split 'Test' is not allowed \(did you mean 'test'\?\)",
        ),
        ("path,label,split\nsub/0.png,a,train\nsub/1.png,b,\n", "line 3: split '' is not allowed; write one of train, val"),
        ("path,label,split\nsub/0.png,a,test\nsub/1.png,b,val\n", "has no training rows"),
        (
            "path,label,split\nsub/0.png,cat,train\nsub/1.png,dog,train\nsub/2.png,dgo,test\n",
            r"line 4: label 'dgo' is in no training row \(did you mean 'dog'\?\)",
        ),
        ("path,label,split\nsub/0.png,0,train\nsub/1.png,1,train\nsub/2.png,2,val\n", "line 4: label '2' is in no training"),
        ("path,label,split\nsub/0.png,a,train\nsub/1.png,a,train\nsub/2.png,a,test\n", "at least two classes, not 1"),
        ("path,label\nsub/0.png,a\nsub/8.png,b\nsub/9.png,b\nsub/1.png/x,b\n", "sub/8.png is missing in .*, and 2 more$"),
        ("path,label\nsub/0.png,a\nsub/8.png,b\n", "sub/8.png is missing in [^,]*$"),
        ('path,label\nsub/0.png,"a\n', "after line 2: unexpected end of data"),
    ],
)
def test_a_manifest_that_is_refused(text: str, match: str, pictures: Path) -> None:
    refused(write(pictures, text), match)


def test_a_manifest_in_another_encoding_or_none_at_all(pictures: Path) -> None:
    (pictures / "latin.csv").write_bytes("path,label\nsub/0.png,é\nsub/1.png,b\n".encode("latin1"))
    refused(f"manifest:{pictures / 'latin.csv'}", "latin.csv, after line .*utf-8")
    refused("manifest:", "needs a path; write manifest:FILE.csv")
    refused(f"manifest:{pictures / 'none.csv'}", "none.csv: there is no such file")
    refused(f"manifest:{pictures}", "there is no such file")


@pytest.mark.parametrize(
    "path", ["../secret.png", "sub/../../secret.png", "{top}/sub/4.png", "link.png", "out/secret.png", "a\0"]
)
def test_a_path_that_leaves_the_folder_is_refused(path: str, pictures: Path) -> None:
    save(pictures / "secret.png")
    inner = pictures / "inner"
    for number in range(2):
        save(inner / "sub" / f"{number}.png")
    (inner / "link.png").symlink_to(pictures / "secret.png")
    (inner / "out").symlink_to(pictures)
    path = path.format(top=inner)
    text = f"path,label\nsub/0.png,a\nsub/1.png,b\n{path},b\n"
    said = (
        "is not allowed; write paths from .*/inner on" if path.startswith("/") else "leads out of .*/inner; images must lie in"
    )
    refused(write(inner, text), f"line 4: .* {said}")
    refused(write(inner, f"path,label\n{path},b\nsub/1.png,a\n"), f"line 2: .* {said}")  # before it is looked at


def test_links_within_the_folder_and_a_linked_folder_are_fine(pictures: Path) -> None:
    (pictures / "alias").symlink_to("sub")
    (pictures / "one.png").symlink_to("sub/1.png")
    write(pictures, "path,label\nalias/3.png,a\none.png,b\nsub/../sub/2.png,b\n")
    linked = pictures.parent / f"{pictures.name}-link"
    linked.symlink_to(pictures)
    assert decoded(find_source(f"manifest:{linked}/list.csv").build())[:, 0, 0, 0].tolist() == [30, 10, 20]


BOMB = """
import sys
from pathlib import Path
from PIL import Image
from data.readers.images import decode

Image.MAX_IMAGE_PIXELS = 1000
for side in (40, 60):
    Image.new("L", (side, side)).save("large.png")
    try:
        print(decode("large.png", 1, 8).shape)
    except ValueError as error:
        print(error)
"""


def test_a_large_image_is_read_without_a_word_and_a_far_too_large_one_refused(tmp_path: Path) -> None:
    """In a process of its own: pytest has warnings of its own. PIL warns from its limit on, and refuses twice as much."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", BOMB]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    read, refused_with = done.stdout.splitlines()
    assert (read, done.stderr) == ("(8, 8)", "")
    assert re.match(r"image large.png cannot be read \(Image size \(3600 pixels\) exceeds limit", refused_with)


# --- what has changed -------------------------------------------------------------------------------------------------------


def test_the_stamp_sees_every_change(pictures: Path, animals: Path) -> None:
    text = "path,label,truth\nsub/0.png,a,\nsub/1.png,b,\n"
    data = write(pictures, text)
    stamps = [find_source(data).stamp()]
    assert find_source(data).stamp() == stamps[0]
    for changed in (
        text.replace("1.png", "2.png"),
        text.replace(",b", ",c"),
        text.replace("a,\n", "a,b\n"),
        text + "sub/3.png,a,\n",
    ):
        write(pictures, changed)
        stamps.append(find_source(data).stamp())
    write(pictures, text)
    os.utime(pictures / "sub" / "1.png", (1, 1))
    stamps.append(find_source(data).stamp())
    assert len(set(stamps)) == 6
    (pictures / "sub" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"sub/1\.png is missing"):
        find_source(data).stamp()
    before = find_source(f"folder:{animals}").stamp()
    (animals / "eel" / "x.jpeg").rename(animals / "dog" / "x.jpeg")
    save(animals / "eel" / "y.png")
    assert find_source(f"folder:{animals}").stamp() != before


def test_a_changed_image_is_read_again(
    pictures: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path_factory.mktemp("cache")))
    data = write(pictures, "path,label\nsub/0.png,a\nsub/1.png,b\n")
    assert open_table(find_source(data), fresh=True).images[:, 0, 0, 0].tolist() == [0, 10]
    save(pictures / "sub" / "1.png", (77, 0, 0))
    assert open_table(find_source(data), fresh=True).images[:, 0, 0, 0].tolist() == [0, 77]


# --- pixels -----------------------------------------------------------------------------------------------------------------


def test_the_size_is_that_of_the_first_image_at_most_224(tmp_path: Path) -> None:
    def shape(name: str, size: tuple[int, int], **options: int) -> tuple[tuple[int, ...], str, int, object]:
        for label in "ab":
            save(tmp_path / name / label / "1.png", size=size)
        source = find_source(f"folder:{tmp_path / name}", Options(**options))
        return source.build().shape, source.views, source.input_size, source.defaults["model"]

    assert shape("tiny", (20, 30)) == ((2, 3, 20, 20), "flip-crop", 0, "small-cnn")
    assert shape("small", (64, 70)) == ((2, 3, 64, 64), "flip-crop", 0, "small-cnn")
    assert shape("middle", (91, 70)) == ((2, 3, 80, 80), "imagenet", 70, "resnet50-imagenet")
    assert shape("large", (700, 500)) == ((2, 3, 256, 256), "imagenet", 224, "resnet50-imagenet")
    assert shape("chosen", (700, 500), image_size=48) == ((2, 3, 48, 48), "flip-crop", 0, "small-cnn")


def test_an_image_of_the_size_is_not_changed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for name, image in zip("ab", pixels, strict=True):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "1.png")
    found = decoded(find_source(f"folder:{tmp_path}").build())
    assert (found.permute(0, 2, 3, 1).numpy() == pixels).all()


@pytest.mark.parametrize("size", [(40, 100), (101, 40)])
def test_other_images_are_resized_by_the_shorter_side_and_cropped_in_the_middle(size: tuple[int, int], tmp_path: Path) -> None:
    from torchvision.transforms import v2

    ramp = np.add.outer(np.arange(size[1]), 1.3 * np.arange(size[0])).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=2))
    image.save(tmp_path / "x.png")
    found = reader.decode(str(tmp_path / "x.png"), 3, 20).astype(int)
    expected = np.asarray(v2.Compose([v2.Resize(20), v2.CenterCrop(20)])(image)).astype(int)
    inner = np.abs(found - expected)[1:-1, 1:-1]  # at the border torchvision's resize still sees what it then cuts off
    assert np.median(inner) <= 1
    assert np.abs(found - expected).mean() < 3


def test_a_large_photograph_is_decoded_at_a_part_of_its_size(tmp_path: Path) -> None:
    ramp = np.add.outer(np.linspace(0, 120, 1600), np.linspace(0, 120, 2400)).astype(np.uint8)
    Image.fromarray(np.stack([ramp, ramp, ramp], axis=2)).save(tmp_path / "x.jpg")
    Image.open(tmp_path / "x.jpg").convert("RGB").save(tmp_path / "x.png")
    whole, part = (reader.decode(str(tmp_path / name), 3, 100).astype(int) for name in ("x.png", "x.jpg"))
    assert np.abs(whole - part).max() <= 2


def test_greyscale_stays_so_unless_there_is_colour(tmp_path: Path) -> None:
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    for name, mode in (("a", "L"), ("b", "1"), ("c", "LA")):
        save(tmp_path / name / "1.png", (200, 200, 200), mode=mode)
    (tmp_path / "d").mkdir()
    deep.save(tmp_path / "d" / "1.png")
    assert Image.open(tmp_path / "d" / "1.png").mode == "I;16"
    table = find_source(f"folder:{tmp_path}").build()
    assert table.shape == (4, 1, 8, 8)
    found = decoded(table)
    assert found[:3, 0, 0, 0].tolist() == [200, 255, 200]
    assert found[3].flatten().tolist() == [value * 1000 >> 8 for value in range(64)]
    save(tmp_path / "d" / "2.png", (255, 0, 51), mode="P")  # a palette is colour
    coloured = find_source(f"folder:{tmp_path}").build()
    assert coloured.shape == (5, 3, 8, 8)
    assert decoded(coloured)[0, :, 0, 0].tolist() == [200, 200, 200]
    assert decoded(coloured)[4, :, 0, 0].tolist() == [255, 0, 51]


def test_transparency_is_dropped(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / name / "1.png")
    assert decoded(find_source(f"folder:{tmp_path}").build())[0, :, 0, 0].tolist() == [1, 2, 3]


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RawTable:
    """30 images in blocks of 4."""
    for number in range(30):
        save(tmp_path / "ab"[number % 2] / f"{number:02}.png", (number, 0, 0))
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4 * 3 * 8 * 8)
    monkeypatch.setattr(reader, "num_processors", lambda: 3)
    return find_source(f"folder:{tmp_path}").build()


def test_images_come_in_order_from_any_row_on(many: RawTable) -> None:
    order = [*range(0, 30, 2), *range(1, 30, 2)]
    assert [len(block) for block in many.blocks(0)] == [4] * 7 + [2]
    for start in (0, 1, 4, 13, 29):
        assert decoded(many, start)[:, 0, 0, 0].tolist() == order[start:]


def test_no_more_than_a_few_blocks_wait(many: RawTable, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    decode = reader.decode

    def counted(path: str, channels: int, size: int) -> object:
        read.append(path)
        return decode(path, channels, size)

    monkeypatch.setattr(reader, "decode", counted)
    blocks = many.blocks(0)
    assert read == []
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]  # it is a generator
    assert 4 <= len(read) <= (2 * 3 + 1) * 4


def test_memory_is_bounded(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "0.bmp", size=(256, 256))
        for number in range(1, 60):
            (tmp_path / name / f"{number}.bmp").hardlink_to(tmp_path / name / "0.bmp")
    table = find_source(f"folder:{tmp_path}", Options(image_size=224)).build()
    tracemalloc.start()
    count = sum(len(block) for block in table.blocks(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 120
    assert peak < (2 * (os.cpu_count() or 1) + 3) * reader.BLOCK_BYTES


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("x.jpg", lambda whole: whole[: len(whole) // 2], "Truncated File Read"),
        ("x.jpg", lambda whole: whole[:-9], "image file is truncated"),
        ("x.png", lambda whole: whole[: len(whole) // 2], "truncated"),
        ("x.bmp", lambda whole: whole[:-9], "truncated"),
        ("x.webp", lambda whole: whole[:-9], "could not create decoder"),
        ("x.png", lambda whole: b"", NO_IMAGE),
        ("x.png", lambda whole: b"<html>404</html>", NO_IMAGE),
        (
            "x.png",
            lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
            NO_IMAGE,
        ),
        ("x.png", lambda whole: whole[:50] + bytes(8) + whole[58:], "broken|no image"),
    ],
)
def test_a_damaged_image_is_named(name: str, damage: object, match: str, tmp_path: Path) -> None:
    for label in "ab":
        save(tmp_path / label / "0.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b" / name)
    assert len(decoded(find_source(f"folder:{tmp_path}").build())) == 3
    (tmp_path / "b" / name).write_bytes(damage((tmp_path / "b" / name).read_bytes()))  # type: ignore[operator]
    refused(f"folder:{tmp_path}", f"^image {tmp_path}/b/{name} cannot be read .*{match}")
    (tmp_path / "a" / "0.png").write_bytes(b"")
    refused(
        f"folder:{tmp_path}", f"^image {tmp_path}/a/0.png cannot be read .it is no PNG, .* or GIF image.$"
    )  # already by the name


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Train", "Dev", "Test"), ("training", "validation", "testing")])
def test_split_folders_by_their_usual_names(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        for number, kind in enumerate(("ant", "bee")):
            (tmp_path / name / kind).mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / kind / "0.png")
    table = find_source(f"folder:{tmp_path}").build()
    assert table.classes == ("ant", "bee")
    assert table.split is not None
    assert table.split.tolist() == [TRAIN, TRAIN, VALIDATION, VALIDATION, TEST, TEST]
    (tmp_path / "__MACOSX" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"has {names[0]} and __MACOSX; write train, val, validation, test above the classes"):
        find_source(f"folder:{tmp_path}", Options(image_size=8)).build()

"""A user's own images: folders, manifests, sizes, and damage that is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.cache import open_table
from data.sources import TEST, TRAIN, VALIDATION, Options, find_source
from tests.image_files import COLOURS, decoded, refused, save, write

NO_IMAGE = "it is no PNG, JPEG, BMP, WEBP or GIF image"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path_factory.mktemp("cache")))


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


def test_a_folder_per_class(animals: Path) -> None:
    source = find_source(f"folder:{animals}")
    table = source.build()
    assert table.left_out == {".txt": 1, "without a suffix in no class folder": 1}
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
    refused(f"folder:{tmp_path}/one", r"class folder .*/one/dog holds no images that Pillow reads; it is empty$")
    for name in ("1.heic", "2.heic", "notes.txt"):
        (tmp_path / "one" / "dog" / name).write_text("")
    refused(f"folder:{tmp_path}/one", r"class folder .*/one/dog holds no images that Pillow reads; it holds 2 .heic, 1 .txt$")
    save(tmp_path / "two" / "test" / "cat" / "1.png")
    save(tmp_path / "two" / "val" / "cat" / "1.png")
    refused(f"folder:{tmp_path}/two", "two has val, test, but no train")
    for name in ("cat", "dog"):
        save(tmp_path / "two" / "train" / name / "1.png")
    save(tmp_path / "two" / "test" / "dogs" / "1.png")
    refused(f"folder:{tmp_path}/two", r"class folder .*/two/test/dogs: 'dogs' is not in train \(did you mean 'dog'\?\)")
    (tmp_path / "one" / "dog" / "2.png").symlink_to("nowhere.png")
    refused(f"folder:{tmp_path}/one", "dog/2.png is missing")


def test_images_without_labels_beside_the_class_folders(tmp_path: Path) -> None:
    for name in ("train/cat/0.png", "train/dog/0.png", "Test/0.png", "Test/1.png", "val/cat/0.png", "val/0.png"):
        save(tmp_path / name)
    table = find_source(f"folder:{tmp_path}").build()
    assert table.split is not None
    assert table.split.tolist() == [TRAIN, TRAIN, VALIDATION]
    assert table.left_out == {".png in no class folder of Test": 2, ".png in no class folder of val": 1}
    assert table.notes == ()
    save(tmp_path / "Test" / "unknown" / "0.png")
    refused(f"folder:{tmp_path}", "'unknown' is not in train; each folder there is a class, and images without labels")


def test_links_of_a_folder_stay_inside_it(animals: Path) -> None:
    data = f"folder:{animals}"
    save(animals.parent / "secret.png")
    link = animals / "cat" / "zlink.png"
    link.symlink_to(animals.parent / "secret.png")
    refused(
        data, r"'cat/zlink.png' leads out of .*; images must lie in that folder .links that lead out of it: --follow-links.$"
    )
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


# --- what has gone wrong, and what has changed ------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(5):
        save(tmp_path / "sub" / f"{number}.png", (10 * number, 0, 0))
    return tmp_path


BOMB = """
import sys
from pathlib import Path
from PIL import Image
from data.readers.pixels import Decoding, decode

Image.MAX_IMAGE_PIXELS = 1000
for side in (40, 60):
    Image.new("L", (side, side)).save("large.png")
    try:
        print(decode("large.png", Decoding(1, 8)).pixels.shape)
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

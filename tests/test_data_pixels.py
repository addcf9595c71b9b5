"""What pixels a user's file becomes, beside Pillow's own: formats, orientation, transparency, depth, sizes, damage."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

from data import build
from data.cache import open_table
from data.dataset import DataSpec, load
from data.readers import images as reader
from data.readers.pixels import DamagedImageError, Decoding, Flag, decode, formats, shorter_side, suffixes
from data.remarks import remarks
from data.sources import Options, RawTable, find_source

SIZE = 16
NO_IMAGE = "it is no image that Pillow reads"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(folder))
    return folder


def colours(width: int = SIZE, height: int = SIZE, seed: int = 0) -> Image.Image:
    """A picture without symmetry: a blurred draw, brighter to the right."""
    drawn = np.random.default_rng(seed).integers(0, 200, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + np.linspace(0, 50, width).astype(int)[None, :, None]).clip(0, 255).astype(np.uint8))


def alpha(width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8))


def save(path: Path, image: Image.Image | None = None, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or colours()).save(path, **how)
    return path


def pixels(path: Path, channels: int = 3, size: int = SIZE, **rule: Any) -> np.ndarray[Any, Any]:
    return decode(str(path), Decoding(channels, size, **rule)).pixels.astype(int)


def decoded(table: RawTable, start: int = 0) -> Tensor:
    return torch.cat([block.images for block in table.blocks(range(start, table.shape[0]))])


# --- formats and modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((f"x.{suffix}", "RGB") for suffix in ("png", "bmp", "tif", "ppm", "tga", "jp2", "gif", "sgi", "pcx", "qoi")),
        *((f"x.{suffix}", "L") for suffix in ("png", "bmp", "tif", "pgm", "jpg", "jp2", "gif")),
        *((f"x.{suffix}", "1") for suffix in ("png", "bmp", "tif", "pbm")),
        *((f"x.{suffix}", "P") for suffix in ("png", "bmp", "tif", "gif")),
        ("x.jpg", "RGB"),
        ("x.jpg", "CMYK"),
        ("x.tif", "CMYK"),
        ("x.tif", "YCbCr"),
        ("x.webp", "RGB"),
        *([("x.avif", "RGB")] if features.check("avif") else []),
    ],
)
def test_the_pixels_of_a_file_are_those_that_pillow_shows(name: str, mode: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, colours().convert(mode))
    with Image.open(path) as image:
        in_colour, in_grey = np.asarray(image.convert("RGB")).astype(int), np.asarray(image.convert("L")).astype(int)
    assert len(np.unique(in_grey)) > 1
    assert (pixels(path) == in_colour).all()
    assert (pixels(path, 1) == in_grey).all()


def over(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Composed by hand, in floats."""
    seen = np.asarray(image.convert("RGBA")).astype(float)
    share = seen[..., 3:] / 255
    return seen[..., :3] * share + np.array(background) * (1 - share)


def transparent(mode: str) -> Image.Image:
    image = colours().convert("RGBA")
    image.putalpha(alpha())
    if mode == "LA":
        return image.convert("LA")
    if mode == "P":
        image = colours().convert("P")
        image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x.png", "RGBA"),
        ("x.tif", "RGBA"),
        ("x.webp", "RGBA"),
        ("x.tga", "RGBA"),
        ("x.png", "LA"),
        ("x.tif", "LA"),
        ("x.png", "P"),
        *([("x.avif", "RGBA")] if features.check("avif") else []),
    ],
)
@pytest.mark.parametrize(("background", "levels"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_transparency_shows_the_background(
    name: str, mode: str, background: str, levels: tuple[int, int, int], tmp_path: Path
) -> None:
    path = save(tmp_path / name, transparent(mode))
    with Image.open(path) as image:
        expected = over(image, levels)
    assert np.abs(pixels(path, background=background) - expected).max() <= 1  # the rest is rounding
    picture = decode(str(path), Decoding(3, SIZE))
    assert picture.flags == Flag.TRANSPARENT
    if background == "white":
        in_grey = np.asarray(Image.fromarray(expected.round().astype(np.uint8)).convert("L")).astype(int)
        assert np.abs(pixels(path, 1) - in_grey).max() <= 1


def test_a_colour_that_is_named_transparent_shows_the_background(tmp_path: Path) -> None:
    for mode, key, name in (("RGB", (9, 9, 9), "x"), ("L", 9, "y")):
        image = colours().convert(mode)
        image.paste(key, (0, 0, 5, 3))
        path = save(tmp_path / f"{name}.png", image, transparency=key)
        expected = np.asarray(image.convert("RGB")).astype(int)
        expected[:3, :5] = 255
        assert (pixels(path) == expected).all()
    path = save(tmp_path / "opaque.png", colours().convert("RGBA"))
    assert decode(str(path), Decoding(3, SIZE)).flags == Flag(0)
    assert (pixels(path) == np.asarray(colours())).all()


def test_black_icons_on_transparency_can_be_told_apart(tmp_path: Path) -> None:
    for name, box in (("ring", (2, 2, 14, 14)), ("dot", (6, 6, 10, 10))):
        image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), box)
        save(tmp_path / name / "1.png", image)
    dot, ring = decoded(find_source(f"folder:{tmp_path}").build())
    assert [int((image == 0).sum()) for image in (dot, ring)] == [3 * 16, 3 * 144]
    assert int((ring == 255).sum()) == 3 * (256 - 144)


# --- depth ------------------------------------------------------------------------------------------------------------------


def deep(top: int, name: Path, order: str = "<") -> np.ndarray[Any, Any]:
    """A file of 16 bits whose brightest level is ``top``; its levels."""
    levels = np.linspace(0, top, SIZE * SIZE).astype(f"{order}u2").reshape(SIZE, SIZE)
    save(name, Image.frombytes("I;16B" if order == ">" else "I;16", (SIZE, SIZE), levels.tobytes()))
    return levels.astype(int)


@pytest.mark.parametrize(("top", "bits"), [(65535, 16), (40000, 16), (4095, 12), (1000, 10), (255, 8), (17, 8)])
@pytest.mark.parametrize(("suffix", "order"), [("png", "<"), ("tif", "<"), ("tif", ">")])
def test_deep_greys_keep_the_upper_8_of_the_bits_that_the_set_uses(
    top: int, bits: int, suffix: str, order: str, tmp_path: Path
) -> None:
    levels = deep(top, tmp_path / "a" / f"1.{suffix}", order)
    deep(min(top, 9), tmp_path / "b" / f"1.{suffix}", order)  # a darker one has the same rule
    table = find_source(f"folder:{tmp_path}").build()
    assert (table.shape, table.reading["bits"]) == ((2, 1, SIZE, SIZE), bits)
    found = decoded(table)[:, 0].numpy()
    assert (found[0] == levels >> (bits - 8)).all()
    assert found[0].max() >= 128 or top == 17
    if bits == 16:  # all that a 16-bit file can hold: then it is what Pillow makes of it
        with Image.open(tmp_path / "a" / f"1.{suffix}") as image:
            assert (found[0] == np.asarray(image.convert("I")) // 256).all()


def test_deep_greys_among_colours_and_in_a_palette_of_files(tmp_path: Path) -> None:
    levels = deep(4095, tmp_path / "a" / "1.png")
    save(tmp_path / "a" / "2.jpg")
    save(tmp_path / "b" / "1.png")
    table = find_source(f"folder:{tmp_path}").build()
    assert (table.shape[1], table.reading["bits"]) == (3, 12)
    assert (decoded(table)[0].numpy() == levels >> 4).all()


def test_a_deep_level_that_is_named_transparent_shows_the_background(tmp_path: Path) -> None:
    levels = np.full((SIZE, SIZE), 4000, "<u2")
    levels[:4] = 77
    save(tmp_path / "x.png", Image.fromarray(levels), transparency=77)
    found = pixels(tmp_path / "x.png", 1, bits=12)
    assert (found[:4] == 255).all()
    assert (found[4:] == 4000 >> 4).all()


def test_numbers_without_black_and_white_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.tif", Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)))
    with pytest.raises(DamagedImageError, match=r"x.tif cannot be read \(its pixels are floating-point numbers"):
        pixels(tmp_path / "x.tif")
    save(tmp_path / "y.tif", Image.fromarray(np.full((16, 16), -3, np.int32)))
    with pytest.raises(DamagedImageError, match=r"its darkest level is -3"):
        pixels(tmp_path / "y.tif", 1)


# --- orientation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_pictures_are_the_right_way_up(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / f"x.{suffix}", colours(SIZE, SIZE), exif=exif)
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image)
        expected = np.asarray(turned.convert("RGB")).astype(int)
        stored = np.asarray(Image.open(path).copy().convert("RGB")).astype(int)
    assert (pixels(path) == expected).all()
    if suffix != "tif":  # which Pillow turns itself
        assert (expected == stored).all() == (orientation == 1)
    assert bool(decode(str(path), Decoding(3, SIZE)).flags & Flag.TURNED) == (orientation > 1)


def test_a_turned_picture_is_as_tall_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    for name, size in (("large.jpg", (640, 400)), ("small.png", (40, 30)), ("x.tif", (40, 30))):
        picture = decode(str(save(tmp_path / name, colours(*size), exif=exif)), Decoding(3, SIZE))
        assert (picture.width, picture.height) == size[::-1], name


def test_an_orientation_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.jpg")
    path = save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(range(20)))
    assert (pixels(path) == pixels(plain)).all()


# --- sizes ------------------------------------------------------------------------------------------------------------------


def test_an_image_of_the_size_is_not_changed(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for name, image in zip("ab", drawn, strict=True):
        save(tmp_path / name / "1.png", Image.fromarray(image))
    found = decoded(find_source(f"folder:{tmp_path}").build())
    assert (found.permute(0, 2, 3, 1).numpy() == drawn).all()


@pytest.mark.parametrize("size", [(40, 100), (101, 40)])
def test_other_images_are_resized_by_the_shorter_side_and_cropped_in_the_middle(size: tuple[int, int], tmp_path: Path) -> None:
    from torchvision.transforms import v2

    ramp = np.add.outer(np.arange(size[1]), 1.3 * np.arange(size[0])).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], axis=2))
    found = pixels(save(tmp_path / "x.png", image), size=20)
    expected = np.asarray(v2.Compose([v2.Resize(20), v2.CenterCrop(20)])(image)).astype(int)
    inner = np.abs(found - expected)[1:-1, 1:-1]  # at the border torchvision's resize still sees what it then cuts off
    assert np.median(inner) <= 1
    assert np.abs(found - expected).mean() < 3


@pytest.mark.parametrize("size", [(40, 100), (101, 40), (9, 9)])
def test_squash_and_pad_keep_all_of_an_image(size: tuple[int, int], tmp_path: Path) -> None:
    image = colours(*size)
    path = save(tmp_path / "x.png", image)
    assert (pixels(path, size=20, resize="squash") == np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR))).all()
    padded = ImageOps.pad(image, (20, 20), Image.Resampling.BILINEAR, color=(0, 90, 0))
    assert (pixels(path, size=20, resize="pad", background="#005a00") == np.asarray(padded)).all()


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_large_photograph_is_decoded_at_a_part_of_its_size(resize: str, tmp_path: Path) -> None:
    ramp = np.add.outer(np.linspace(0, 120, 1600), np.linspace(0, 120, 2400)).astype(np.uint8)
    save(tmp_path / "x.jpg", Image.fromarray(np.stack([ramp, ramp, ramp], axis=2)))
    save(tmp_path / "x.png", Image.open(tmp_path / "x.jpg").convert("RGB"))
    whole, part = (pixels(tmp_path / name, size=100, resize=resize) for name in ("x.png", "x.jpg"))
    inner = np.abs(whole - part)[20:-20]  # where pad has an edge, a pixel more or less of it is seen
    assert inner.max() <= 2


def test_the_size_is_the_median_s_and_not_that_of_a_thumbnail(tmp_path: Path) -> None:
    for number in range(9):
        save(tmp_path / "ab"[number % 2] / f"{number}.jpg", colours(300, 200))
    save(tmp_path / "a" / "0000-thumbnail.png", colours(16, 16))
    source = find_source(f"folder:{tmp_path}")
    assert (source.image_size, source.views, source.launch_views) == (200, "imagenet", "crop")
    (said,) = [line for line in remarks(open_table(source)) if "smaller" in line]
    assert said == "warning: 1 images are far smaller than 229 x 229; the smallest side is 16"


def test_of_many_heads_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.readers.pixels.SURVEYED", 10)
    paths = [str(save(tmp_path / f"{number}.png", colours(10 + number, 99))) for number in range(40)]
    assert shorter_side(paths) == 26  # the fifth of 10, 14, 18 ... 46


# --- what is left out, and what is damaged ----------------------------------------------------------------------------------


def test_every_suffix_that_pillow_reads_is_an_image(tmp_path: Path) -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) <= suffixes()  # what ImageFolder takes
    assert {".gif", ".tga", ".jp2", ".jfif", ".tiff"} <= suffixes()
    assert not suffixes() & {".eps", ".ps", ".pdf", ".h5", ".txt", ".csv", ".mpg"}
    assert "EPS" not in formats()  # Pillow runs Ghostscript for it


def test_a_camera_s_file_of_two_jpegs_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "x.mpo", colours(seed=1), save_all=True, append_images=[colours(seed=2)])
    save(tmp_path / "b" / "x.png", colours())
    with Image.open(path) as image:
        assert image.format == "MPO"
        expected = np.asarray(image.convert("RGB"))
    assert (pixels(path) == expected).all()
    assert find_source(f"folder:{tmp_path}").build().shape[0] == 2


def test_frames_beyond_the_first_are_counted(tmp_path: Path) -> None:
    for name in ("x.gif", "x.tif", "x.webp"):
        path = save(tmp_path / name, colours(seed=1), save_all=True, append_images=[colours(seed=2)])
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB")).astype(int)
        assert decode(str(path), Decoding(3, SIZE)).flags == Flag.FRAMES
        assert (pixels(path) == expected).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_bytes_is_read_as_viewers_show_it(progressive: bool, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.jpg", colours(256, 256), quality=95, progressive=progressive)
    content = whole.read_bytes()
    for number in (1, 2):
        (tmp_path / "cut.jpg").write_bytes(content[:-number])
        assert (pixels(tmp_path / "cut.jpg", size=256) == pixels(whole, size=256)).all()  # the end alone is missing
    stuffed = content.rindex(b"\xff\x00") + 1
    (tmp_path / "cut.jpg").write_bytes(content[:stuffed])  # between two bytes that are one of the pixels'
    assert decode(str(tmp_path / "cut.jpg"), Decoding(3, 256)).flags == Flag.CUT_SHORT
    (tmp_path / "cut.jpg").write_bytes(content[:-40])
    picture = decode(str(tmp_path / "cut.jpg"), Decoding(3, 256))
    assert picture.flags == Flag.CUT_SHORT
    rows = (picture.pixels != pixels(whole, size=256)).any(axis=(1, 2)).nonzero()[0]
    assert progressive or rows.min() >= 256 - 16 - 1  # the last row of blocks, and what smoothing makes of it
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedImageError, match=r"cut.jpg cannot be read \(image file is truncated"):
        pixels(tmp_path / "cut.jpg", size=256)


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("x.jpg", lambda whole: whole[: len(whole) // 2], "Truncated File Read"),
        ("x.png", lambda whole: whole[: len(whole) // 2], "truncated"),
        ("x.bmp", lambda whole: whole[:-9], "truncated"),
        ("x.webp", lambda whole: whole[:-9], "could not create decoder"),
        ("x.avif", lambda whole: whole.replace(b"av01", b"xxxx", 1), "Failed to decode image|no image"),
        ("x.png", lambda whole: b"", NO_IMAGE),
        ("x.png", lambda whole: b"<html>404</html>", NO_IMAGE),
        ("x.png", lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", NO_IMAGE),
        ("x.png", lambda whole: whole[:50] + bytes(8) + whole[58:], "broken|no image"),
    ],
)
def test_a_damaged_image_is_named(name: str, damage: Callable[[bytes], bytes], match: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedImageError, match=f"^image {path} cannot be read .*{match}") as caught:
        pixels(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """40 images of two classes, 7 of which are damaged."""
    for number in range(40):
        save(tmp_path / "ab"[number % 2] / f"{number:02}.png", colours(seed=number))
    for number in range(0, 35, 5):
        (tmp_path / "ab"[number % 2] / f"{number:02}.png").write_bytes(b"spoilt")
    return tmp_path


def test_all_damaged_images_are_named_and_counted_and_what_was_decoded_stays(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"folder:{spoilt}"
    with pytest.raises(ValueError, match=r"^data set folder:.*: of 40 images 7 cannot be read: ") as caught:
        open_table(find_source(data), fresh=True)
    said = str(caught.value)
    assert said.count(" cannot be read (") == 5
    assert said.endswith("; and 2 more. Mend or remove them, or leave them out with --skip-damaged")
    read: list[str] = []
    monkeypatch.setattr(reader, "decode", lambda path, how: read.append(path) or decode(path, how))
    for number in range(0, 30, 5):
        (spoilt / "ab"[number % 2] / f"{number:02}.png").unlink()
    mended = save(spoilt / "a" / "30.png", colours(seed=30))
    save(spoilt / "b" / "99.png", colours(seed=99))  # a new one between the others
    table = open_table(find_source(data), fresh=True)
    assert sorted(read) == [str(mended), str(spoilt / "b" / "99.png")]
    assert (table.images == decoded(find_source(data).build())).all()
    assert not table.damage
    assert len(table.images) == 35


def test_damaged_images_are_left_out_where_that_is_asked_for(spoilt: Path) -> None:
    spec = DataSpec(data=f"folder:{spoilt}", noise="none", skip_damaged=True)
    dataset = load(spec)
    rows = torch.cat([dataset.split.train, dataset.split.validation])
    assert len(rows) == 33
    table = open_table(spec.source())
    assert (table.images[rows].flatten(1).float().std(dim=1) > 0).all()
    assert len(dataset.damage) == 7
    assert all(row not in rows for row in dataset.damage)
    assert all(reason.endswith(f"({NO_IMAGE})") for reason in dataset.damage.values())
    scaled = table.images[rows.sort().values].double().div(255).transpose(0, 1).flatten(1)
    assert table.mean == pytest.approx(scaled.mean(dim=1).tolist(), abs=1e-12)
    assert "of these 7 damaged and left out" in remarks(table)


def test_a_build_that_was_stopped_keeps_what_was_met(spoilt: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3 * SIZE * SIZE * 4)
    monkeypatch.setattr(build, "SYNC_SECONDS", 0)
    source = find_source(f"folder:{spoilt}", Options(skip_damaged=True))
    undisturbed = open_table(source, fresh=True)
    (cache / f"{source.key}.table").unlink()
    random.seed(0)
    stops = sorted(random.sample(range(1, 10), 3))

    class Killed(Exception):
        """As a kill, in that nothing is written after it."""

    def killed_after(number: int) -> None:
        add = build._Build.add
        seen = [0]

        def counted(self: Any, block: Any) -> None:
            if seen[0] == number:
                raise Killed
            seen[0] += 1
            add(self, block)

        monkeypatch.setattr(build._Build, "add", counted)
        with pytest.raises(Killed):
            open_table(source, fresh=True)
        monkeypatch.setattr(build._Build, "add", add)

    for number in stops[:2]:
        killed_after(number)
    table = open_table(source, fresh=True)
    assert (table.checksum, table.damage) == (undisturbed.checksum, undisturbed.damage)
    assert torch.equal(table.facts, undisturbed.facts)
    assert (table.mean, table.class_levels.tolist()) == (undisturbed.mean, undisturbed.class_levels.tolist())


def test_a_file_that_may_not_be_read_is_not_damaged(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, how: object) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(reader, "decode", refused)
    with pytest.raises(ValueError, match=r"Permission denied: '.*/a/00.png'"):
        open_table(find_source(f"folder:{spoilt}", Options(skip_damaged=True)), fresh=True)


def test_links_may_lead_out_where_that_is_asked_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number in range(4):
        save(store / f"{number}", colours(seed=number), format="PNG")
        link = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(store / f"{number}")
    (tmp_path / "set" / "list.csv").write_text("path,label\na/0.png,a\nb/1.png,b\n")
    for data, number in ((f"folder:{tmp_path}/set", 4), (f"manifest:{tmp_path}/set/list.csv", 2)):
        with pytest.raises(ValueError, match=r"'a/0.png' leads out of .*\(links that lead out of it: --follow-links\)"):
            find_source(data)
        table = open_table(find_source(data, Options(follow_links=True)))
        assert len(table.images) == number
        assert (table.images[0].permute(1, 2, 0).numpy() == np.asarray(colours(seed=0))).all()
    (tmp_path / "set" / "list.csv").write_text("path,label\n../store/0,a\nb/1.png,b\n")
    with pytest.raises(ValueError, match=r"line 2: '../store/0' leads out of .*; images must lie in that folder$"):
        find_source(f"manifest:{tmp_path}/set/list.csv", Options(follow_links=True))


# --- what is said -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_mixed_phone_pictures_is_described(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    for number in range(12):
        save(tmp_path / "ab"[number % 2] / f"{number}.jpg", colours(300, 200))
    for name in "ab":
        save(tmp_path / name / "turned.jpg", colours(300, 200), exif=exif)
        image = colours(200, 200)
        image.putalpha(alpha(200, 200))
        save(tmp_path / name / "clear.png", image)
        save(tmp_path / name / "tall.webp", colours(200, 400))
    deep(4095, tmp_path / "a" / "deep.png")
    save(tmp_path / "b" / "moving.gif", colours(200, 200), save_all=True, append_images=[colours(200, 200, 1)])
    (tmp_path / "a" / "x.heic").write_text("")
    (tmp_path / "b" / "Thumbs.db").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert remarks(open_table(find_source(f"folder:{tmp_path}"))) == [
        "images 20 files of 16 x 16 to 200 x 400 pixels, median shorter side 200, brought to 229 x 229: the middle square "
        "(--resize crop)",
        "of these 2 transparent, over white (--background), 2 turned upright as their EXIF says, 1 of more than 8 bits of "
        "grey, of which the set uses 12: the upper 8 stay, 1 of several frames, of which the first is read",
        "left out 1 .db, 1 .heic, 1 .txt in no class folder",
        "warning: 1 images are far smaller than 229 x 229; the smallest side is 16",
        "warning: of 2 images the middle square is less than two thirds; --resize squash or pad keeps all of them",
    ]
    squashed = remarks(open_table(find_source(f"folder:{tmp_path}", Options(resize="squash"))))
    assert squashed[0].endswith("brought to 200 x 200: all of each, out of proportion (--resize squash)")
    assert not any("middle square" in line for line in squashed)


def test_images_in_which_nothing_can_be_seen_are_said(tmp_path: Path) -> None:
    dark = Image.fromarray(np.random.default_rng(0).integers(0, 9, (16, 16, 3), dtype=np.uint8))
    for number in range(3):
        save(tmp_path / "dark" / f"{number}.png", dark)
        save(tmp_path / "light" / f"{number}.png", colours(seed=number))
    said = [line for line in remarks(open_table(find_source(f"folder:{tmp_path}"))) if line.startswith("warning")]
    assert said == ["warning: all images of class dark are of nearly one level; nothing can be seen in them"]
    for number in range(3):
        save(tmp_path / "light" / f"{number}.png", dark)
    table = open_table(find_source(f"folder:{tmp_path}"), fresh=True)
    assert remarks(table)[1:] == [
        "warning: channels of the images have only 9, 9, 9 levels of 256; nearly nothing can be seen in them",
        "warning: all images of class dark, light are of nearly one level; nothing can be seen in them",
    ]


def test_drawings_in_black_and_white_are_no_cause_for_a_warning(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "ab"[number % 2] / f"{number}.png", colours(seed=number).convert("1"))
    assert [line for line in remarks(open_table(find_source(f"folder:{tmp_path}"))) if line.startswith("warning")] == []
    assert remarks(open_table(find_source("digits"))) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resize": "stretch"}, r"^--resize: 'stretch' is not allowed; it must be one of crop, squash, pad$"),
        ({"background": "whyte"}, r"^--background: 'whyte' is not allowed; it must be a colour such as white or #ff8800$"),
        ({"background": "#11223344"}, r"^--background: '#11223344' is not allowed"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=match):
        find_source(f"folder:{tmp_path}", Options(**options))


# --- blocks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RawTable:
    """30 images in blocks of 4."""
    for number in range(30):
        save(tmp_path / "ab"[number % 2] / f"{number:02}.png", Image.new("RGB", (8, 8), (number, 0, 0)))
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4 * 3 * 8 * 8)
    monkeypatch.setattr(reader, "num_processors", lambda: 3)
    return find_source(f"folder:{tmp_path}").build()


def test_images_come_in_order_from_any_row_on(many: RawTable) -> None:
    order = [*range(0, 30, 2), *range(1, 30, 2)]
    assert [len(block.images) for block in many.blocks(range(30))] == [4] * 7 + [2]
    for start in (0, 1, 4, 13, 29):
        assert decoded(many, start)[:, 0, 0, 0].tolist() == order[start:]
    chosen = [3, 4, 17, 20, 21, 29]
    assert torch.cat([block.images for block in many.blocks(chosen)])[:, 0, 0, 0].tolist() == [order[row] for row in chosen]


def test_no_more_than_a_few_blocks_wait(many: RawTable, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(reader, "decode", lambda path, how: read.append(path) or decode(path, how))
    blocks = many.blocks(range(30))
    assert read == []
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]  # it is a generator
    assert 4 <= len(read) <= (2 * 3 + 1) * 4


def test_memory_is_bounded(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "0.bmp", colours(256, 256))
        for number in range(1, 60):
            (tmp_path / name / f"{number}.bmp").hardlink_to(tmp_path / name / "0.bmp")
    table = find_source(f"folder:{tmp_path}", Options(image_size=224)).build()
    tracemalloc.start()
    count = sum(len(block.images) for block in table.blocks(range(120)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 120
    assert peak < (2 * (os.cpu_count() or 1) + 3) * reader.BLOCK_BYTES

"""CIFAR and its human labels, from small files in the published format; nothing that a file asks for is run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.noise import corrupt, parse_noise, report
from data.readers import cifar
from data.seeds import generator
from data.sources import TEST, TRAIN, Options, RawTable, Source, find_source

PER_FILE = 20
GROUPS = """beaver dolphin otter seal whale; aquarium_fish flatfish ray shark trout; orchid poppy rose sunflower tulip;
bottle bowl can cup plate; apple mushroom orange pear sweet_pepper; clock keyboard lamp telephone television;
bed chair couch table wardrobe; bee beetle butterfly caterpillar cockroach; bear leopard lion tiger wolf;
bridge castle house road skyscraper; cloud forest mountain plain sea; camel cattle chimpanzee elephant kangaroo;
fox porcupine possum raccoon skunk; crab lobster snail spider worm; baby boy girl man woman;
crocodile dinosaur lizard snake turtle; hamster mouse rabbit shrew squirrel;
maple_tree oak_tree palm_tree pine_tree willow_tree; bicycle bus motorcycle pickup_truck train;
lawn_mower rocket streetcar tank tractor"""
SUPERCLASSES = [group.split() for group in GROUPS.split(";")]  # as the data set's page lists them
FINE = sorted(name for group in SUPERCLASSES for name in group)  # fine classes are numbered by the alphabet
PYTHON_2 = b"(dp1\nS'label_names'\np2\n(lp3\nS'airplane'\naS'automobile'\nas."  # how the published meta file is written


def published(name: str, seed: int = 0) -> dict[str, bytes]:
    """Files in the format of the published ones, 20 images in each."""
    random = np.random.default_rng(seed)
    known = cifar.CIFAR[name]
    classes = 10 if name == "cifar10" else 100
    files = {}
    for file in (*known.train, *known.test):
        content = {
            "data": random.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8),
            known.labels: random.integers(0, classes, PER_FILE).tolist(),
            "batch_label": file,
            "filenames": [f"{number}.png" for number in range(PER_FILE)],
        }
        files[file] = pickle.dumps(content, protocol=2)
    names = FINE if classes == 100 else [f"class {number}" for number in range(10)]
    files[next(iter(known.meta))] = pickle.dumps({known.classes: names, "num_vis": 3072}, protocol=2)
    return files


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both data sets, whose checksums are those that are asked for."""
    for name, known in list(cifar.CIFAR.items()):
        folder = tmp_path / known.folder
        folder.mkdir()
        files = published(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        sums = [{file: hashlib.md5(files[file]).hexdigest() for file in part} for part in (known.train, known.test, known.meta)]
        monkeypatch.setitem(cifar.CIFAR, name, known._replace(train=sums[0], test=sums[1], meta=sums[2]))
    return tmp_path


def find(data: str, root: Path, *, download: bool = False) -> Source:
    return find_source(data, Options(root=root, download=download))


def columns(table: RawTable) -> tuple[torch.Tensor, torch.Tensor]:
    assert table.truth is not None
    assert table.split is not None
    return table.truth, table.split


@pytest.mark.parametrize(("name", "num_train", "num_classes"), [("cifar10", 100, 10), ("cifar100", 20, 100)])
def test_images_and_labels_are_those_of_the_files_in_their_order(
    name: str, num_train: int, num_classes: int, root: Path
) -> None:
    table = find(name, root).build()
    truth, split = columns(table)
    parts = [pickle.loads(content) for file, content in published(name).items() if "meta" not in file]
    assert table.shape == (num_train + PER_FILE, 3, 32, 32)
    assert split.tolist() == [TRAIN] * num_train + [TEST] * PER_FILE
    assert truth.tolist() == [label for part in parts for label in part[cifar.CIFAR[name].labels]]
    assert table.given is None
    assert (table.num_classes, len(table.classes)) == (num_classes, num_classes)
    assert table.classes[7] == ("class 7" if name == "cifar10" else "beetle")
    images = torch.cat([block.images for block in table.blocks(range(num_train, table.shape[0]))])
    red, green, blue = parts[-1]["data"][3].reshape(3, 1024)  # planes, row by row
    assert images[3, 0, 2, 5] == red[2 * 32 + 5]
    assert images[3, 1, 31, 0] == green[31 * 32]
    assert images[3, 2, 0, 31] == blue[31]


def test_what_the_sources_bring(root: Path) -> None:
    save_human(root, "cifar10n")
    plain, human = find("cifar10", root), find("cifar10n:worst", root)
    assert plain.defaults == {"noise": "symmetric:0.4", "model": "resnet34", "batch_size": 128, "augmentation": "weak"}
    assert human.defaults == {**plain.defaults, "noise": "none"}
    assert (human.name, human.key, human.views) == ("cifar10n:worst", "cifar10n-worst", "flip-crop")
    assert plain.stream == human.stream  # the same rows are held out
    assert plain.stamp() == ""
    assert human.stamp() == hashlib.sha256((root / "CIFAR-10_human.pt").read_bytes()).hexdigest()
    for data in ("cifar10:x", "cifar100:x", "digits:x"):
        with pytest.raises(ValueError, match="'x' is not allowed after it"):
            find(data, root)


def test_python_2_pickles_are_read() -> None:
    content: Any = cifar.Unpickler(io.BytesIO(PYTHON_2), encoding="latin1").load()
    assert content == {"label_names": ["airplane", "automobile"]}
    # an array as numpy 1 under Python 2 wrote it, with its old module's name and bytes as a text
    array = np.arange(200, dtype=np.uint8)
    modern = pickle.dumps(array, protocol=2)
    old = modern.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != modern
    assert (cifar.Unpickler(io.BytesIO(old)).load() == array).all()


def test_missing_and_changed_files_are_named(root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    whole = path.read_bytes()
    path.unlink()
    for data in ("cifar10", "cifar10n:worst"):
        save_human(root, "cifar10n")
        with pytest.raises(ValueError, match=r"data_batch_3 is not in .*/cifar-10-batches-py; .* or use --download$"):
            find(data, root).build()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"data_batch_3 is not the published file \(its MD5 differs\)"):
        find("cifar10", root).build()
    path.unlink()
    assert find("cifar10", root, download=True).name == "cifar10"  # nothing is fetched before it is built


def test_what_is_missing_is_downloaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets
    from torchvision.datasets import utils

    def no_network(url: str, *_: object, **__: object) -> None:
        raise OSError(f"asked for {url}")

    folder, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    expected = columns(find("cifar10", root).build())[0]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.setattr(utils, "_get_redirect_url", no_network)
    with pytest.raises(
        ValueError, match=r"^data set cifar10: https://.*cifar-10-python.tar.gz cannot be brought to .*asked for"
    ):
        find("cifar10", root, download=True).build()  # the archive that is there is not the published one
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    (folder / "data_batch_3").mkdir(parents=True)  # in the way of the third file
    with pytest.raises(ValueError, match=r"data set cifar10: .* cannot be brought to .*data_batch_3"):
        find("cifar10", root, download=True).build()
    (folder / "data_batch_3").rmdir()
    known = cifar.CIFAR["cifar10"]
    sums = {**known.train, **known.test, **known.meta}
    for path in folder.iterdir():
        assert hashlib.md5(path.read_bytes()).hexdigest() == sums[path.name]  # a file is whole or not there
    assert torch.equal(columns(find("cifar10", root, download=True).build())[0], expected)
    assert {path.name for path in root.iterdir()} == {folder.name, "cifar-100-python", archive.name, ".cifar10.lock"}


def test_of_two_downloads_one_fetches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import utils

    folder, elsewhere = root / "cifar-10-batches-py", root / "elsewhere"
    expected = columns(find("cifar10", root).build())[0]
    folder.rename(elsewhere)
    fetched: list[str] = []

    def slowly(url: str, root: str, scratch: str, *_: object) -> None:
        fetched.append(url)
        time.sleep(0.5)
        shutil.copytree(elsewhere, Path(scratch) / folder.name)

    monkeypatch.setattr(utils, "download_and_extract_archive", slowly)
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda _: find("cifar10", root, download=True).build(), range(2)))
    assert len(fetched) == 1
    for table in tables:
        assert torch.equal(columns(table)[0], expected)


# --- human labels -----------------------------------------------------------------------------------------------------------


def save_human(root: Path, name: str, **changes: object) -> Path:
    """A file of the published format, labels wrong by a shift that differs from key to key."""
    base = name.removesuffix("n")
    known = cifar.CIFAR[base]
    clean = np.concatenate([pickle.loads(published(base)[file])[known.labels] for file in known.train])
    classes = 10 if base == "cifar10" else 100
    labels = {key: (clean + shift) % classes for shift, key in enumerate(cifar.HUMAN_LABELS[name].values(), start=1)}
    content = {"clean_label": clean, **labels, **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, root / cifar.HUMAN_FILES[name])
    return root / cifar.HUMAN_FILES[name]


@pytest.mark.parametrize(
    ("data", "shift"),
    [*((f"cifar10n:{key}", shift) for shift, key in enumerate(cifar.HUMAN_LABELS["cifar10n"], start=1)), ("cifar100n", 1)],
)
def test_human_labels_are_given_for_training_rows(data: str, shift: int, root: Path) -> None:
    save_human(root, data.partition(":")[0])
    table = find(data, root).build()
    truth, split = columns(table)
    assert table.given is not None
    train = split == TRAIN
    assert torch.equal(table.given[train], (truth[train] + shift) % table.num_classes)
    assert torch.equal(table.given[~train], truth[~train])
    assert torch.equal(truth, columns(find(data.partition("n")[0], root).build())[0])


@pytest.mark.parametrize("kind", ["all tensors", "int32 tensors", "one tensor", "clean tensor"])
def test_human_labels_that_were_saved_again_as_tensors(kind: str, root: Path) -> None:
    path = save_human(root, "cifar10n")
    expected = columns(find("cifar10n:worst", root).build())
    given = find("cifar10n:worst", root).build().given
    content = torch.load(path, weights_only=False)
    which = {"one tensor": ["worse_label"], "clean tensor": ["clean_label"]}.get(kind, list(content))
    again = {key: torch.as_tensor(value) if key in which else value for key, value in content.items()}
    if kind == "int32 tensors":
        again = {key: value.int() for key, value in again.items()}
    torch.save(again, path)
    table = find("cifar10n:worst", root).build()
    assert given is not None
    assert table.given is not None
    assert torch.equal(table.given, given)
    assert torch.equal(columns(table)[0], expected[0])


def test_tensors_open_no_door(root: Path, tmp_path: Path) -> None:
    """A file with a tensor in it is read by torch, which looks nothing up that it does not know."""
    mark = tmp_path / "run"
    torch.save({"clean_label": torch.arange(100), "worse_label": Call(os.mkdir, str(mark))}, root / "CIFAR-10_human.pt")
    with pytest.raises(ValueError, match=r"CIFAR-10_human.pt cannot be read \(.*\)$") as caught:
        find("cifar10n:worst", root).build()
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(root / "CIFAR-10_human.pt", weights_only=False)
    assert mark.exists()


def test_labels_that_do_not_exist_are_refused(root: Path) -> None:
    for data, allowed in (("cifar10n", "cifar10n:aggregate, cifar10n:random1"), ("cifar100n:worst", "write cifar100n$")):
        with pytest.raises(ValueError, match=allowed):
            find(data, root)
    with pytest.raises(ValueError, match=rf"CIFAR-10_human.pt is not in {root}; put it there"):
        find("cifar10n:worst", root).stamp()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"clean_label": np.arange(100) % 10}, "its clean_label is not that of these 100 images"),
        ({"clean_label": np.arange(99) % 10}, "its clean_label is not that of these 100 images"),
        ({"clean_label": None}, "cannot be read .'clean_label'"),
        ({"worse_label": None}, "cannot be read .'worse_label'"),
        ({"worse_label": np.full(100, 10)}, r"worse_label is not 100 labels of 0\.\.9"),
        ({"worse_label": np.full(100, -1)}, r"worse_label is not 100 labels of 0\.\.9"),
        ({"worse_label": np.zeros(99, np.int64)}, "worse_label is not 100 labels"),
        ({"worse_label": "frog"}, "cannot be read"),
        ({"worse_label": torch.full((100,), 0.5)}, r"worse_label is not 100 labels of 0\.\.9"),
        ({"worse_label": torch.zeros(99, dtype=torch.int64)}, "worse_label is not 100 labels"),
    ],
)
def test_human_labels_that_do_not_fit_are_refused(changes: dict[str, object], match: str, root: Path) -> None:
    save_human(root, "cifar10n", **changes)
    with pytest.raises(ValueError, match=match) as caught:
        find("cifar10n:worst", root).build()
    assert str(root / "CIFAR-10_human.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def archive(content: bytes, name: str = "archive/data.pkl") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        archive(b""),
        archive(b"\x80\x02}"),
        archive(pickle.dumps([1, 2])),
        archive(pickle.dumps({"clean_label": 1}), "archive/other"),
    ],
)
def test_another_file_is_refused(content: bytes, root: Path) -> None:
    (root / "CIFAR-10_human.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{root}/CIFAR-10_human.pt cannot be read"):
        find("cifar10n:worst", root).build()


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "call",
    [
        lambda mark: Call(os.mkdir, mark),
        lambda mark: Call(eval, f"__import__('os').mkdir({mark!r})"),
        lambda mark: Call(open, mark, "w"),
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    call: Any, protocol: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = root / "mark"
    evil = pickle.dumps({"clean_label": call(str(mark))}, protocol)
    (root / "CIFAR-10_human.pt").write_bytes(archive(evil))
    with pytest.raises(
        ValueError, match=r"CIFAR-10_human.pt cannot be read .it asks for .*, which such a file does not need.$"
    ):
        find("cifar10n:worst", root).build()
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(evil)
    with pytest.raises(ValueError, match="test_batch is not the published file"):
        find("cifar10", root).build()
    known = cifar.CIFAR["cifar10"]
    monkeypatch.setitem(cifar.CIFAR, "cifar10", known._replace(test={"test_batch": hashlib.md5(evil).hexdigest()}))
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        find("cifar10", root).build()
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()  # it would have


def test_no_way_round_the_list_of_what_may_be_made() -> None:
    for text in (
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"cos\nsystem\n.",
        b"Pname\n.",
    ):
        with pytest.raises(pickle.UnpicklingError):
            cifar.Unpickler(io.BytesIO(text)).load()
    with pytest.raises(pickle.UnpicklingError, match="encoding 'idna'"):
        cifar.Unpickler(io.BytesIO(b"c_codecs\nencode\n(Vx\nVidna\ntR.")).load()


# --- maps -------------------------------------------------------------------------------------------------------------------


def test_the_superclasses_are_those_of_the_data_set() -> None:
    named = [tuple(sorted(FINE.index(name) for name in group)) for group in SUPERCLASSES]
    assert tuple(named) == cifar.SUPERCLASSES
    assert sorted(label for group in cifar.SUPERCLASSES for label in group) == list(range(100))


def test_maps_of_the_literature(root: Path) -> None:
    ten, hundred = find("cifar10", root).maps, find("cifar100", root).maps
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert {names[one]: names[other] for one, other in ten["cifar10"].items()} == {
        "truck": "automobile",
        "bird": "airplane",
        "deer": "horse",
        "cat": "dog",
        "dog": "cat",
    }
    assert list(hundred) == ["superclass", "blocks"]
    for mapping in hundred.values():
        assert sorted(mapping) == sorted(mapping.values()) == list(range(100))
    superclass = {label: number for number, group in enumerate(cifar.SUPERCLASSES) for label in group}
    stays = {name: sum(superclass[one] == superclass[other] for one, other in hundred[name].items()) for name in hundred}
    assert stays == {"superclass": 100, "blocks": 6}
    assert [hundred["blocks"][label] for label in (0, 3, 4, 5, 99)] == [1, 4, 0, 6, 95]
    assert [hundred["superclass"][label] for label in (4, 30, 95)] == [30, 55, 4]


def test_asymmetric_noise_takes_them(root: Path) -> None:
    truth = torch.arange(100).repeat(10)
    source = find("cifar100", root)
    for text, name in (("asymmetric:0.3", "superclass"), ("asymmetric:0.3:blocks", "blocks")):
        noise = parse_noise(text).completed(source.maps)
        matrix = report(truth, corrupt(truth, noise, 100, generator("test", 0)), 100).matrix
        for one, other in source.maps[name].items():
            assert (matrix[one, one], matrix[one, other]) == (0.7, 0.3)

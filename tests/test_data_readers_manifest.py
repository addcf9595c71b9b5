"""Lists of images in CSV files: what is read, what is said, and the line that is refused."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache import open_table
from data.readers.manifest import NO_LABEL
from data.remarks import remarks
from data.sources import TEST, TRAIN, VALIDATION, Options, find_source
from data.text import look_alikes
from tests.image_files import decoded, refused, save, write


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
        ("path,lable\nsub/0.png,a\n", r"must name the column 'label'; 'lable' is there \(did you mean 'label'\?\)$"),
        ("path;lable\nsub/0.png;a\n", r"must name the column 'label'; 'lable' is there \(did you mean 'label'\?\)$"),
        ("sub/0.png,a\nsub/1.png,b\n", "must name the column 'path'; it has 'sub/0.png', 'a'$"),
        ("path label\nsub/0.png a\n", "must name the column 'path'; it has 'path label'$"),
        ("path,label,label\nsub/0.png,a,a\n", "column 'label' is there 2 times"),
        ("path,truth\nsub/0.png,a\n", "must name the column 'label'; it has 'path', 'truth'$"),
        ("path,label\nsub/0.png,a\nsub/1.png\n", "line 3: 1 cells; the header has 2"),
        ("path,label\nsub/0.png,a\nsub/1.png,b,c\n", "line 3: 3 cells; the header has 2"),
        ("path,label\nsub/0.png,a\nsub/1.png,\n", "line 3: '' is not a label"),
        ("path,label\nsub/0.png,a\n,b\n", "line 3: path must not be empty"),
        ("path,label\nsub/0.png,a\nsub/1.png,a\n", "there must be at least two classes, not 1"),
        ("path,label\nsub/0.png,0\nsub/1.png,-1\n", "label -1 is not allowed; integers must not be negative"),
        ("path,label\nsub/0.png,a\nsub/0.png,b\n", "line 3: 'sub/0.png' is listed twice"),
        ("path,label\nsub/0.png,a\n./sub/0.png,b\n", "line 3: './sub/0.png' is listed twice, first as 'sub/0.png'"),
        (
            "path,label,truth,split\nsub/0.png,cat,,train\nsub/1.png,dog,,train\nsub/2.png,dog,cta,test\n",
            r"line 4: truth 'cta' of a test row is not one of the labels \(did you mean 'cat'\?\)$",
        ),
        (
            "path,label,split\nsub/0.png,a,train\nsub/1.png,b,Tset\n",
            r"line 3: split 'Tset' is not allowed \(did you mean 'test'\?\); write one of train, val, validation, test, tr",
        ),
        ("path,label,split\nsub/0.png,a,train\nsub/1.png,b,nan\n", "line 3: split 'nan' is not allowed"),
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
        (
            "path,label\nsub/8.png,a\nsub/0.png,a\nsub/9.png,b\n",
            "^manifest .*list.csv: sub/8.png is missing in .*, and 1 more$",
        ),
        ('path,label\nsub/0.png,"a\n', "after line 2: unexpected end of data"),
    ],
)
def test_a_manifest_that_is_refused(text: str, match: str, pictures: Path) -> None:
    refused(write(pictures, text), match)


def test_a_manifest_that_is_no_file() -> None:
    refused("manifest:", "needs a path; write manifest:FILE.csv")


def test_a_manifest_that_is_not_there(pictures: Path) -> None:
    refused(f"manifest:{pictures / 'none.csv'}", "none.csv: there is no such file")
    refused(f"manifest:{pictures}", "there is no such file")


LIST = "path,label\nsub/0.png,caf\u00e9\nsub/1.png,\u732b\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_list_in_any_encoding_that_says_which(encoding: str, pictures: Path) -> None:
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (pictures / "list.csv").write_bytes(mark + LIST.encode(encoding))
    assert find_source(f"manifest:{pictures / 'list.csv'}").build().classes == ("caf\u00e9", "\u732b")


def packed(folder: Path, name: str) -> bytes:
    with zipfile.ZipFile(folder / "packed", "w") as archive:
        archive.writestr(name, LIST)
    return (folder / "packed").read_bytes()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda _: gzip.compress(LIST.encode()), r"is compressed \(gzip\); unpack it first$"),
        (lambda folder: packed(folder, "list.csv"), r"is compressed \(zip\); unpack it first$"),
        (lambda folder: packed(folder, "xl/workbook.xml"), "is an Excel workbook; save it as CSV in UTF-8$"),
        (lambda folder: packed(folder, "content.xml"), "is an OpenDocument table; save it as CSV"),
        (lambda _: b"PK\x03\x04 and damaged", r"is compressed \(zip\)"),
        (lambda _: bz2.compress(LIST.encode()), r"is compressed \(bzip2\)"),
        (lambda _: lzma.compress(LIST.encode()), r"is compressed \(xz\)"),
        (lambda _: LIST.encode("utf-16-le"), "is in UTF-16 without a byte order mark; save it as UTF-8$"),
        (lambda _: LIST.encode("utf-16-be"), "is in UTF-16 without a byte order mark"),
        (lambda _: LIST.encode("utf-16")[:-1], r"is not a text in UTF-16 \(truncated data\); save it as UTF-8$"),
        (lambda _: LIST[:25].encode("latin1"), r", line 2: byte 0xe9 is not UTF-8; save the file as UTF-8$"),
    ],
)
def test_a_list_that_is_no_text_is_called_what_it_is(content: Any, match: str, pictures: Path) -> None:
    (pictures / "list.csv").write_bytes(content(pictures))
    refused(f"manifest:{pictures / 'list.csv'}", f"^manifest {pictures}/list.csv.*{match}")


def test_a_parquet_file_is_called_so(pictures: Path) -> None:
    pandas.read_csv(io.StringIO(LIST)).to_parquet(pictures / "list.csv")
    refused(f"manifest:{pictures / 'list.csv'}", "list.csv is a Parquet file; save it as CSV in UTF-8$")


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_the_header_says_what_separates_cells(sign: str, pictures: Path) -> None:
    """Whatever stands in the cells; in the other two signs most of all."""
    save(pictures / "sub" / "a,b;c.png")
    rows = [("Path", "LABEL"), ("sub/a,b;c.png", "x,y;z"), ("sub/1.png", "b")]
    pandas.DataFrame(rows[1:], columns=rows[0]).to_csv(pictures / "list.csv", sep=sign, index=False)
    source = find_source(f"manifest:{pictures / 'list.csv'}")
    assert source.build().classes == ("b", "x,y;z")


def notes(data: str) -> list[str]:
    """What is said of a data set: the same whether it is decoded or found in the cache, and new where it alone has changed."""
    lines = [list(open_table(find_source(data), fresh=True).notes) for _ in range(2)]
    assert lines[0] == lines[1] == list(open_table(find_source(data)).notes)
    assert set(lines[0]) <= set(remarks(open_table(find_source(data))))
    return lines[0]


def test_other_columns_are_left_out_with_a_line(pictures: Path) -> None:
    text = ",path,label,truht,width\n0,sub/0.png,a,b,8\n1,sub/1.png,b,a,8\n"
    said = "columns that are not read: one without a name, 'truht' (did you mean 'truth'?), 'width'"
    assert notes(write(pictures, text)) == [said]
    assert find_source(write(pictures, text)).build().truth is None
    assert notes(write(pictures, "path,label\nsub/0.png,a\nsub/1.png,b\n")) == []


def test_a_split_is_written_as_folders_are_named(pictures: Path) -> None:
    words = ["Train", "TRAINING", "valid", "Dev", "Testing"]
    text = "path,label,split\n" + "".join(f"sub/{i}.png,{'ab'[i % 2]},{word}\n" for i, word in enumerate(words))
    split = find_source(write(pictures, text)).build().split
    assert split is not None
    assert split.tolist() == [TRAIN, TRAIN, VALIDATION, VALIDATION, TEST]


# --- labels -----------------------------------------------------------------------------------------------------------------


def test_no_label_is_what_pandas_reads_as_none() -> None:
    words = sorted(NO_LABEL | {"none", "na", "No", "0", "nano", "Nan", "x"})
    read = pandas.read_csv(io.StringIO("word\n" + "".join(f'"{word}"\n' for word in words)), skip_blank_lines=False)
    assert {word for word, absent in zip(words, read["word"].isna(), strict=True) if absent} == NO_LABEL
    for absent in (None, float("nan"), pandas.NA, pandas.NaT):
        assert str(absent) in NO_LABEL | {"NaT"}


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "None", "null", "", "<NA>", "#N/A"])
def test_a_word_for_no_label_is_refused_with_its_line_and_no_class(word: str, pictures: Path) -> None:
    text = f"path,label\nsub/0.png,0\nsub/1.png,{word}\nsub/2.png,1\n"
    refused(write(pictures, text), rf"line 3: '{re.escape(word)}' is not a label; leave out .* folder:PATH\)$")
    refused(
        write(pictures, text + "sub/3.png,nan\n"), rf"line 3: '{re.escape(word)}' is not a label, and so in 1 more row; leave"
    )
    unknown = write(pictures, f"path,label,truth\nsub/0.png,0,1\nsub/1.png,1,{word}\n")
    table = find_source(unknown).build()
    assert table.classes == ("0", "1")
    assert table.truth is not None
    assert table.truth.tolist() == [1, -1]


def test_a_class_that_is_called_none_can_be_a_folder(tmp_path: Path) -> None:
    for name in ("None", "NA"):
        save(tmp_path / name / "0.png")
    assert find_source(f"folder:{tmp_path}").build().classes == ("NA", "None")


def test_integers_that_pandas_wrote_as_floats(pictures: Path) -> None:
    """A column of integers in which some are missing is one of floats."""
    names = [f"sub/{i}.png" for i in range(4)]
    frame = pandas.DataFrame({"path": names, "label": [10, 9, 9, 10], "truth": [9, None, 10, 12]})
    frame.to_csv(pictures / "list.csv", index=False)
    assert "10,9.0" in (pictures / "list.csv").read_text()
    table = find_source(f"manifest:{pictures / 'list.csv'}").build()
    assert table.classes == ("9", "10")
    assert table.truth is not None
    assert table.truth.tolist() == [0, -1, 1, 2]


def test_a_truth_that_is_no_label_is_of_no_class(pictures: Path) -> None:
    text = "path,label,truth\nsub/0.png,cat,cta\nsub/1.png,dog,\nsub/2.png,dog,dog\nsub/3.png,dog,boat\nsub/4.png,cat,boat\n"
    data = write(pictures, text)
    assert notes(data) == ["rows whose truth is no label (open set): 3, with 'cta' (did you mean 'cat'?), 'boat'"]
    table = find_source(data).build()
    assert (table.num_classes, table.classes) == (2, ("cat", "dog"))
    assert table.truth is not None
    assert table.truth.tolist() == [2, -1, 1, 2, 2]


COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Cat", "cat"), "'Cat' and 'cat'"),
        (("guinea pig", "guinea  pig"), "'guinea  pig' and 'guinea pig'"),
        ((COMPOSED, DECOMPOSED), f"'{DECOMPOSED}' ('cafe\\u0301') and '{COMPOSED}'"),
        (("\uff21", "a"), "'a' and '\uff21' ('\\uff21')"),
        (("cat", "dog"), ""),
    ],
)
def test_classes_that_look_alike_are_named(names: tuple[str, str], said: str, tmp_path: Path) -> None:
    expected = (
        [f"warning: classes that differ only in case, white space or Unicode form are kept apart: {said}"] if said else []
    )
    for number, name in enumerate(names):
        save(tmp_path / "images" / name / f"{number}.png")
    rows = "".join(f"images/{name}/{number}.png,{name}\n" for number, name in enumerate(names))
    for data in (write(tmp_path, "path,label\n" + rows), f"folder:{tmp_path / 'images'}"):
        assert notes(data) == expected
        assert len(find_source(data, Options()).build().classes) == 2


@given(st.lists(st.text(max_size=8), max_size=8))
@settings(max_examples=300, deadline=None)
def test_every_spelling_of_a_name_is_found(names: list[str]) -> None:
    """All four normal forms, both cases that come back, and more white space are one group with the name itself."""
    for name in names:
        forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD")]
        spellings = {name, *forms, name.casefold(), f" {name} ", name.replace(" ", "  ")}
        if len(spellings) > 1:
            assert any(set(group) == spellings for group in look_alikes(spellings))
    for group in look_alikes(names):
        assert len(group) == len(set(group)) > 1


# --- paths ------------------------------------------------------------------------------------------------------------------


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

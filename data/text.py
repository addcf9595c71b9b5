"""Lists that people write: texts in UTF-8 or, with a byte order mark, UTF-16; and the words in them that look alike."""

from __future__ import annotations

import codecs
import difflib
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path

from errors import UserError

COMPRESSED = {  # first bytes of a file: what has packed it
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
}
TABLES = {b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an Excel workbook", b"PAR1": "a Parquet file"}
MARKS = {  # UTF-32's first: that of UTF-16 is how it begins
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NAMED = 5  # how many of a kind a message names


def read_text(path: Path, what: str) -> str:
    """The file's text. ValueError, which begins with ``what``, for one that is compressed, no list, or in another encoding."""
    content = path.read_bytes()
    packed = next((name for magic, name in COMPRESSED.items() if content.startswith(magic)), "")
    table = next((name for magic, name in TABLES.items() if content.startswith(magic)), "")
    if packed == "zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
        table = next((kind for name, kind in PACKED_TABLES.items() if name in names), "")
    if table:
        raise UserError(f"{what} is {table}; save it as CSV in UTF-8")
    if packed:
        raise UserError(f"{what} is compressed ({packed}); unpack it first")
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in content[:2]:
        raise UserError(f"{what} is in UTF-16 without a byte order mark; save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        if encoding != "utf-8-sig":
            raise UserError(f"{what} is not a text in {name} ({error.reason}); save it as UTF-8") from error
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(f"{what}, line {line}: byte 0x{byte:02x} is not {name}; save the file as UTF-8") from error


PACKED_TABLES = {"xl/workbook.xml": "an Excel workbook", "content.xml": "an OpenDocument table"}


def hint(word: str, known: Iterable[str]) -> str:
    """The known word that is meant, in brackets, where one is close."""
    known = list(known)
    close = [name for name in known if _folded(name) == _folded(word)] or difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def some(items: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names that differ only in case, in white space or in the form of Unicode (NFC, NFD, NFKC, NFKD), group by group."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_folded(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _folded(name: str) -> str:
    """Unicode's compatibility caseless match (definition D146) without white space at the ends, and one space within."""
    for _ in range(2):
        name = unicodedata.normalize("NFKD", name).casefold()
    return " ".join(unicodedata.normalize("NFKC", name).split())


def look_alike_notes(names: Iterable[str]) -> tuple[str, ...]:
    """A line that names them, in escapes where they look the same; none where there are none."""
    pairs = [" and ".join(map(_shown, group)) for group in look_alikes(names)]
    if not pairs:
        return ()
    return (f"warning: classes that differ only in case, white space or Unicode form are kept apart: {some(pairs)}",)


def _shown(name: str) -> str:
    plain = unicodedata.normalize("NFC", name) == name and unicodedata.normalize("NFKC", name) == name
    return repr(name) if plain else f"{name!r} ({name!a})"

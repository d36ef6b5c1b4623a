"""Reading a user's file: every format gives the same rows; every fault is an error that names its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from embedkernels.cli import tables
from embedkernels.cli.errors import UsageError
from tests.cli.support import said

WANTED = {"--text": "text", "--label": "label"}
ROWS = [("one, two", "a"), ('say "hi"', "b"), ("first\nsecond", "a"), ("ünï", "b")]
CSV = 'id,text,label\n1,"one, two",a\n2,"say ""hi""",b\n3,"first\nsecond",a\n\n4,ünï,b\n'


def objects() -> list[dict[str, str]]:
    return [{"text": text, "label": label, "id": "x"} for text, label in ROWS]


def write(path: Path) -> Path:
    match "".join(path.suffixes):
        case ".csv":
            path.write_text(CSV, encoding="utf-8")
        case ".csv.gz":
            path.write_bytes(gzip.compress(CSV.encode()))
        case ".tsv":
            path.write_text(CSV.replace(",", "\t").replace("one\t two", "one, two"), encoding="utf-8")
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, objects())) + "\n\n", encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(objects()), encoding="utf-8")
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(objects()), path)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.json", "a.parquet", "A.CSV"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.lower()
    write(path)
    path = path.rename(tmp_path / name)
    table = tables.read(path, "--train", WANTED)
    assert list(zip(table.columns["text"], table.columns["label"], strict=True)) == ROWS
    assert set(table.columns) == {"text", "label"}, "only what was asked for is kept"


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_may_use_the_separators_of_spreadsheets(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text{delimiter}label\none, two{delimiter}a\n", encoding="utf-8-sig")
    table = tables.read(path, "--train", WANTED)
    assert (table.columns["text"], table.columns["label"]) == (["one, two"], ["a"])


def test_a_separator_inside_a_quoted_name_separates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"text, ""full""";label\n"one, two";a\n', encoding="utf-8")
    table = tables.read(path, "--train", {"--text": 'text, "full"', "--label": "label"})
    assert table.columns == {'text, "full"': ["one, two"], "label": ["a"]}


def test_json_may_wrap_its_one_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": objects()}))
    assert len(tables.read(path, "--train", WANTED)) == len(ROWS)


def test_rows_know_their_line(tmp_path: Path) -> None:
    table = tables.read(write(tmp_path / "a.csv"), "--train", WANTED)
    assert [table.where(row).rpartition(", ")[2] for row in range(4)] == ["line 2", "line 3", "line 4", "line 7"]
    table = tables.read(write(tmp_path / "a.parquet"), "--train", WANTED)
    assert table.where(3).endswith("a.parquet, row 4")


def test_plain_text_has_one_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\r\n")
    assert tables.read(path, "--train", {"--text": "text"}).columns["text"] == ["one", "two"]


# Its header is whole; what follows is no compressed data.
DAMAGED = gzip.compress(b"text,label\n")[:10] + b"\xff" * 40

FAULTS = {
    "empty": ("a.csv", b"", "is empty"),
    "header only": ("a.csv", b"text,label\n", "has no rows"),
    "no header": ("a.csv", b"\n\n", "has no header"),
    "column": (
        "a.csv",
        b"texts,label,id\nx,a,1\n",
        "no column 'text' in {path} | texts, label, id. Did you mean 'texts'?",
    ),
    "column in json": (
        "a.json",
        b'[{"body": "x", "label": 1}]',
        "--text: no column 'text' | Columns there: body, label.",
    ),
    "column in json lines": ("a.jsonl", b'{"text": "x", "klass": 1}\n', "--label: no column 'label' | text, klass."),
    "twice": ("a.csv", b"text,text,label\na,b,c\n", "--text: {path} has 2 columns named 'text'"),
    "too many fields": (
        "a.csv",
        b"text,label\nx,a\nx, y,a\n",
        "line 3: 3 fields where the header has 2 | double quotes",
    ),
    "too few fields": ("a.csv", b"text,label\nx\n", "line 2: 1 fields"),
    "stray quote": ("a.csv", b'text,label\n"x"y,a\n', "line 2: ',' expected after '\"'"),
    "open quote": ("a.csv", b'text,label\n"x,a\ny,b\n', "unexpected end of data"),
    "not UTF-8": ("a.csv", "text,label\nü,a\n".encode("latin-1"), "is not UTF-8 (byte 0xfc) | Save it as UTF-8."),
    "broken json line": ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": "x",\n', "line 2 is not JSON"),
    "json line of another kind": ("a.jsonl", b"[1]\n", "line 1: expected an object, got list"),
    "broken json": ("a.json", b'[{"text": "x"},\n{"text": ]', "line 2 is not JSON: Expecting value (column 10)"),
    "json lines named json": (
        "a.json",
        b'{"text": 1}\n{"text": 2}\n',
        "Extra data | Name a file with one object on each",
    ),
    "json without rows": ("a.json", b'{"text": "x"}', "is no array of objects"),
    "json of an empty list": ("a.json", b"[]", "has no rows"),
    "not parquet": ("a.parquet", b"PAR", "is not a Parquet file"),
    "not gzip": ("a.csv.gz", b"text,label\n", "cannot be read"),
    "damaged gzip": ("a.csv.gz", DAMAGED, "cannot be read | It is damaged"),
    "cut gzip": ("a.csv.gz", gzip.compress(b"text,label\n" * 99)[:-9], "cannot be read | It is damaged"),
    "long number": ("a.json", b'[{"text": ' + b"1" * 5000 + b"}]", "{path} has a number with too many digits"),
    "long number in a line": ("a.jsonl", b"\n" + b"1" * 5000, "{path}, line 2 has a number with too many digits"),
    "deep": ("a.json", b"[" * 200_000, "{path} is nested too deeply"),
    "deep line": ("a.jsonl", b"[" * 200_000, "{path}, line 1 is nested too deeply"),
    "text has no labels": ("a.txt", b"x\n", "--label: no column 'label' | --task causal-lm"),
}


@pytest.mark.parametrize(("name", "content", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        tables.read(path, "--train", WANTED)
    for part in expected.format(path=path).split(" | "):
        assert part in said(f"{caught.value.message} {caught.value.remedy}")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables, "_open", refuse)
    with pytest.raises(UsageError, match=r"--train: .*a.csv cannot be read: Permission denied"):
        tables.read(write(tmp_path / "a.csv"), "--train", WANTED)


def test_columns_of_the_same_name_in_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array(["x"])
    parquet.write_table(pyarrow.table([column] * 3, names=["text", "text", "label"]), path)
    with pytest.raises(UsageError, match=r"--text: .* has 2 columns named 'text'"):
        tables.read(path, "--train", WANTED)


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i}" for i in range(999)], "label": [str(i) for i in range(999)]})
    parquet.write_table(table, path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--train: .*a.parquet (is not a Parquet file|cannot be read)"):
        tables.read(path, "--train", WANTED)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(tables.CliError) as caught:
        tables.read(path, "--train", WANTED)
    assert caught.value.remedy == "pip install pyarrow"

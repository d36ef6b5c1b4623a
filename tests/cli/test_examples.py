"""From tables to examples: what each task takes of a row, the labels, and the rows held back."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from embedkernels.cli import examples, sources
from embedkernels.cli.errors import CliError, UsageError
from embedkernels.cli.examples import Example
from embedkernels.cli.settings import Settings
from tests.cli import support


def load(path: Path, **more: Any) -> examples.Data:
    return examples.load(Settings(model="none", train=str(path), **{"eval_fraction": 0.5, **more}))


def as_json(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b", "a"], ("a", "b")),
        ([10, 9, 10, 9], ("9", "10")),
        (["10", "9", "10", "9"], ("9", "10")),
        ([1.0, 0.0, 1, 0], ("0", "1")),
        ([True, False, True, False], ("False", "True")),
        ([" a", "a ", "b", "b"], ("a", "b")),
        (["1", "x", "1", "x"], ("1", "x")),
    ],
    ids=str,
)
def test_labels_are_texts_or_whole_numbers_in_a_fixed_order(tmp_path: Path, values: list[Any], labels: tuple) -> None:
    path = as_json(tmp_path / "a.json", *({"text": "x", "label": value} for value in values))
    assert load(path).labels == labels


def test_rows_without_a_text_or_label_are_left_out_and_said(tmp_path: Path) -> None:
    rows = [("one", "a"), ("", "a"), ("two", " "), ("three", "b"), ("four", "a"), ("five", "b")]
    path = support.write_csv(tmp_path / "a.csv", rows)
    data = load(path)
    assert sorted(str(one.text) for one in data.train + data.evaluation) == ["five", "four", "one", "three"]
    assert f"2 rows without a value in 'text' or a value in 'label' left out (first: {path}, line 3)" in data.notices


def test_rows_held_back_have_every_class_in_its_share_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [(f"text {i}", "rare" if i % 10 == 0 else "often") for i in range(200)]
    path = support.write_csv(tmp_path / "a.csv", rows)
    data = load(path, eval_fraction=0.1)
    assert Counter(one.label for one in data.evaluation) == {"often": 18, "rare": 2}
    assert Counter(one.label for one in data.train) == {"often": 162, "rare": 18}
    assert not {one.text for one in data.train} & {one.text for one in data.evaluation}
    assert load(path, eval_fraction=0.1) == data
    assert load(path, eval_fraction=0.1, seed=1).evaluation != data.evaluation
    assert "no --eval: 20 of 200 rows are held back for evaluation (--eval-fraction 0.1)" in data.notices


@pytest.mark.parametrize("words", [["New", "York"], '["New", "York"]', "New York"], ids=str)
@pytest.mark.parametrize("tags", [["B", "I"], '["B", "I"]', "B I"], ids=str)
def test_words_and_tags_may_be_lists_or_texts(tmp_path: Path, words: Any, tags: Any) -> None:
    path = as_json(tmp_path / "a.json", *[{"tokens": words, "tags": tags}] * 2)
    data = load(path, task="token-classification")
    assert data.train == data.evaluation == [Example(["New", "York"], ["B", "I"])]


def test_a_word_that_looks_like_a_list_is_a_word(tmp_path: Path) -> None:
    path = as_json(tmp_path / "a.json", *[{"tokens": "[1 see", "tags": "O B"}] * 2)
    assert load(path, task="token-classification").train[0].text == ["[1", "see"]


def test_a_language_model_takes_the_text_alone(tmp_path: Path) -> None:
    data = load(as_json(tmp_path / "a.json", *[{"text": "x"}] * 2), task="causal-lm")
    assert data.labels == ()
    assert data.train == [Example("x", None)]


def test_many_labels_are_noticed(tmp_path: Path) -> None:
    path = support.write_csv(tmp_path / "a.csv", [(f"t{i % 2}", f"id{i // 2}") for i in range(60)])
    assert "30 different labels in 30 rows: is --label the right column?" in load(path).notices


FAULTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "score": ({}, [{"text": "x", "label": 0.37}], "a.json, row 1: 0.37 is a number, not a class"),
    "list as text": ({}, [{"text": ["x"], "label": 1}], "row 1: expected a text, got a list|token-classification"),
    "list as label": ({}, [{"text": "x", "label": ["a"]}], "row 1: expected a text or a whole number, got a list"),
    "one class": ({}, [{"text": "x", "label": "a"}] * 4, "every row of {path} has the label 'a'"),
    "nothing in it": ({}, [{"text": None, "label": "a"}] * 4, "no row of {path} has a value in 'text' or"),
    "too few to hold back": (
        {"eval_fraction": 0.1},
        [{"text": "x", "label": "a"}, {"text": "x", "label": "b"}],
        "--eval-fraction: 0.1 of 2 rows holds none back|--eval",
    ),
    "tags": (
        {"task": "token-classification"},
        [{"tokens": "a b", "tags": "O O"}, {"tokens": "a b c", "tags": "O O"}],
        "row 2: 2 tags for 3 words",
    ),
    "infinite": ({}, [{"text": "x", "label": float("inf")}], "row 1: inf is a number, not a class"),
    "truth as text": ({}, [{"text": True, "label": 1}], "row 1: expected a text, got a bool"),
    "no word": (
        {"task": "token-classification"},
        [{"tokens": ["a", None], "tags": ["O", "O"]}],
        "--text: |row 1: expected a text, got nothing",
    ),
    "no tag": (
        {"task": "token-classification"},
        [{"tokens": ["a", "b"], "tags": ["O", None]}],
        "--label: |row 1: expected a text or a whole number, got nothing",
    ),
    "words": ({"task": "token-classification"}, [{"tokens": 3, "tags": "O"}], "row 1: expected a list of words, got"),
}


@pytest.mark.parametrize(("more", "rows", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_name_the_argument_and_the_row(
    tmp_path: Path, more: dict[str, Any], rows: list[dict[str, Any]], expected: str
) -> None:
    path = as_json(tmp_path / "a.json", *rows)
    with pytest.raises(UsageError) as caught:
        load(path, **more)
    for part in expected.format(path=path).split("|"):
        assert part in f"{caught.value.message} {caught.value.remedy}"


def test_labels_that_training_lacks_are_named(tmp_path: Path) -> None:
    train = support.write_csv(tmp_path / "a.csv", [("x", "good"), ("y", "bad")])
    evaluation = support.write_csv(tmp_path / "b.csv", [("x", "good"), ("y", "Bad"), ("y", "Bad")])
    with pytest.raises(UsageError) as caught:
        load(train, evaluation=str(evaluation))
    assert caught.value.message == f"--label: {evaluation} has labels that --train lacks: 'Bad' (2x)"
    assert caught.value.remedy == "--train has: 'bad', 'good'."


def test_labels_that_evaluation_lacks_are_noticed(tmp_path: Path) -> None:
    train = support.write_csv(tmp_path / "a.csv", [("x", "good"), ("y", "bad")])
    evaluation = support.write_csv(tmp_path / "b.csv", [("x", "good")])
    assert "labels that the evaluation never meets: bad" in load(train, evaluation=str(evaluation)).notices


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([{"text": "x", "label": 1}, {"text": "y", "label": "2"}], "numbers ({path}, row 1), texts ({path}, row 2)"),
        (
            [{"text": "x", "label": "a"}, {"text": "y", "label": 1}, {"text": "z", "label": True}],
            "texts ({path}, row 1), numbers ({path}, row 2), true or false ({path}, row 3)",
        ),
        ([{"text": "x", "label": 1}, {"text": "y", "label": 0.0}], None),
    ],
    ids=["numbers and texts", "three", "numbers"],
)
def test_labels_of_several_kinds_are_noticed(tmp_path: Path, rows: list[dict[str, Any]], kinds: str | None) -> None:
    path = as_json(tmp_path / "a.json", *rows * 2)
    said = [text for text in load(path).notices if "several kinds" in text]
    assert len(said) == (kinds is not None)
    if kinds is not None:
        assert kinds.format(path=path) in said[0]


def test_evaluation_on_the_training_rows_is_noticed(tmp_path: Path) -> None:
    path = support.write_csv(tmp_path / "a.csv", [("x", "a"), ("y", "b")])
    other = support.write_csv(tmp_path / "b.csv", [("x", "a"), ("y", "b")])
    (tmp_path / "link.csv").symlink_to(path)
    for evaluation, expected in ((path, True), (tmp_path / "link.csv", True), (other, False)):
        notices = load(path, evaluation=str(evaluation)).notices
        assert any("--eval is the same as --train" in text for text in notices) == expected


def test_bytes_of_a_parquet_file_are_the_texts_they_spell(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = {"text": [b"gut", "schön".encode(), b" "], "label": [b"a", b"b", b"a"]}
    parquet.write_table(pyarrow.table(rows), path)
    data = load(path, evaluation=str(path))
    assert data.train == [Example("gut", "a"), Example("schön", "b")]
    words = {"tokens": [[b"New", b"York"]] * 2, "tags": [["B", "I"]] * 2}
    parquet.write_table(pyarrow.table(words), path)
    assert load(path, task="token-classification").train == [Example(["New", "York"], ["B", "I"])]
    parquet.write_table(pyarrow.table({"text": [b"ok", b"\xff"], "label": ["a", "b"]}), path)
    with pytest.raises(UsageError, match=r"--text: .*a.parquet, row 2: bytes that are not UTF-8 \(0xff\)"):
        load(path)


def test_a_date_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [datetime.date(2024, 1, 2)], "label": ["a"]}), path)
    with pytest.raises(UsageError, match="row 1: expected a text, got a date"):
        load(path)


def test_numbers_and_decimals_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [Decimal("1.50"), Decimal("2.25")]
    parquet.write_table(pyarrow.table({"text": texts, "label": ["a", "b"]}), path)
    assert [one.text for one in load(path, evaluation=str(path)).train] == ["1.50", "2.25"]


def test_what_was_got_has_its_article(tmp_path: Path) -> None:
    path = as_json(tmp_path / "a.json", {"tokens": 3, "tags": "a"})
    with pytest.raises(UsageError, match="expected a list of words, got an int"):
        load(path, task="token-classification")


@pytest.mark.parametrize("source", ["x" * 300, "x" * 300 + ".csv", "./" + "x" * 300, "x" * 300 + ":train"])
def test_a_name_too_long_for_a_file_is_not_there(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*arguments: Any) -> None:
        raise FileNotFoundError("not there")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match="--train: "):
        examples.load(Settings(model="none", train=source))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set as the ``datasets`` package saves it, with names for its class numbers."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, 0], "tokens": [["a"], ["b", "c"]], "tags": [[0], [1, 0]]}
    one = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": one, "validation": one}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_data_set_brings_its_splits_and_names(saved: Path) -> None:
    data = examples.load(Settings(model="none", train=str(saved)))
    assert data.labels == ("no", "yes")
    assert data.train == data.evaluation == [Example("a", "yes"), Example("b", "no")]
    assert f"no --eval: evaluating on {saved}:validation" in data.notices
    tags = examples.load(Settings(model="none", train=str(saved), task="token-classification"))
    assert tags.train[1] == Example(["b", "c"], ["B-X", "O"])


def test_the_split_that_was_taken_decides_whether_evaluation_is_on_the_training_rows(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    sources_and_expected = {
        (f"{saved}", f"{saved}"): False,  # its splits train and validation
        (f"{saved}", f"{saved}:validation"): False,
        (f"{saved}", f"{saved}:train"): True,
        (f"{saved}:validation", f"{saved}"): True,
        ("./saved:train", f"{saved}:train"): True,
    }
    for (train, evaluation), expected in sources_and_expected.items():
        notices = examples.load(Settings(model="none", train=train, evaluation=evaluation)).notices
        assert any("--eval is the same as --train" in text for text in notices) == expected, (train, evaluation)


def test_a_configuration_belongs_to_the_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(sources, "_open", lambda *_: datasets.load_from_disk(str(saved)))
    one, other = (sources.load(f"glue:{c}:train", "--train", {"--text": "text"}) for c in ("cola", "sst2"))
    assert one.name == "glue:cola:train"
    assert sources.same(one, one)
    assert not sources.same(one, other)


def test_a_data_set_without_the_column_lists_those_it_has(saved: Path) -> None:
    with pytest.raises(UsageError) as caught:
        examples.load(Settings(model="none", train=str(saved), label="labels"))
    assert caught.value.remedy == "Columns there: text, label, tokens, tags. Did you mean 'label'?"


def test_a_directory_of_files_is_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    support.write_csv(folder / "train.csv", [("x", "a"), ("y", "b")])
    support.write_csv(folder / "test.csv", [("z", "a")])
    data = examples.load(Settings(model="none", train=str(folder)))
    assert (len(data.train), data.evaluation) == (2, [Example("z", "a")])


def test_a_split_that_is_not_there_lists_the_splits(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(sources, "_open", lambda *_: datasets.load_from_disk(str(saved)))
    assert sources.load("owner/name:validation", "--train", {"--text": "text"}).name == "owner/name:validation"
    with pytest.raises(UsageError) as caught:
        sources.load("owner/name:holdout", "--train", {"--text": "text"})
    assert caught.value.message == "--train: data set 'owner/name' has no split 'holdout'"
    assert caught.value.remedy.startswith("Splits there: train, validation.")


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support.write_csv(tmp_path / "train.csv", [("x", "a")])
    (tmp_path / "a.xlsx").write_text("x")
    wanted = {"--text": "text"}

    def error(source: object) -> str:
        with pytest.raises(CliError) as caught:
            sources.load(str(source), "--eval", wanted)
        assert caught.value.exit_code == 2
        return f"{caught.value.message} {caught.value.remedy}"

    assert "Did you mean 'train.csv'?" in error(tmp_path / "tran.csv")
    assert "There is no directory" in error(tmp_path / "no" / "train.csv")
    assert "unknown format '.xlsx' Use one of .csv .tsv" in error(tmp_path / "a.xlsx")
    assert "too many parts" in error("a:b:c:d")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert 'pip install "embedkernels[datasets]"' in error("imdb")


def test_a_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*arguments: Any) -> None:
        raise ConnectionError("Couldn't reach 'imdb' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError) as caught:
        sources.load("imdb", "--train", {"--text": "text"})
    assert (
        "neither a file nor a data set that can be loaded (Couldn't reach 'imdb' on the Hub)" in caught.value.message
    )

"""The demo's data: what its figures rest on."""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests.cli import support

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def test_reviews_are_shuffled_balanced_and_apart(demo: ModuleType, tmp_path: Path) -> None:
    train, evaluation = map(rows, demo.write_reviews(tmp_path, 0))
    assert (len(train), len(evaluation)) == (7730, 800)
    for part in (train, evaluation, train[:1000]):
        share = Counter(label for _, label in part)["positive"] / len(part)
        assert 0.45 < share < 0.55
    assert len({text for text, _ in train} & {text for text, _ in evaluation}) == 0


def test_the_seed_decides_the_order(demo: ModuleType, tmp_path: Path) -> None:
    first, same, other = (rows(demo.write_reviews(tmp_path / str(i), seed)[1]) for i, seed in enumerate((0, 0, 1)))
    assert first == same != other


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--steps", "-3"), "error --steps: must be at least 1, got -3"),
        (("--steps", "0"), "error --steps: must be at least 1, got 0"),
        (("--seed", "-1"), "error --seed: must lie between 0"),
        (("--output", "/dev/null/zz"), "error --output: /dev/null/zz-data, for the reviews, cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_told(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        demo.main()
    assert caught.value.code == 2
    assert expected in support.said(capsys.readouterr().err)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_a_missing_package_is_named(demo: ModuleType) -> None:
    with pytest.raises(SystemExit, match="the demo needs the package no-such-package"):
        demo.package("no_such_package", "no-such-package")

"""Results are strict JSON, whatever was measured."""

from __future__ import annotations

import json
from pathlib import Path

from bench.files import read_json, write_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_infinities_become_null_and_a_text(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    write_json(path, {"ratios": {"y": float("inf"), "z": 2.0}, "times": [1.0, float("nan")], "n": None})
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"ratios": {"y": None, "y_text": "inf", "z": 2.0}, "times": [1.0, None], "n": None}
    assert read_json(path) == found
    assert [file.name for file in tmp_path.iterdir()] == ["some.json"]


def test_what_was_never_written_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "nothing.json") is None

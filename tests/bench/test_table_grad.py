"""The suite of a table's gradient: its floors, and that every contestant is right in every mode."""

from __future__ import annotations

import pytest
import torch

from bench import check, table_grad

CPU = torch.device("cpu")
ROW, COUNT, ROWS, USED = 64 * 2, 100, 1000, 60


@pytest.mark.parametrize(
    ("mode", "buffer", "floor"),
    [
        ("dense", "", {"training": 8 * COUNT + COUNT * ROW + ROWS * ROW}),
        ("accumulate", "", {"training": 8 * COUNT + COUNT * ROW + 2 * USED * ROW}),
        ("accumulate", "float32", {"training": 8 * COUNT + COUNT * ROW + 2 * USED * 2 * ROW}),
        ("rows", "", {"training": 8 * COUNT + COUNT * ROW + USED * ROW}),
        ("plan", "", {"forward": 12 * COUNT + 8 * USED}),
        (
            "lookup",
            "",
            {
                "forward": 8 * COUNT + USED * ROW + COUNT * ROW,
                "training": 2 * 8 * COUNT + USED * ROW + 2 * COUNT * ROW + ROWS * ROW,
            },
        ),
    ],
)
def test_floors_count_what_must_move(mode: str, buffer: str, floor: dict[str, int]) -> None:
    case = table_grad.GradCase("one", COUNT, ROWS, 64, mode=mode, buffer=buffer)
    x = table_grad.inputs(case, CPU)
    x.used = USED
    assert table_grad.floors(case, x) == {name: (count, 0) for name, count in floor.items()}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mode", ["dense", "accumulate", "rows", "plan", "lookup"])
def test_every_contestant_is_right(mode: str, padding: bool) -> None:
    """Those that can run here and have that mode; the others say why they have not."""
    if mode in ("lookup", "plan") and padding:
        pytest.skip("no such case")
    case = table_grad.GradCase("one", 300, 90, 16, ids="hot", padding=padding, mode=mode, dtype="float32")
    x = table_grad.inputs(case, CPU)
    wanted, yardstick, ran = table_grad.expected(x), {}, []
    for rival in table_grad.contestants(tiny=True):
        try:
            result = rival.build(x, 0.0).training()
        except (NotImplementedError, RuntimeError):
            continue
        yardstick = yardstick or check.measure_yardstick(result, wanted)
        verdict = check.judge(result, wanted, yardstick, check.OUR_LIMIT)
        assert verdict.ok, f"{rival.name}: {verdict.detail}"
        ran.append(rival.name)
    assert ran[:2] == ["eager", "ours"]


def test_positions_come_one_after_the_other() -> None:
    x = table_grad.inputs(table_grad.GradCase("positions", 10, 4, 8, ids="cycle"), CPU)
    assert x.ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]

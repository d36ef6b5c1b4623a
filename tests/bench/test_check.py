"""Wrong results are called wrong, whatever is wrong with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import check

EXPECTED = torch.linspace(-1, 1, 97, dtype=torch.float64)


def judged(actual: Tensor, limit: float = 2.0, error: float = 1e-6) -> check.Verdict:
    yardstick = {"y": check.Errors(error, error, 1.0)}
    return check.judge({"y": actual}, {"y": EXPECTED}, yardstick, limit)


def test_a_result_as_good_as_the_yardstick_is_right() -> None:
    verdict = judged(EXPECTED.float())
    assert verdict.ok
    assert verdict.detail == ""
    assert verdict.ratios["y"] < 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t[:-1], "shape"),
        (lambda t: t.clone().index_fill_(0, torch.tensor([5]), float("nan")), "1 elements are not finite"),
        (lambda t: t.clone().index_fill_(0, torch.tensor([5]), float("inf")), "1 elements are not finite"),
        (lambda t: t.clone().index_fill_(0, torch.tensor([0]), 0.0), "largest error 1.000e+00"),
        (lambda t: t + 1.9e-6, "rms error"),
        (lambda t: torch.zeros_like(t), "largest error"),
    ],
    ids=["shape", "nan", "inf", "one element", "everywhere a little", "zeros"],
)
def test_a_spoilt_result_is_wrong(spoil: object, says: str) -> None:
    # The rms of the yardstick is half of its largest error, as it is for evenly spread errors.
    yardstick = {"y": check.Errors(1e-6, 0.5e-6, 1.0)}
    verdict = check.judge({"y": spoil(EXPECTED.float())}, {"y": EXPECTED}, yardstick, 2.0)  # type: ignore[operator]
    assert not verdict.ok
    assert says in verdict.detail


def test_a_missing_tensor_is_wrong() -> None:
    verdict = check.judge({}, {"y": EXPECTED}, {"y": check.Errors(0.0, 0.0, 1.0)}, 2.0)
    assert not verdict.ok
    assert "y is missing" in verdict.detail


def test_the_limit_is_what_separates_us_from_rivals() -> None:
    off = (EXPECTED + 5e-6).float()
    assert not judged(off, check.OUR_LIMIT).ok
    assert judged(off, check.RIVAL_LIMIT).ok


def test_an_exact_yardstick_leaves_one_unit_in_the_last_place() -> None:
    ulp = torch.finfo(torch.float32).eps
    assert judged((EXPECTED + 0.4 * ulp).float(), error=0.0).ok
    assert not judged((EXPECTED + 4 * ulp).float(), error=0.0).ok


def test_errors_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    actual, expected = torch.randn(11, 13), torch.randn(11, 13, dtype=torch.float64)
    whole = check.errors(actual, expected)
    monkeypatch.setattr(check, "PIECE", 7)
    pieces = check.errors(actual, expected)
    assert pieces.largest == whole.largest
    assert pieces.scale == whole.scale
    assert pieces.rms == pytest.approx(whole.rms)
    assert whole.largest == float((actual.double() - expected).abs().max())


def test_a_yardstick_far_from_the_reference_is_refused() -> None:
    """Else a wrong reference would let every result pass."""
    with pytest.raises(ValueError, match="PyTorch and the reference differ"):
        check.measure_yardstick({"y": -EXPECTED.float()}, {"y": EXPECTED})
    with pytest.raises(ValueError, match="PyTorch and the reference differ"):
        check.measure_yardstick({"y": EXPECTED.float() * float("nan")}, {"y": EXPECTED})

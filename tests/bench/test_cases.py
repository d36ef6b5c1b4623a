"""The data that is measured on is what it says it is."""

from __future__ import annotations

import pytest
import torch

from bench import cases, front_end, table_grad


def ids_of(distribution: str, count: int = 50_000, rows: int = 1000) -> torch.Tensor:
    return cases.make_ids(count, rows, distribution, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("distribution", ["uniform", "zipf", "hot"])
def test_ids_are_in_range_and_leave_zero_to_padding(distribution: str) -> None:
    ids = ids_of(distribution)
    assert ids.dtype == torch.int64
    assert int(ids.min()) >= 1
    assert int(ids.max()) < 1000
    assert torch.equal(ids, ids_of(distribution)), "the same seed must give the same ids"


def shares(distribution: str) -> torch.Tensor:
    counts = ids_of(distribution).bincount().double()
    return (counts / counts.sum()).sort(descending=True).values


def test_uniform_ids_have_no_favourite() -> None:
    assert float(shares("uniform")[0]) < 0.003


def test_zipf_ids_follow_one_over_rank() -> None:
    found = shares("zipf")
    harmonic = float((1 / torch.arange(1, 1000, dtype=torch.float64)).sum())
    assert float(found[0]) == pytest.approx(1 / harmonic, rel=0.05)
    assert float(found[9]) == pytest.approx(0.1 / harmonic, rel=0.1)


def test_the_hot_row_has_half_of_all_ids() -> None:
    assert float(shares("hot")[0]) == pytest.approx(cases.HOT_SHARE, abs=0.02 + 0.14)
    assert float(shares("hot")[0]) >= cases.HOT_SHARE - 0.02


def test_an_unknown_distribution_is_named() -> None:
    with pytest.raises(ValueError, match="got 'normal'"):
        ids_of("normal")


@pytest.mark.parametrize(
    ("batch", "length", "fill"), [(32, 128, 0.53), (16, 512, 0.53), (4, 2048, 0.75), (1, 9, 1.0)]
)
def test_lengths_fill_as_much_as_asked(batch: int, length: int, fill: float) -> None:
    lengths = cases.make_lengths(batch, length, fill)
    assert lengths.dtype == torch.int32
    assert lengths.shape == (batch,)
    assert int(lengths.max()) == length
    assert int(lengths.min()) >= 1
    assert float(lengths.float().mean()) / length == pytest.approx(fill, abs=0.01)


def test_a_fill_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="fill must be in"):
        cases.make_lengths(4, 8, 0.3)


@pytest.mark.parametrize("suite", [front_end.CASES, table_grad.CASES, cases.ATTENTION, cases.ROPE, cases.STEP])
def test_names_are_unique_and_tiny_cases_keep_what_distinguishes_them(suite: tuple[front_end.EmbedCase, ...]) -> None:
    assert len({case.name for case in suite}) == len(suite)
    for case in suite:
        tiny = case.tiny()
        assert tiny.name == case.name
        assert tiny.dropout == case.dropout
        assert getattr(tiny, "dtype", None) == getattr(case, "dtype", None)
        assert getattr(tiny, "fill", None) == getattr(case, "fill", None)


def test_grouped_heads_stay_grouped_when_tiny() -> None:
    grouped = [case for case in cases.ATTENTION if case.kv_heads < case.heads]
    assert grouped
    assert all(case.tiny().kv_heads < case.tiny().heads for case in grouped)

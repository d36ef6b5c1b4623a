"""The Triton kernels of the gradient by themselves: every mode, dtype and option against sums in float64.

Tables in which a row must not be touched hold NaN there, and so does the workspace before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from embedkernels.kernels import embedding_grad as kernels
from embedkernels.ops.backend import triton_problem
from embedkernels.reference.embedding import embedding_plan
from embedkernels.reference.random import philox
from tests.contract import assert_within_contract, poisoned
from tests.embedding.cases import DISTRIBUTIONS, equal, fits, hot, poisoned_memory, uniform, zipf
from tests.properties import examples

pytestmark = pytest.mark.skipif(triton_problem() is not None, reason=str(triton_problem()))

DENSE, ACCUMULATE, ROWS, PADDED_ROWS = range(4)
MODES = {"dense": DENSE, "accumulate": ACCUMULATE, "rows": ROWS, "padded rows": PADDED_ROWS}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

FLOAT, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = {
    "fp32": (FLOAT, FLOAT), "bf16": (BF16, BF16), "fp16": (HALF, HALF), "fp64": (DOUBLE, DOUBLE),
    "bf16 to fp32": (BF16, FLOAT), "fp16 to fp32": (HALF, FLOAT), "fp32 to bf16": (FLOAT, BF16),
    "fp32 to fp16": (FLOAT, HALF),
}  # fmt: skip

Plan = tuple[Tensor, Tensor, Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    return DOUBLE if dtype == DOUBLE else FLOAT


def at_most(n: int, device: torch.device, interpreted: int) -> int:
    return fits("triton", device, n, interpreted)


def segments_of(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and lengths of a plan's segments and its kept positions, on the CPU."""
    order, ids, offsets, count = (part.cpu().long() for part in plan)
    offsets = offsets[: int(count) + 1]
    return ids[: int(count)], offsets.diff(), order[: int(offsets[-1])]


def segment_sums(
    dtype: torch.dtype, grad_rows: Tensor, plan: Plan, sources: Tensor | None, weights: Tensor | None, scale: bool
) -> Tensor:
    """One position after the other, in ``dtype``."""
    _, lengths, positions = segments_of(plan)
    taken = positions if sources is None else sources.cpu().long()[positions]
    known = (taken >= 0) & (taken < len(grad_rows))
    terms = grad_rows.cpu()[taken[known]].to(dtype)
    if weights is not None:
        terms = terms * weights.cpu().to(dtype)[positions[known], None]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums = torch.zeros(len(lengths), grad_rows.shape[1], dtype=dtype).index_add_(0, segment[known], terms)
    return sums / lengths[:, None] if scale else sums


def placed(sums: Tensor, before: Tensor, plan: Plan, mode: int) -> tuple[Tensor, Tensor]:
    """``out`` in the dtype of ``sums``, and which of its rows are written."""
    out = before.to("cpu", sums.dtype, copy=True)
    written = torch.full((len(out),), mode in (DENSE, PADDED_ROWS))
    if mode in (DENSE, PADDED_ROWS):
        out.zero_()
    rows = segments_of(plan)[0] if mode in (DENSE, ACCUMULATE) else torch.arange(len(sums))
    there = rows < len(out)
    written[rows[there]] = True
    out[rows[there]] = sums[there] + (out[rows[there]] if mode == ACCUMULATE else 0)
    return out, written


def before_of(plan: Plan, rows: int, width: int, mode: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN, but for what is added to."""
    before = poisoned(rows, width, dtype=dtype, device=device)
    if mode == ACCUMULATE:
        used = segments_of(plan)[0]
        used = used[used < rows].to(device)
        before[used] = torch.randn(len(used), width, device=device).to(dtype)
    return before


def run(before: Tensor, grad_rows: Tensor, plan: Plan, mode: int, **options: object) -> Tensor:
    """``out`` after the call; the rows around it, in the same memory, must not change."""
    around = poisoned(len(before) + 2, before.shape[1], dtype=before.dtype, device=before.device)
    out = around[1:-1].copy_(before)
    with poisoned_memory():
        kernels.embedding_grad(out, grad_rows, *plan, mode, **options)  # type: ignore[arg-type]
    assert around[[0, -1]].isnan().all(), "written out of bounds"
    return out


def check(
    before: Tensor, grad_rows: Tensor, plan: Plan, mode: int, sources: Tensor | None = None,
    weights: Tensor | None = None, scale_by_freq: bool = False, what: str = "",
) -> None:  # fmt: skip
    """As close to the sums in float64 as PyTorch's own sums in fp32, rounded once."""
    options = {"sources": sources, "weights": weights, "scale_by_freq": scale_by_freq}
    ours = run(before, grad_rows, plan, mode, **options).cpu()
    parts = (grad_rows, plan, sources, weights, scale_by_freq)
    theirs, _ = placed(segment_sums(wide(grad_rows.dtype), *parts), before, plan, mode)
    expected, written = placed(segment_sums(DOUBLE, *parts), before, plan, mode)
    assert ours[~written].isnan().all(), f"{what}: another row is written"
    if before.dtype == DOUBLE:  # then the sums in float64 are PyTorch's own
        assert float((ours[written] - expected[written]).abs().max()) < 1e-12, what
    else:
        assert_within_contract(ours[written], theirs.to(before.dtype)[written], expected[written], what)


def check_options(n: int, rows: int, width: int, mode: int, device: torch.device) -> None:
    """Everything at once, in bf16, on a hot row and others."""
    plan = embedding_plan(hot(n, rows).to(device), rows, 0)
    before = before_of(plan, rows, width, mode, BF16, device)
    grad_rows = torch.randn(n // 2 + 1, width, device=device).to(BF16)
    sources = torch.randint(0, len(grad_rows), (n,), dtype=torch.int32, device=device)
    check(before, grad_rows, plan, mode, sources, torch.rand(n, device=device), True, f"{n} ids on {rows} rows")


@modes
@pytest.mark.parametrize("pair", PAIRS)
def test_every_mode_in_every_pair_of_dtypes(mode: int, pair: str, device: torch.device) -> None:
    """Added in fp32 (fp64 for double) and rounded once, to nearest."""
    dtype, out_dtype = PAIRS[pair]
    width = at_most(384, device, 20)
    for n, rows in [(20_000, 3000), (3000, 30)]:
        n, rows = at_most(n, device, 75), at_most(rows, device, 70)
        plan = embedding_plan(zipf(n, rows).to(device), rows, 0)
        grad_rows = torch.randn(n, width, device=device).to(dtype)
        check(before_of(plan, rows, width, mode, out_dtype, device), grad_rows, plan, mode, what=f"{n} ids")


@modes
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_mode_on_every_distribution(mode: int, distribution: str, device: torch.device) -> None:
    n, rows = at_most(5000, device, 100), 70
    plan = embedding_plan(DISTRIBUTIONS[distribution](n, rows).to(device), rows, 0)
    grad_rows = torch.randn(n, 16, device=device)
    check(before_of(plan, rows, 16, mode, FLOAT, device), grad_rows, plan, mode)


@modes
@pytest.mark.parametrize("distribution", [equal, hot, uniform])
def test_carries_over_many_tiles(
    mode: int, distribution: Callable[[int, int], Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of one group: segments over more of them than a carry program takes at a time."""
    monkeypatch.setattr(kernels, "MIN_ROWS", kernels.GROUP)
    monkeypatch.setattr(kernels, "CARRY_ROWS", 8)
    n = (2 * kernels.CARRY_ROWS + 5) * kernels.GROUP + 3
    plan = embedding_plan(distribution(n, 12).to(device), 12)
    grad_rows = torch.randn(n, 3, device=device)
    weights = torch.randn(n, device=device)
    check(before_of(plan, 12, 3, mode, FLOAT, device), grad_rows, plan, mode, None, weights, True)


@pytest.mark.parametrize("pair", ["bf16", "fp32 to bf16", "fp16"])
def test_what_a_row_holds_is_added_before_anything_is_rounded(
    pair: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum lies between two numbers of the dtype, and what is left of it must not have been rounded away."""
    monkeypatch.setattr(kernels, "MIN_ROWS", kernels.GROUP)
    dtype, out_dtype = PAIRS[pair]
    plan = embedding_plan(torch.tensor([0] * 3 + [1] * 16, device=device), 2)
    large = 2 / torch.finfo(out_dtype).eps  # the next number is large + 2
    grad_rows = torch.tensor([large / 2, large / 2, 1.0, large, 1.0] + [0.0] * 14, device=device)
    before = torch.full((2, 1), -large, dtype=out_dtype, device=device)
    out = run(before, grad_rows[:, None].to(dtype), plan, ACCUMULATE)
    assert out.tolist() == [[1.0], [1.0]]


@modes
def test_same_bits_in_every_run(mode: int, device: torch.device) -> None:
    n = at_most(50_000, device, 100)
    plan = embedding_plan(hot(n, 50).to(device), 50)
    grad_rows, weights = torch.randn(n, 8, device=device), torch.rand(n, device=device)
    before = before_of(plan, 50, 8, mode, FLOAT, device)
    results = [run(before, grad_rows, plan, mode, weights=weights).view(torch.int32) for _ in range(2)]
    assert torch.equal(*results)


@modes
def test_all_options_at_once(mode: int, device: torch.device) -> None:
    """More than one block of columns, tiles and zero programs; then many rows."""
    check_options(140, 70, 300, mode, device)
    check_options(at_most(50_000, device, 70), at_most(9000, device, 200), 64, mode, device)


@modes
def test_sources_that_do_not_exist_add_nothing(mode: int, device: torch.device) -> None:
    """Nor does their weight, whatever it is; a segment without any source is still written."""
    plan = embedding_plan(torch.tensor([3, 1, 3, 1, 5, 3, 5, 3], device=device), 7)
    sources = torch.tensor([0, -1, 4, 5, -(2**31), 2**31 - 1, 5, 1], dtype=torch.int32, device=device)
    weights = torch.full((8,), math.inf, device=device)
    weights[[0, 2, 7]] = torch.tensor([2.0, -1.0, 0.5], device=device)
    grad_rows = torch.randn(5, 6, device=device)
    for rows in (grad_rows, grad_rows[:0]):
        for factors in (weights, None):
            before = before_of(plan, 7, 6, mode, FLOAT, device)
            check(before, rows, plan, mode, sources, factors, what=f"{len(rows)} rows")


@modes
def test_a_row_may_be_the_source_of_many_positions(mode: int, device: torch.device) -> None:
    """More positions than rows, as where a model adds one row to several tables."""
    n = at_most(3000, device, 100)
    plan = embedding_plan(zipf(n, 40).to(device), 40)
    grad_rows = torch.randn(7, 24, device=device).to(BF16)
    sources = torch.arange(n, dtype=torch.int32, device=device) % 7
    check(before_of(plan, 40, 24, mode, FLOAT, device), grad_rows, plan, mode, sources)


@modes
def test_weights_of_double_are_not_rounded(mode: int, device: torch.device) -> None:
    plan = embedding_plan(zipf(80, 9).to(device), 9)
    grad_rows, weights = torch.randn(80, 5, dtype=DOUBLE, device=device), torch.rand(80, dtype=DOUBLE, device=device)
    check(before_of(plan, 9, 5, mode, DOUBLE, device), grad_rows, plan, mode, None, weights, True)


def test_a_frequency_is_divided_by_as_a_whole(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the segment is cut into tiles, and a source that does not exist counts as a position."""
    monkeypatch.setattr(kernels, "MIN_ROWS", kernels.GROUP)
    plan = embedding_plan(torch.tensor([1] * 3 + [2] * 50 + [4], device=device), 5)
    sources = torch.zeros(54, dtype=torch.int32, device=device)
    sources[0] = -1
    grad_rows = torch.full((1, 4), 3.0, device=device)
    out = run(poisoned(5, 4, dtype=FLOAT, device=device), grad_rows, plan, DENSE, sources=sources, scale_by_freq=True)
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([0.0, 2.0, 3.0, 0.0, 3.0]))


@modes
def test_rows_at_any_stride(mode: int, device: torch.device) -> None:
    wide_rows = torch.randn(70, 40, device=device)
    plan = embedding_plan(hot(70, 9).to(device), 9)
    for name, grad_rows in [
        ("slice", wide_rows[:, 3:36]),
        ("aligned slice", torch.randn(70, 64, device=device)[:, 16:48]),
        ("every other row", torch.randn(140, 33, device=device)[::2]),
        ("overlapping rows", wide_rows.view(-1).as_strided((70, 33), (1, 1))),
        ("expanded", torch.randn(1, 33, device=device).expand(70, 33)),
        ("expanded, aligned", torch.randn(1, 32, device=device).expand(70, 32)),
        ("expanded, one column", torch.randn(1, 1, device=device).expand(70, 1)),
    ]:
        before = before_of(plan, 9, grad_rows.shape[1], mode, FLOAT, device)
        check(before, grad_rows, plan, mode, what=name)


@modes
@pytest.mark.parametrize("there", [0, 1, 40, 64, 65])
def test_rows_that_the_output_lacks_are_left_out(
    mode: int, there: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of a larger table, or of more segments: also where a segment is cut into tiles."""
    monkeypatch.setattr(kernels, "MIN_ROWS", kernels.GROUP)
    ids = torch.cat((torch.arange(0, 200, 2), torch.full((40,), 199), torch.full((20,), 64)))
    plan = embedding_plan(ids.to(device), 200)
    grad_rows = torch.randn(len(ids), 5, device=device)
    check(before_of(plan, there, 5, mode, FLOAT, device), grad_rows, plan, mode)


@modes
@pytest.mark.parametrize("room", [0, 1, 63, 64, 65, 130])
def test_outputs_with_room_for_more(mode: int, room: int, device: torch.device) -> None:
    """PADDED_ROWS fills up with zeros, ROWS leaves what is there."""
    plan = embedding_plan(torch.tensor([2, 0, 2, 9, 5], device=device), 6)
    grad_rows = torch.randn(5, 4, device=device).to(HALF)
    check(before_of(plan, 6 + room, 4, mode, HALF, device), grad_rows, plan, mode)


@modes
@pytest.mark.parametrize("kept", [False, True])
def test_nothing_to_add(mode: int, kept: bool, device: torch.device) -> None:
    """No positions, none that are kept, no columns, no rows: what must be zeros is, and the rest is left alone."""
    for n, rows, width in [(0, 5, 4), (0, 70, 4), (5, 0, 4), (5, 5, 0), (0, 0, 4), (0, 5, 0), (100, 5, 4)]:
        ids = torch.full((n,), 1 if kept and (rows == 0 or width == 0) else -1, device=device)
        plan = embedding_plan(ids, 2)
        before = poisoned(rows, width, dtype=FLOAT, device=device)
        after = run(before, torch.randn(n, width, device=device), plan, mode)
        expected = torch.zeros_like(before) if mode in (DENSE, PADDED_ROWS) else before
        assert torch.equal(after.nan_to_num(7.0), expected.nan_to_num(7.0)), (n, rows, width)


@modes
def test_what_a_plan_holds_behind_its_last_segment_means_nothing(mode: int, device: torch.device) -> None:
    ids = uniform(90, 60).to(device)
    plan = embedding_plan(ids, 30, 3)
    rows, _, positions = segments_of(plan)
    for part, used in zip(plan[:3], (len(positions), len(rows), len(rows) + 1), strict=True):
        part[used:] = torch.randint(-(2**31), 2**31, part[used:].shape)
    sources = torch.randint(0, 90, (90,), dtype=torch.int32, device=device)
    sources[(ids >= 30) | (ids == 3)] = 2**31 - 1
    check(before_of(plan, 30, 5, mode, FLOAT, device), torch.randn(90, 5, device=device), plan, mode, sources)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_the_workspace_is_small(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """N·D/8 bytes and one tile, whatever N; the ids are all dropped, so that no row is read."""
    taken: list[int] = []
    empty = torch.empty

    def recorded(*args, **keywords):  # type: ignore[no-untyped-def]
        made = empty(*args, **keywords)
        taken.append(made.numel() * made.itemsize)
        return made

    for n in (1, 64, 65, 1000, 8193):
        plan = embedding_plan(torch.full((n,), -1, device=device), 4)
        grad_rows = torch.zeros(1, 64, dtype=dtype, device=device).expand(n, 64)
        out = torch.zeros(4, 64, dtype=dtype, device=device)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", recorded)
            kernels.embedding_grad(out, grad_rows, *plan, ACCUMULATE)
        owners = 4 * -(-n // kernels.MIN_ROWS)
        assert 0 < sum(taken) <= n * 64 / 8 + 2 * 64 * dtype.itemsize + owners
        taken.clear()


def test_tiles_hold_whole_groups_and_stay_few() -> None:
    """Where a tile ended within a group, segments of the next could end in it. Two sums a tile are the workspace."""
    for n in (1, 63, 64, 65, 65_536, 65_537, 131_073, 1_000_000, 2**31 - 1):
        for dtype in (FLOAT, DOUBLE):
            rows = kernels.tile_rows(n, dtype)
            tiles = -(-n // rows)
            assert all(rows % kernels.group_rows(mode) == 0 for mode in MODES.values())
            assert tiles <= kernels.MAX_TILES
            assert 2 * dtype.itemsize * (tiles - 1) <= n / 8


def rounding_bits(seed: int, rows: Tensor, width: int) -> Tensor:
    """The 16 bits of every column of the given rows, by the plain PyTorch generator."""
    groups = torch.arange(-(-width // 8))[None, :]
    words = torch.stack(philox(seed, groups, rows[:, None]), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(len(rows), -1)[:, :width]


def stochastic(values: Tensor, random: Tensor) -> Tensor:
    """Finite fp32 ``values`` as bf16."""
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    return ((bits + random) >> 16).to(torch.int32).to(torch.int16).view(BF16)


@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=str)
@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("seed", [0, 2**32 + 17, -5])
def test_stochastic_rounding_gives_the_very_bits(
    seed: int, width: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole segments and of cut ones, in rows and columns near and far; multiples of 2**-9 add exactly in fp32."""
    monkeypatch.setattr(kernels, "MIN_ROWS", kernels.GROUP)
    table_rows = 70_000
    ids = torch.tensor([5] * 21 + [0, 7, 7, 69_999, 1000, 32_768, 65_536])
    plan = embedding_plan(ids.to(device), table_rows)
    used = segments_of(plan)[0]
    before = before_of(plan, table_rows, width, ACCUMULATE, BF16, device)
    before[used.to(device)] = (torch.randint(-(2**7), 2**7, (len(used), width)) / 8).to(BF16).to(device)
    grad_rows = torch.randint(-(2**7), 2**7, (len(ids), width)) / 2**9
    grad_rows = grad_rows.to(dtype).to(device)
    values, _ = placed(segment_sums(FLOAT, grad_rows, plan, None, None, False), before, plan, ACCUMULATE)
    expected = stochastic(values[used], rounding_bits(seed, used, width))
    assert not torch.equal(expected, values[used].to(BF16)), "nothing is rounded"
    given_seed = torch.tensor([seed], device=device)
    ours = run(before, grad_rows, plan, ACCUMULATE, seed=given_seed).cpu()
    assert torch.equal(ours[used].view(torch.int16), expected.view(torch.int16))
    ours[used] = math.nan
    assert ours.isnan().all(), "another row written"


def test_stochastic_rounding_takes_every_option(device: torch.device) -> None:
    """What is rounded is the weighted and scaled sum and what the row held: off by less than a unit."""
    n, rows, width = at_most(3000, device, 90), 12, 40
    plan = embedding_plan(hot(n, rows).to(device), rows)
    before = before_of(plan, rows, width, ACCUMULATE, BF16, device)
    grad_rows = torch.randn(50, width, device=device)
    sources = torch.randint(0, 60, (n,), dtype=torch.int32, device=device)
    options = {"sources": sources, "weights": torch.rand(n, device=device), "scale_by_freq": True}
    ours = run(before, grad_rows, plan, ACCUMULATE, seed=torch.tensor([3], device=device), **options).cpu()
    expected, _ = placed(segment_sums(DOUBLE, grad_rows, plan, *options.values()), before, plan, ACCUMULATE)
    # Its neighbours in bf16, but for fp32's own error.
    off = (ours.double() - expected).abs()
    assert (off <= expected.abs() * 2**-7 + 1e-5).all()
    assert not torch.equal(ours, expected.to(BF16))


def test_stochastic_rounding_is_unbiased(device: torch.device) -> None:
    """Up as often as what is cut off is of a unit, whatever the sign; each seed on its own."""
    rows, width = 8, 1024
    plan = embedding_plan(torch.arange(rows, device=device), rows)
    outcomes = []
    for seed, share in [(1, 0.25), (2, 0.25), (3, 0.9), (4, 0.0)]:
        for sign in (1.0, -1.0):
            before = torch.full((rows, width), sign, device=device).to(BF16)
            grad_rows = torch.full((rows, width), sign * share * 2**-7, device=device)  # a unit at 1 is 2**-7
            ours = run(before, grad_rows, plan, ACCUMULATE, seed=torch.tensor([seed], device=device)).float().cpu()
            up = ((ours * sign - 1) * 2**7).double()
            assert torch.equal(up * (1 - up), torch.zeros_like(up)), "neither neighbour"
            spread = math.sqrt(share * (1 - share) / up.numel())
            assert abs(float(up.mean()) - share) <= 5 * spread
            for dim in (0, 1):  # no row or column has a bias of its own
                along = up.mean(dim)
                assert float((along - share).abs().max()) <= 5 * math.sqrt(share * (1 - share) / up.shape[dim])
            outcomes.append(up)
    assert torch.equal(outcomes[0], outcomes[1]), "the sign matters"
    assert not torch.equal(outcomes[0], outcomes[2]), "the seed does not matter"


def test_stochastic_rounding_of_what_is_not_finite(device: torch.device) -> None:
    """Infinities and NaN stay: bits added to a NaN could make it zero. Numbers of bf16 are never moved."""
    largest = torch.finfo(BF16).max
    values = torch.tensor([math.inf, -math.inf, largest, -largest, 0.0, 2.0**-126, 2.0**-133, 0, 0, 0, 0])
    # NaN with the highest and the lowest payloads.
    values[-4:] = torch.tensor([2**31 - 1, -1, 0x7FC00001, 0x7F800001], dtype=torch.int32).view(FLOAT)
    plan = embedding_plan(torch.zeros(1, dtype=torch.int64, device=device), 1)
    before = torch.zeros(1, len(values), dtype=BF16, device=device)
    for seed in range(5):
        given_seed = torch.tensor([seed], device=device)
        ours = run(before, values[None].to(device), plan, ACCUMULATE, seed=given_seed)[0].float().cpu()
        torch.testing.assert_close(ours, values, rtol=0, atol=0, equal_nan=True)


@examples(50)
@given(data=st.data())
def test_anything_at_all(device: torch.device, data: st.DataObject) -> None:
    """Small integers and powers of two add exactly in fp32: the very number, rounded once."""
    mode = data.draw(st.sampled_from(list(MODES.values())))
    dtype, out_dtype = PAIRS[data.draw(st.sampled_from(list(PAIRS)))]
    plan_rows = data.draw(st.integers(1, 140))
    out_rows = data.draw(st.integers(0, 140))
    width = data.draw(st.sampled_from([3, 8]))  # a GPU compiles for each
    values = data.draw(st.lists(st.integers(-1, plan_rows), max_size=140))
    ids, n = torch.tensor(values, dtype=torch.int64, device=device), len(values)
    plan = embedding_plan(ids, plan_rows, data.draw(st.integers(-1, plan_rows - 1)))
    generator = torch.Generator().manual_seed(n)
    sources = weights = None
    given_rows = n
    if data.draw(st.booleans()):
        given_rows = data.draw(st.integers(0, 50))
        sources = torch.randint(-2, given_rows + 2, (n,), generator=generator, dtype=torch.int32).to(device)
    if data.draw(st.booleans()):
        weights = 2.0 ** torch.randint(-2, 3, (n,), generator=generator).to(device, wide(dtype))
    grad_rows = torch.randint(-8, 9, (given_rows, width), generator=generator).to(device, dtype)
    before = poisoned(out_rows, width, dtype=out_dtype, device=device)
    if mode == ACCUMULATE:
        before = torch.randint(-8, 9, before.shape, generator=generator).to(device, out_dtype)
    expected, _ = placed(segment_sums(DOUBLE, grad_rows, plan, sources, weights, False), before, plan, mode)
    ours = run(before, grad_rows, plan, mode, sources=sources, weights=weights).cpu()
    assert torch.equal(ours.nan_to_num(1e3), expected.to(out_dtype).nan_to_num(1e3))


@pytest.mark.gpu
def test_other_sizes_compile_nothing_new(device: torch.device) -> None:
    """Neither N nor the number of rows is part of a compiled kernel."""

    def compiled() -> list[int]:
        both = (kernels.embedding_grad_tile_kernel, kernels.embedding_grad_carry_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in both]

    def call(n: int, rows: int, given_rows: int) -> None:
        plan = embedding_plan(uniform(n, rows).to(device), rows)
        sources = torch.zeros(n, dtype=torch.int32, device=device)
        out, grad_rows = torch.zeros(rows, 48, device=device), torch.zeros(given_rows, 48, device=device)
        kernels.embedding_grad(out, grad_rows, *plan, DENSE, sources)

    call(1000, 50, 20)
    before = compiled()
    for n, rows, given_rows in [(65, 1, 1), (128, 16, 16), (4096, 4096, 32), (200_001, 17, 3), (1 << 20, 64, 1)]:
        call(n, rows, given_rows)
    assert compiled() == before


@pytest.mark.gpu
def test_a_captured_call_draws_again(device: torch.device) -> None:
    """Nothing waits for the device, and the seed is read in each replay."""
    plan = embedding_plan(torch.arange(64, device=device), 64)
    grad_rows = torch.full((64, 128), 0.3, device=device)
    out = torch.ones(64, 128, dtype=BF16, device=device)
    seed = torch.tensor([1], device=device)
    kernels.embedding_grad(out, grad_rows, *plan, ACCUMULATE, seed=seed)  # compile first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.embedding_grad(out, grad_rows, *plan, ACCUMULATE, seed=seed)
    results = []
    for number in (5, 6, 5):
        seed.fill_(number)
        out.fill_(1.0)
        graph.replay()
        results.append(out.clone())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])

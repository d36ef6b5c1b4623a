"""Documents packed into one row: nothing is seen across their ends, and nothing else changes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embedkernels as ek
from embedkernels.reference import attention as reference
from tests.attention import cases
from tests.contract import assert_within_contract
from tests.properties import examples

OPS = torch.ops.embedkernels
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Documents of one token, of less than a block, of several, of none; the second kind has other numbers of keys, among
# them documents without queries or without keys. Then the tokens before the first document and behind the last.
DOCUMENTS: dict[str, tuple[list[int], list[int], tuple[int, int], tuple[int, int]]] = {
    "same": ([1, 11, 3, 0, 34], [1, 11, 3, 0, 34], (0, 0), (0, 0)),
    "gaps": ([5, 35, 2], [5, 35, 2], (3, 3), (5, 5)),
    "other": ([4, 9, 0, 6, 21], [18, 21, 7, 0, 2], (2, 0), (0, 1)),
    "one": ([21], [45], (0, 0), (0, 0)),
}
FEATURES = {
    "documents": list(DOCUMENTS),
    "order": ["any", "causal"],
    "mask": ["none", "holes", "lengths"],
    "window": [None, (4, None), (None, 3), (18, 9)],
    "dtype": [FP32, BF16, FP16],
    "heads": [(1, 1), (2, 1), (3, 1)],
    "layout": ["contiguous", "transposed", "packed"],
    "dropout_p": [0.0, 0.3],
    "batch": [1, 2],
    "head_size": [16, 32, 40, 64],
}
CASES = cases.covering(FEATURES)


def ends(sizes: list[int], gaps: tuple[int, int], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, int]:
    """Where documents start, with the end; and the length of the row."""
    starts = torch.tensor([gaps[0], *sizes]).cumsum(0)
    return starts.to(dtype), int(starts[-1]) + gaps[1]


def build(row: dict[str, Any], device: torch.device) -> cases.Call:
    row = dict(row)
    queries, keys, before, behind = DOCUMENTS[row.pop("documents")]
    mask, order = row.pop("mask"), row.pop("order")
    many = 7 if device.type == "cuda" else 1
    of_q, num_queries = ends(queries * many, (before[0], behind[0]))
    of_k, num_keys = ends(keys * many, (before[1], behind[1]), torch.int32)
    row |= {} if queries == keys and before[0] == before[1] else {"cu_seqlens_k": of_k.to(device)}
    return cases.inputs(
        lengths=(num_queries, num_keys), device=device, is_causal=order == "causal", cu_seqlens_q=of_q.to(device),
        **row, **cases.masks(mask, row["batch"], num_keys, device),
    )  # fmt: skip


@pytest.mark.parametrize("row", CASES, ids=lambda row: "-".join(str(x) for x in row.values()).replace("torch.", ""))
def test_every_two_features_together(
    row: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of one token see one key: in fp32 flash kernels are the yardstick."""
    cases.poisoned_allocations(monkeypatch)
    call = build(row, device)
    ours, theirs, expected = cases.ours(call), cases.theirs(call, row["dtype"] == FP32), cases.expected(call)
    for name, mine, their, exact in zip(cases.NAMES, ours, theirs, expected, strict=True):
        assert_within_contract(mine, their, exact, name)


def visible_pairs(
    queries: list[int], keys: list[int], gaps: tuple[int, int], shape: tuple[int, int], left: Any, right: Any
) -> torch.Tensor:
    """One pair after the other."""
    visible = torch.zeros(shape, dtype=torch.bool)
    q0, k0 = gaps
    for of_q, of_k in zip(queries, keys, strict=True):
        for i, j in itertools.product(range(of_q), range(of_k)):
            at = i + of_k - of_q
            visible[q0 + i, k0 + j] = (left is None or j >= at - left) and (right is None or j <= at + right)
        q0, k0 = q0 + of_q, k0 + of_k
    return visible


@examples(80)
@given(data=st.data())
def test_ranges(device: torch.device, data: st.DataObject) -> None:
    """The kernel's are the reference's bit by bit; both say what a query sees, and none decreases."""
    documents = data.draw(st.integers(0, 6))
    sizes = st.lists(st.integers(0, 9), min_size=documents, max_size=documents)
    queries, keys = data.draw(sizes), data.draw(sizes)
    before, behind = (data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3))) for _ in range(2))
    left, right = (data.draw(st.sampled_from([None, 0, 2, 30])) for _ in range(2))
    dtypes = [data.draw(st.sampled_from([torch.int32, torch.int64])) for _ in range(2)]
    of_q, num_queries = ends(queries, (before[0], behind[0]), dtypes[0])
    of_k, num_keys = ends(keys, (before[1], behind[1]), dtypes[1])
    ranges = reference.document_ranges(of_q, of_k, num_queries, num_keys, left, right)
    ours = OPS.attention_ranges(of_q.to(device), of_k.to(device), num_queries, num_keys, left, right)
    assert torch.equal(ours.cpu(), ranges)
    visible = visible_pairs(queries, keys, before, (num_queries, num_keys), left, right)
    of_queries, of_keys = ranges[0].split([num_queries, num_keys], 1)
    k, q = torch.arange(num_keys), torch.arange(num_queries)[:, None]
    assert torch.equal((k >= of_queries[0, :, None]) & (k < of_queries[1, :, None]), visible)
    assert torch.equal((q >= of_keys[0]) & (q < of_keys[1]), visible)
    assert all((side.diff() >= 0).all() for side in (of_queries, of_keys))


@examples(40)
@given(
    of_q=st.lists(st.integers(-(2**40), 2**40) | st.integers(-9, 90), min_size=1, max_size=5), seed=st.integers(0, 9)
)
def test_whatever_ends_say_ranges_stay_inside(of_q: list[int], seed: int, device: torch.device) -> None:
    of_k = torch.tensor(of_q).roll(seed)
    ranges = OPS.attention_ranges(torch.tensor(of_q, device=device), of_k.to(device), 40, 50, 3, 3)
    assert (ranges >= 0).all()
    assert (ranges[..., :40] <= 50).all()
    assert (ranges[..., 40:] <= 40).all()


def test_what_others_hold_is_not_even_read(device: torch.device) -> None:
    """Documents of whole blocks: if a block of another's keys were visited, 0 · NaN would show, forward and back."""
    of_q = torch.tensor([0, 128, 256, 384] if device.type == "cuda" else [0, 32, 64, 96], device=device)
    start, end = of_q[1:3].tolist()
    call = cases.inputs(
        batch=1, heads=(1, 1), lengths=(int(of_q[-1]),) * 2, head_size=16, device=device, cu_seqlens_q=of_q
    )
    clean = cases.ours(call)
    with torch.no_grad():
        for x in (*call.leaves, call.grad):
            x[:, :, start:end] = float("nan")
    for (name, mine), before in zip(cases.pairs(cases.ours(call)), clean, strict=True):
        for part in (slice(0, start), slice(end, None)):
            assert torch.equal(mine[:, :, part], before[:, :, part]), name


BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (5, 2)}], ids=str)
def test_equal_to_one_call_per_document(backend: Any, options: dict[str, Any], device: torch.device) -> None:
    sizes = [12, 1, 30, 7]
    call = cases.inputs(batch=1, heads=(2, 1), lengths=(50, 50), head_size=16, device=device)
    of_q = ends(sizes, (0, 0))[0].to(device)
    with cases.use_tiles(cases.SMALL):
        out = ek.attention(*call.leaves, enable_gqa=True, cu_seqlens_q=of_q, backend=backend, **options)
        ours = out, *torch.autograd.grad(out, call.leaves, call.grad)
    parts = zip(*(x.split(sizes, 2) for x in call.leaves), strict=True)
    out = torch.cat([ek.attention(*part, enable_gqa=True, backend="torch", **options) for part in parts], 2)
    theirs = out, *torch.autograd.grad(out, call.leaves, call.grad)
    for (name, mine), their in zip(cases.pairs(ours), theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_q", [[0], [5], [0, 0, 0], [7, 7], [0, 9]], ids=str)
def test_without_a_pair_all_is_zero(backend: Any, of_q: list[int], device: torch.device) -> None:
    call = cases.inputs(batch=1, lengths=(9, 9), device=device)
    of_k = [0] * len(of_q)
    out = ek.attention(
        *call.leaves, cu_seqlens_q=torch.tensor(of_q, device=device), cu_seqlens_k=torch.tensor(of_k, device=device),
        backend=backend,
    )  # fmt: skip
    for x in (out, *torch.autograd.grad(out, call.leaves, call.grad)):
        assert x.count_nonzero() == 0
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row(backend: Any, device: torch.device) -> None:
    call = cases.inputs(batch=1, lengths=(0, 0), device=device)
    out = ek.attention(*call.leaves, cu_seqlens_q=torch.tensor([0], device=device), backend=backend)
    assert out.shape == (1, 2, 0, 32)


def test_tokens_of_no_document_have_the_dtype_of_autocast() -> None:
    x = torch.randn(1, 2, 7, 16)
    for ends_ in ([0, 3, 5], [0, 3, 7]):
        for window in (None, (2, 2)):
            with torch.autocast("cpu", torch.bfloat16):
                out = ek.attention(x, x, x, cu_seqlens_q=torch.tensor(ends_), window=window, backend="torch")
            assert out.dtype == torch.bfloat16


def test_another_default_device_changes_nothing() -> None:
    x = torch.randn(1, 2, 11, 16)
    of_q = torch.tensor([0, 4, 11])
    expected = ek.attention(x, x, x, cu_seqlens_q=of_q, backend="torch")
    of_q = torch.tensor([0, 5, 11])  # whose groups are not known yet
    with torch.device("meta"):
        out = ek.attention(x, x, x, cu_seqlens_q=of_q, backend="torch")
    assert out.device.type == "cpu"
    assert not torch.equal(out, expected)


def test_a_cpu_computes_no_pair_of_two_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((query.shape[0], query.shape[2], key.shape[2]))
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    call = cases.inputs(batch=1, lengths=(190, 190), device=torch.device("cpu"))
    sizes = [5, 60, 0, 7, 54, 60]
    ek.attention(*call.leaves, cu_seqlens_q=ends(sizes, (2, 0))[0], backend="torch")
    # Those of about one length together.
    assert seen == [(3, 60, 60), (2, 7, 7)]


def test_dropout_is_drawn_for_each_document(device: torch.device) -> None:
    """The torch backend, whose dropout is SDPA's: what is kept is scaled, and the share of it is right."""
    value = torch.ones(1, 2, 64, 64, device=device)
    zero = torch.zeros(1, 2, 64, 64, device=device)
    of_q = torch.arange(0, 65, 16, device=device)
    for backend in BACKENDS:
        out = ek.attention(zero, zero, value, dropout_p=0.25, cu_seqlens_q=of_q, backend=backend)
        weights = out[..., 0] * 16 * 0.75  # how many of 16 keys are kept
        torch.testing.assert_close(weights, weights.round(), rtol=0, atol=1e-4)
        assert abs(float(weights.mean()) - 12) < 1
        assert weights.unique().numel() > 3


def test_compiled_in_one_graph(device: torch.device) -> None:
    torch.compiler.reset()
    of_q = torch.tensor([0, 7, 20], device=device)
    for backend in BACKENDS:
        call = cases.inputs(batch=1, lengths=(20, 20), head_size=16, device=device, is_causal=True)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_q: torch.Tensor, backend: Any) -> torch.Tensor:
            return ek.attention(q, k, v, is_causal=True, cu_seqlens_q=of_q, backend=backend)

        with cases.use_tiles(cases.SMALL):
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            out = compiled(*call.leaves, of_q, backend)
            expected = run(*call.leaves, of_q, backend)
            torch.testing.assert_close(out, expected)
            for a, b in zip(*(torch.autograd.grad(x, call.leaves, call.grad) for x in (out, expected)), strict=True):
                torch.testing.assert_close(a, b)


def test_opcheck(device: torch.device) -> None:
    of_q, of_k = torch.tensor([0, 3, 9], device=device), torch.tensor([1, 4, 8], device=device, dtype=torch.int32)
    torch.library.opcheck(OPS.attention_ranges.default, (of_q, of_k, 9, 20, 3, None))
    ranges = OPS.attention_ranges(of_q, of_k, 9, 20, 3, None)
    call = cases.inputs(batch=1, heads=(2, 1), lengths=(9, 20), head_size=16, device=device)
    args = (*call.leaves, None, None, ranges, None, 0.25, False, 0, 0.0)
    with cases.use_tiles(cases.SMALL):
        torch.library.opcheck(OPS.attention_forward.default, args)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens_q": [0, 4]}, TypeError, "cu_seqlens_q must be an int32 or int64 Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens_q must be an int32 or int64 Tensor"),
    ({"cu_seqlens_q": torch.tensor([[0, 4]])}, ValueError, r"cu_seqlens_q must have shape \(N \+ 1,\), got \(1, 2\)"),
    ({"cu_seqlens_q": torch.tensor([], dtype=torch.int32)}, ValueError, r"shape \(N \+ 1,\), got \(0,\)"),
    (
        {"cu_seqlens_q": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 2, 4])},
        ValueError,
        r"cu_seqlens_k must have shape \(2,\), as cu_seqlens_q, got \(3,\)",
    ),
    ({"cu_seqlens_k": torch.tensor([0, 4])}, ValueError, "cu_seqlens_k needs cu_seqlens_q"),
    ({"cu_seqlens_q": torch.tensor([0, 4]), "query_offset": 1}, ValueError, "query_offset must be 0 with"),
    (
        {"cu_seqlens_q": torch.tensor([0, 4]), "attn_mask": torch.ones(4, 4, dtype=torch.bool)},
        ValueError,
        "attn_mask excludes key_mask, .* and cu_seqlens_q",
    ),
    ({"cu_seqlens_q": torch.tensor([0, 4], device="meta")}, ValueError, "query is on cpu, cu_seqlens_q is on meta"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 2, 4])}, ValueError, "cu_seqlens_q must not decrease, and be between"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, r"between 0 and 4, got \[0, 5\]"),
    ({"cu_seqlens_q": torch.tensor([-1, 4])}, ValueError, r"between 0 and 4, got \[-1, 4\]"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(error, match=message):
        ek.attention(x, x, x, backend="torch", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "head_size"), [(BF16, 64), (BF16, 128), (FP32, 64)])
def test_many_documents_on_the_device(
    dtype: torch.dtype, head_size: int, is_causal: bool, device: torch.device
) -> None:
    torch.manual_seed(1)
    of_q, length = ends(torch.randint(1, 300, (24,)).tolist(), (0, 0))
    call = cases.inputs(
        batch=1, heads=(4, 2), lengths=(length, length), head_size=head_size, dtype=dtype, layout="transposed",
        cu_seqlens_q=of_q.to(device), is_causal=is_causal, device=device,
    )  # fmt: skip
    ours, theirs, expected = cases.ours(call), cases.theirs(call, fused=True), cases.expected(call)
    for name, mine, their, exact in zip(cases.NAMES, ours, theirs, expected, strict=True):
        assert_within_contract(mine, their, exact, name)

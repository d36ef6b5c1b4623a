"""In eager mode ops run without the dispatcher, with the same results; whatever wants to see them still does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import embedkernels as ek
from embedkernels.ops import embed as embed_module
from embedkernels.ops.eager import is_eager, signature

CPU = torch.device("cpu")


class Watching(TorchDispatchMode):
    """Lets every op through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    """Lets every function through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def seen_while(run: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[bool]:
    """What ``is_eager`` says of the argument of a function that ``run`` runs."""
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_eager(x))
        return x * 1.0

    run(function)
    assert seen
    return seen


def forward_derivative(function: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(torch.ones(2), torch.ones(2)))


WATCHED: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "torch.func.vmap": lambda f: torch.func.vmap(f)(torch.ones(2, 3)),
    "torch.func.grad": lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(2)),
    "torch.func.functionalize": lambda f: torch.func.functionalize(f)(torch.ones(2)),
    "forward-mode AD": forward_derivative,
    "make_fx": lambda f: make_fx(f)(torch.ones(2)),
    "make_fx of fake tensors": lambda f: make_fx(f, tracing_mode="fake")(torch.ones(2)),
    "make_fx before dispatch": lambda f: make_fx(f, pre_dispatch=True)(torch.ones(2)),
    "torch.jit.trace": lambda f: torch.jit.trace(f, (torch.ones(2),), check_trace=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WATCHED)
def test_what_transforms_or_traces_is_not_eager(way: str) -> None:
    assert not any(seen_while(WATCHED[way]))
    assert is_eager(torch.ones(2)), "and leaves nothing behind"


@pytest.mark.parametrize("compiled", ["torch.compile", "torch.export"])
def test_what_compiles_is_not_eager(compiled: str) -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1 if is_eager(x) else x + 2

    if compiled == "torch.compile":
        result = torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(2))
    else:

        class Module(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return function(x)

        result = torch.export.export(Module(), (torch.zeros(2),)).module()(torch.zeros(2))
    assert torch.equal(result, torch.full((2,), 2.0))


def test_a_default_device_is_eager() -> None:
    """Its mode fills in the device of new tensors and looks at nothing else."""
    x = torch.ones(2)
    with torch.device("cpu"):
        assert is_eager(x)
        with Overriding():
            assert not is_eager(x)


@pytest.mark.parametrize("mode", [Watching, Overriding, FakeTensorMode])
def test_modes_are_not_eager(mode: Callable[[], Any]) -> None:
    x = torch.ones(2)
    with mode():
        assert not is_eager(x)
    assert is_eager(x)


def negated() -> Tensor:
    return torch.complex(torch.ones(2), torch.ones(2)).conj().imag


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).as_subclass(Subclass), fake, negated, lambda: torch.nn.Parameter(negated()),
        lambda: torch.ones(2, device="meta"), lambda: torch.ones(2, 2).to_sparse(), lambda: torch.ones(2).to_mkldnn(),
        lambda: torch._efficientzerotensor((2,)),
    ],
    ids=["subclass", "fake", "negated", "parameter", "meta", "sparse", "mkldnn", "zero"],
)  # fmt: skip
def test_tensors_that_are_more_than_their_memory_are_not_eager(make: Callable[[], Tensor]) -> None:
    assert not is_eager(torch.ones(2), None, make())
    assert signature(torch.ones(2), None, make()) is None


def hooks() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@pytest.mark.parametrize(
    "context",
    [contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), hooks,
     torch.autograd.detect_anomaly, lambda: torch.autograd.set_multithreading_enabled(False)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_plain_tensors_are_eager(context: Callable[[], Any], device: torch.device) -> None:
    with context():
        x = torch.ones(2, 3, device=device)
        assert is_eager(x, None, torch.nn.Parameter(x), torch.nn.Buffer(x), x.t(), x.long(), x.bool(), x[:, 1])


def test_a_signature_tells_shapes_dtypes_and_strides_apart(device: torch.device) -> None:
    x = torch.zeros(2, 3, device=device)
    assert signature(x, None) == signature(x + 1, None) is not None
    others = [(None, x), (x[:1], None), (x.double(), None), (x, x)]
    assert len({signature(x, None), *(signature(*other) for other in others)}) == 5
    assert signature(x.t()) is None


def embed_case(device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    ids = torch.tensor([[1, 2, 0], [3, 3, 4]], device=device)
    words, places, kinds = (torch.randn(n, 16, device=device, requires_grad=True) for n in (6, 8, 2))
    weight, bias = (torch.randn(16, device=device, requires_grad=True) for _ in range(2))

    def call() -> Tensor:
        return ek.embed(
            ids, words, position_weight=places, type_weight=kinds, type_ids=ids % 2, norm="layer", norm_weight=weight,
            norm_bias=bias, dropout_p=0.3, padding_idx=0, backend="triton",
        )  # fmt: skip

    return call, [words, places, kinds, weight, bias]


def attention_case(device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    leaves = [torch.randn(2, 2, 5, 16, device=device, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device)
    return lambda: ek.attention(*leaves, dropout_p=0.2, key_mask=mask, backend="triton"), leaves


def documents_case(device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    leaves = [torch.randn(1, 2, 9, 16, device=device, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([0, 4, 9], device=device)
    return lambda: ek.attention(*leaves, is_causal=True, cu_seqlens_q=ends, backend="triton"), leaves


def rope_case(device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    leaves = [torch.randn(2, heads, 5, 16, device=device, requires_grad=True) for heads in (4, 2)]
    tables = torch.randn(2, 1, 5, 16, device=device)
    return lambda: ek.rope(*leaves, *tables, backend="triton"), leaves


def positions_case(device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    ids = torch.tensor([[5, 7, 1, 1], [1, 5, 6, 7]], device=device)
    return lambda: ek.count_positions(ids, padding_idx=1, start=1, backend="triton"), []


CASES = {
    "embed": embed_case,
    "attention": attention_case,
    "documents": documents_case,
    "rope": rope_case,
    "count_positions": positions_case,
}
OPS = ("embed_forward", "embed_backward", "attention_forward", "attention_backward", "attention_key_bounds",
       "attention_ranges", "rope", "count_positions")  # fmt: skip


def results(call: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, from the same random numbers each time."""
    torch.manual_seed(3)
    out = call()
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn_like(y) for y in out if y.is_floating_point()]
    return [*out, *(torch.autograd.grad(out, leaves, upstream) if leaves else ())]


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops of this package that are called by their names."""
    called: list[str] = []
    for name in OPS:
        op = getattr(torch.ops.embedkernels, name)

        def spy(*args: Any, op: Any = op, name: str = name) -> Any:
            called.append(name)
            return op(*args)

        spy.default = op.default  # type: ignore[attr-defined]  # what a mode asks for
        monkeypatch.setattr(torch.ops.embedkernels, name, spy)
    return called


@pytest.mark.parametrize("name", CASES)
def test_no_op_is_dispatched_in_eager_mode_and_the_bits_are_those_of_the_op(
    name: str, dispatched: list[str], device: torch.device
) -> None:
    call, leaves = CASES[name](device)
    direct = results(call, leaves)
    again = results(call, leaves)  # of a kind that is known by now
    assert dispatched == []
    with torch.no_grad():
        torch.manual_seed(3)
        quiet = call()
    with Watching():
        op = results(call, leaves)
    expected = {"embed": 2, "attention": 3, "documents": 3, "rope": 2, "count_positions": 1}[name]
    assert len(dispatched) == expected, dispatched
    for a, b, c in zip(direct, again, op, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip(quiet if isinstance(quiet, tuple) else (quiet,), direct, strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["embed", "attention", "documents", "rope"])
def test_a_backward_pass_that_is_watched_dispatches_its_ops(
    name: str, dispatched: list[str], device: torch.device
) -> None:
    call, leaves = CASES[name](device)
    out = call()
    out = out if isinstance(out, tuple) else (out,)
    assert dispatched == []
    with Watching():
        torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])
    backward = {"embed": "embed_backward", "rope": "rope"}
    assert dispatched == [backward.get(name, "attention_backward")]


@pytest.mark.parametrize("name", ["embed", "attention", "rope"])
def test_a_profiler_shows_the_names_of_the_ops(name: str, device: torch.device) -> None:
    call, leaves = CASES[name](device)
    results(call, leaves)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        results(call, leaves)
    shown = {event.name for event in found.events()}
    expected = {"rope": ["rope"]}.get(name, [f"{name}_forward", f"{name}_backward"])
    assert {f"embedkernels::{op}" for op in expected} <= shown


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["embed", "attention", "rope"])
def test_what_is_recomputed_has_the_same_gradients(name: str, reentrant: bool, device: torch.device) -> None:
    call, leaves = CASES[name](device)
    anchor = torch.zeros((), device=device, requires_grad=True)  # reentrant checkpointing wants one with a gradient

    def gradients(run: Callable[[], Any]) -> list[Tensor | None]:
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        out = run()
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [torch.ones_like(y) for y in out])
        return [leaf.grad for leaf in leaves]

    plain = gradients(call)
    recomputed = gradients(lambda: checkpoint(lambda _: call(), anchor, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("name", ["embed", "attention", "rope"])
def test_saved_tensors_pass_through_hooks_that_may_change_their_strides(name: str, device: torch.device) -> None:
    """Offloading gives back tensors of other strides."""
    call, leaves = CASES[name](device)
    plain = results(call, leaves)

    def unpack(x: Tensor) -> Tensor:
        spread = torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)[..., 0]
        return spread.copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), unpack):
        hooked = results(call, leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))


def test_a_negated_view_is_read_with_its_sign(device: torch.device) -> None:
    """In memory its elements have the other sign."""
    query, key, value = torch.randn(3, 1, 2, 4, 16, device=device)
    view = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert view.is_neg()
    assert torch.equal(
        ek.attention(query, key, view, backend="triton"), ek.attention(query, key, value, backend="triton")
    )
    weight = torch.randn(5, 8, device=device)
    view = torch.complex(torch.zeros_like(weight), -weight).conj().imag
    ids = torch.tensor([[0, 4]], device=device)
    assert torch.equal(ek.embed(ids, view, backend="triton"), ek.embed(ids, weight, backend="triton"))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", ["attention", "rope"])
def test_outputs_can_be_changed_in_place_where_nothing_is_recorded(
    name: str, context: Callable[[], Any], device: torch.device
) -> None:
    call, leaves = CASES[name](device)
    for leaf in leaves:
        leaf.requires_grad_(False)
    with context():
        out = call()
    first = out[0] if isinstance(out, tuple) else out
    first.add_(1.0)


def known_call(device: torch.device) -> dict[str, Any]:
    """A call that has been made before."""
    ids = torch.tensor([[1, 2, 0]], device=device)
    options: dict[str, Any] = {
        "ids": ids, "weight": torch.randn(5, 8, device=device), "position_weight": torch.randn(4, 8, device=device),
        "position_start": 1, "norm": "layer", "norm_weight": torch.ones(8, device=device), "norm_eps": 1e-5,
        "padding_idx": 1, "backend": "triton",
    }  # fmt: skip
    ek.embed(**options)
    return options


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"position_start": 1.0}, TypeError), ({"padding_idx": 1.0}, TypeError), ({"position_start": 2}, IndexError),
        ({"padding_idx": 5}, ValueError), ({"norm_eps": -1.0}, ValueError), ({"norm": "other"}, ValueError),
        ({"norm": None}, ValueError), ({"scale": 0.0}, ValueError), ({"dropout_p": 1.5}, ValueError),
        ({"padding_idx": [1]}, TypeError), ({"norm_eps": torch.tensor(1e-5)}, TypeError),
        ({"weight": torch.zeros(5, 8, dtype=torch.float16)}, TypeError), ({"weight": torch.zeros(5, 4)}, ValueError),
        ({"position_weight": torch.zeros(3, 8)}, IndexError), ({"norm_weight": torch.ones(4)}, ValueError),
        ({"ids": torch.zeros(1, 3)}, TypeError), ({"ids": [[1, 2, 0]]}, TypeError),
        ({"ids": torch.zeros(1, 4, dtype=torch.int64)}, IndexError), ({"mask": torch.ones(2, 2)}, ValueError),
        ({"extra": torch.ones(3, 4)}, ValueError), ({"type_ids": torch.zeros(1, 3, dtype=torch.int64)}, ValueError),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value.__name__,
)  # fmt: skip
def test_a_call_that_differs_from_a_known_one_is_checked(
    change: dict[str, Any], error: type[Exception], device: torch.device
) -> None:
    options = known_call(device)
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(error, match="embed: "):
        ek.embed(**{**options, **moved})


def test_a_table_that_was_replaced_behind_a_parameter_is_looked_at_again(device: torch.device) -> None:
    options = known_call(device)
    options["weight"] = weight = torch.nn.Parameter(options["weight"])
    ek.embed(**options)
    weight.data = torch.randn(5, 4, device=device)
    with pytest.raises(ValueError, match="D = 4"):
        ek.embed(**options)


def test_ids_out_of_range_are_found_in_known_calls_too() -> None:
    options = known_call(CPU)
    with pytest.raises(IndexError, match="token id 5 at position 2"):
        ek.embed(**{**options, "ids": torch.tensor([[1, 2, 5]])})


def test_known_calls_are_forgotten_before_they_are_many(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(embed_module, "_kinds", {})
    monkeypatch.setattr(embed_module, "_MOST_KINDS", 2)
    weight = torch.randn(5, 8, device=device)
    for length in range(1, 6):
        ek.embed(torch.zeros(1, length, dtype=torch.int64, device=device), weight, backend="triton")
        assert 1 <= len(embed_module._kinds) <= 2


def test_a_known_call_uses_its_own_values(device: torch.device) -> None:
    call, leaves = embed_case(device)
    first = results(call, leaves)
    changed = [leaf.detach().clone().mul_(2.0).requires_grad_() for leaf in leaves]
    ids = torch.tensor([[5, 5, 5], [1, 1, 2]], device=device)

    def other() -> Tensor:
        return ek.embed(
            ids, changed[0], position_weight=changed[1], type_weight=changed[2], type_ids=ids % 2, norm="layer",
            norm_weight=changed[3], norm_bias=changed[4], dropout_p=0.3, padding_idx=0, backend="triton",
        )  # fmt: skip

    known = results(other, changed)
    embed_module._kinds.clear()
    fresh = results(other, changed)
    assert all(torch.equal(a, b) for a, b in zip(known, fresh, strict=True))
    assert not torch.equal(first[0], known[0])


def test_autocast_is_not_forgotten(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On a GPU it decides the dtype of a LayerNorm's output."""
    options = known_call(device)
    before = len(embed_module._kinds)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    ek.embed(**copy.copy(options))
    assert len(embed_module._kinds) == before + 1

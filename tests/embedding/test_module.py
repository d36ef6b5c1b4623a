"""FusedEmbedding is an nn.Embedding in every respect."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

import embedkernels as ek
from tests.properties import examples


def pair(*args: Any, **options: Any) -> tuple[ek.FusedEmbedding, nn.Embedding]:
    """Ours and the stock module, made with the same random numbers."""
    made = []
    for cls in (ek.FusedEmbedding, nn.Embedding):
        torch.manual_seed(7)
        made.append(cls(*args, **options))
    return made[0], made[1]


def run(module: nn.Embedding, ids: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Output and dense gradient of the table for random upstream gradients."""
    module.zero_grad()
    out = module(ids)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out))
    assert module.weight.grad is not None
    return out, module.weight.grad.to_dense()


@examples(40)
@given(data=st.data())
def test_equal_to_the_stock_module(device: torch.device, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 20))
    width = data.draw(st.integers(1, 9))
    options: dict[str, Any] = {
        "padding_idx": data.draw(st.none() | st.integers(-rows, rows - 1)),
        "max_norm": data.draw(st.none() | st.floats(0.1, 2.0)),
        "norm_type": data.draw(st.sampled_from([1.0, 2.0])),
        "scale_grad_by_freq": data.draw(st.booleans()),
        "sparse": data.draw(st.booleans()),
        "dtype": data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "device": device,
    }
    if options["sparse"]:
        options["scale_grad_by_freq"] = False  # stock has no such gradient either
    # Stock has no sparse gradient for ids without an axis.
    shape = data.draw(st.lists(st.integers(0, 5), min_size=int(options["sparse"]), max_size=3))
    ids = torch.randint(0, rows, shape, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))).to(device)
    ours, stock = pair(rows, width, **options)
    assert isinstance(ours, nn.Embedding)
    assert ours.padding_idx == stock.padding_idx
    assert torch.equal(ours.weight, stock.weight)
    our_out, our_grad = run(ours, ids)
    stock_out, stock_grad = run(stock, ids)
    assert torch.equal(our_out, stock_out)
    assert torch.equal(ours.weight, stock.weight)  # max_norm changes it in place
    tolerance = 0.06 if options["dtype"] == torch.bfloat16 else 1e-5
    torch.testing.assert_close(our_grad, stock_grad, rtol=tolerance, atol=tolerance)
    assert ours.fused == (options["max_norm"] is None)


def test_max_norm_runs_the_stock_forward(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    module = ek.FusedEmbedding(6, 3, device=device, max_norm=1.0)
    monkeypatch.setattr("embedkernels.nn.embedding.embedding", None)
    out = module(torch.tensor([1, 1, 5], device=device))
    out.backward(torch.randn_like(out))
    assert not module.fused
    assert repr(module).endswith("fused=False)")
    assert module.weight.grad is not None


def test_no_option_means_the_fused_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("embedkernels.nn.embedding.embedding", lambda *_, **options: calls.append(options))
    ek.FusedEmbedding(6, 3, padding_idx=-2)(torch.tensor([1]))
    assert calls == [{"padding_idx": 4, "scale_grad_by_freq": False, "grad_mode": "dense"}]


def test_repr() -> None:
    ours, stock = pair(6, 3, padding_idx=1)
    assert repr(ours) == "Fused" + repr(stock)


def test_from_pretrained(device: torch.device) -> None:
    table = torch.randn(5, 4, device=device)
    module = ek.FusedEmbedding.from_pretrained(table, padding_idx=2)
    assert type(module) is ek.FusedEmbedding
    assert not module.weight.requires_grad
    assert module.weight.data_ptr() == table.data_ptr()
    ids = torch.tensor([4, 2], device=device)
    assert torch.equal(module(ids), table[ids])
    trained = ek.FusedEmbedding.from_pretrained(table, freeze=False)
    run(trained, ids)


def test_given_weight_and_freeze(device: torch.device) -> None:
    table = torch.randn(5, 4, device=device)
    module = ek.FusedEmbedding(5, 4, _weight=table, _freeze=True)
    assert not module(torch.tensor([0], device=device)).requires_grad
    with pytest.raises(AssertionError):
        ek.FusedEmbedding(6, 4, _weight=table)
    with pytest.raises(AssertionError):
        ek.FusedEmbedding(6, 4, padding_idx=6)


def test_state_dicts_are_exchanged_with_stock() -> None:
    ours, stock = ek.FusedEmbedding(6, 3, padding_idx=0), nn.Embedding(6, 3, padding_idx=0)
    assert list(ours.state_dict()) == list(stock.state_dict()) == ["weight"]
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours.weight, stock.weight)
    stock.load_state_dict(ek.FusedEmbedding(6, 3).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_work(how: str) -> None:
    module = ek.FusedEmbedding(6, 3, padding_idx=-1)
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert type(copied) is ek.FusedEmbedding
    assert copied.padding_idx == 5
    assert torch.equal(copied.weight, module.weight)
    run(copied, torch.tensor([1, 5, 1]))
    assert module.weight.grad is None


def test_a_stock_module_becomes_fused_by_its_class_alone(device: torch.device) -> None:
    module = nn.Embedding(6, 3, padding_idx=1, device=device)
    ids = torch.tensor([[1, 2], [2, 5]], device=device)
    stock_out, stock_grad = run(module, ids)
    module.__class__ = ek.FusedEmbedding
    out, gradient = run(module, ids)
    assert torch.equal(out, stock_out)
    torch.testing.assert_close(gradient, stock_grad)


def test_hooks_see_what_they_see_on_stock(device: torch.device) -> None:
    module = ek.FusedEmbedding(6, 3, device=device)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda _, __, out: out * 2)
    module.weight.register_hook(lambda gradient: gradient * 10)
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    ids = torch.tensor([0, 3], device=device)
    out = module(ids)
    out.backward(torch.ones_like(out))
    assert torch.equal(out, module.weight[ids] * 2)
    assert seen == ["before", "backward"]
    assert module.weight.grad is not None
    assert float(module.weight.grad[3, 0]) == 20.0


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrised_weight_gets_its_gradient(device: torch.device) -> None:
    ours, stock = (m.to(device) for m in pair(6, 3, padding_idx=0))
    ids = torch.tensor([1, 0, 5, 1], device=device)
    grads = []
    for module in (ours, stock):
        parametrize.register_parametrization(module, "weight", Doubled())
        out = module(ids)
        out.backward(torch.arange(12.0, device=device).view(4, 3))
        grads.append((out, module.parametrizations.weight.original.grad))  # type: ignore[union-attr]
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_a_tied_weight_adds_both_gradients(device: torch.device) -> None:
    grads = []
    for cls in (ek.FusedEmbedding, nn.Embedding):
        torch.manual_seed(1)
        embedding, head = cls(6, 3), nn.Linear(3, 6, bias=False)
        embedding.to(device)
        head.weight = embedding.weight
        head(embedding(torch.tensor([1, 2, 1], device=device))).square().sum().backward()
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_torch_func(device: torch.device) -> None:
    """Per-sample gradients, as on stock."""
    ours, stock = (m.to(device) for m in pair(6, 3, padding_idx=0))
    ids = torch.tensor([[1, 0], [5, 5]], device=device)
    results = []
    for module in (ours, stock):

        def loss(parameters: dict[str, Tensor], ids: Tensor, module: nn.Module = module) -> Tensor:
            return functional_call(module, parameters, (ids,)).square().sum()

        results.append(vmap(grad(loss), in_dims=(None, 0))(dict(module.named_parameters()), ids)["weight"])
    torch.testing.assert_close(results[0], results[1])


def test_compile_and_bad_ids(device: torch.device) -> None:
    torch.compiler.reset()
    ours, stock = (m.to(device) for m in pair(6, 3, padding_idx=0))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[1, 0], [5, 5]], device=device)
    out = compiled(ids)
    assert torch.equal(out, stock(ids))
    for call in (ours, compiled):
        with pytest.raises(IndexError, match=r"token id 6 at position 1 .* a table of 6 rows"):  # noqa: PT012
            call(torch.tensor([0, 6], device=device))
            ek.check_errors()


def test_integer_tables_and_float_ids_are_as_on_stock() -> None:
    table = torch.arange(6).view(3, 2)
    module = ek.FusedEmbedding(3, 2, _weight=table, _freeze=True)
    assert torch.equal(module(torch.tensor([2, 0])), table[[2, 0]])
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch\.float32"):
        ek.FusedEmbedding(3, 2)(torch.tensor([1.0]))


def test_subclasses_of_tensor_run_the_stock_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DTensor or a quantised weight implements F.embedding, not our op."""
    seen = []

    class Wrapped(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    module = ek.FusedEmbedding(4, 2)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Wrapped))
    monkeypatch.setattr("embedkernels.nn.embedding.embedding", None)
    module(torch.tensor([1]))
    assert "embedding" in seen


def test_nested_tensors_of_ids_run_the_stock_forward() -> None:
    ours, stock = pair(6, 3, padding_idx=0)
    ids = torch.nested.nested_tensor([torch.tensor([1, 0]), torch.tensor([5, 5, 2])], layout=torch.jagged)
    for module in (ours, stock):
        module(ids).values().sum().backward()
    assert torch.equal(ours(ids).values(), stock(ids).values())
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_jit_script() -> None:
    ours, stock = pair(6, 3, padding_idx=0)
    ids = torch.tensor([[1, 0], [5, 5]])
    assert torch.equal(torch.jit.script(ours)(ids), stock(ids))  # type: ignore[no-untyped-call]

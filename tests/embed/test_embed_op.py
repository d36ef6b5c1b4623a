"""The op within PyTorch: opcheck, compile, autocast, frozen parts, determinism."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import embedkernels as ek
from embedkernels.kernels import embed as kernels
from embedkernels.ops.backend import Choice
from embedkernels.reference.embed import norm_dtype
from tests.embed.cases import NORMS, PARAMETERS, Case, make


def op_arguments(case: Case, dropout_p: float) -> tuple[Any, ...]:
    p, o = case.parameters, case.options
    flat = {name: o[name].flatten() if name in o else None for name in ("position_ids", "type_ids", "mask")}
    extra = p["extra"].reshape(-1, p["extra"].shape[-1]) if "extra" in p else None
    rows = p["weight"] if "weight" in p else p["inputs_embeds"]
    seed = torch.tensor([12345], device=rows.device) if dropout_p > 0 else None
    return (
        case.ids, rows, o.get("scale", 1.0), p.get("position_weight"), o.get("sinusoids", "none"), -1,
        flat["position_ids"], 0, p.get("type_weight"), flat["type_ids"], extra, flat["mask"], o.get("packed"),
        o.get("norm", "none"),
        p.get("norm_weight"), p.get("norm_bias"), 1e-5, dropout_p, o.get("dropout_first", False), seed, rows.dtype, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("positions", "types", "norm", "dropout_p"),
    [("ids", "ids", "both", 0.2), ("arange", "zeros", "weight", 0.0), ("none", "none", "none", 0.5)],
)
def test_forward_op_passes_opcheck(
    positions: str, types: str, norm: str, dropout_p: float, device: torch.device
) -> None:
    case = make((2, 3), 8, device=device, positions=positions, types=types, norm=norm)
    torch.library.opcheck(torch.ops.embedkernels.embed_forward, op_arguments(case, dropout_p))


@pytest.mark.parametrize("norm", ["none", "rms weight"])
@pytest.mark.parametrize("source", ["lookup", "given"])
def test_forward_op_with_every_part_passes_opcheck(source: str, norm: str, device: torch.device) -> None:
    case = make(
        (2, 3), 8, device=device, positions="halves", norm=norm, source=source, scale=2.0, extra="full", mask="bool",
        dropout_first=norm != "none",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.embedkernels.embed_forward, op_arguments(case, 0.2))
    del case.options["mask"]
    case.options["packed"] = torch.tensor([4, 0, 5], device=device)
    torch.library.opcheck(torch.ops.embedkernels.embed_forward, op_arguments(case, 0.2))


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_backward_op_passes_opcheck(need: tuple[bool, bool], device: torch.device) -> None:
    case = make((2, 3), 8, device=device)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in op_arguments(case, 0.2)]
    out, mean, rstd = torch.ops.embedkernels.embed_forward(*arguments)
    torch.library.opcheck(
        torch.ops.embedkernels.embed_backward,
        (torch.randn_like(out), *arguments[:16], mean, rstd, *arguments[17:20], 1.0, *need),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_without_graph_breaks_it_gives_the_same_bits(
    backend: str, dynamic: bool, device: torch.device
) -> None:
    torch._dynamo.reset()
    options = {"positions": "arange", "dropout_p": 0.2}

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(ids: torch.Tensor, type_ids: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return ek.embed(
            ids, type_ids=type_ids, backend=backend, norm="layer", dropout_p=0.2, padding_idx=0, **parameters
        )

    for shape in ((2, 3), (4, 5)):
        case = make(shape, 8, device=device, norm_eps=1e-12, **options)
        upstream = torch.randn(*shape, 8, device=device)
        torch.manual_seed(1)
        expected = case.run(backend=backend)
        torch.manual_seed(1)
        y = compiled(case.ids, case.options["type_ids"], case.parameters)
        assert torch.equal(y, expected)
        ours, theirs = case.gradients(y, upstream), case.gradients(expected, upstream)
        assert all(torch.equal(ours[name], theirs[name]) for name in PARAMETERS)


@pytest.mark.parametrize("norm", NORMS)
def test_two_runs_give_the_same_bits(norm: str, device: torch.device) -> None:
    case = make((12, 9), 40, dtype=torch.bfloat16, device=device, norm=norm, dropout_p=0.1)
    upstream = torch.randn(12, 9, 40, device=device)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(7)
        y = case.run()
        return [y, *case.gradients(y, upstream).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    "frozen",
    [
        ("weight",),
        ("weight", "position_weight", "type_weight"),
        ("norm_weight", "norm_bias"),
        ("norm_bias",),
        PARAMETERS,
    ],
    ids="+".join,
)
def test_frozen_parameters_get_no_gradient_and_cost_nothing(
    frozen: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = kernels.embed_backward

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[-2:])
        return original(*arguments)

    monkeypatch.setattr(kernels, "embed_backward", spy)
    case = make((3, 4), 8, device=device, dropout_p=0.2)
    upstream = torch.randn(3, 4, 8, device=device)
    torch.manual_seed(1)
    expected = case.gradients(case.run(), upstream)
    asked.clear()
    for name in frozen:
        case.parameters[name].requires_grad_(False)
    torch.manual_seed(1)
    y = case.run()
    if frozen == PARAMETERS:
        assert not y.requires_grad
        return
    y.backward(upstream)
    for name, parameter in case.parameters.items():
        if name in frozen:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, expected[name])
    rows = not {"weight", "position_weight", "type_weight"} <= set(frozen)
    assert asked == [(rows, not {"norm_weight", "norm_bias"} <= set(frozen))]


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}, {"mask": "bool"}, {"scale": 3.0}], ids=str)
@pytest.mark.parametrize("norm", ["none", "both"])
def test_no_two_gradients_share_memory(norm: str, options: dict[str, Any], device: torch.device) -> None:
    """Else clipping, which scales them in place, would scale one twice."""
    case = make((3, 4), 8, device=device, source="given", extra="full", norm=norm, **options)
    y = case.run()
    grads = case.gradients(y, torch.randn_like(y))
    assert len({grad.untyped_storage().data_ptr() for grad in grads.values()}) == len(grads)


def test_a_frozen_table_s_scale_costs_nothing(device: torch.device) -> None:
    case = make((3, 4), 8, device=device, norm="none", scale=3.0)
    case.parameters["weight"].requires_grad_(False)
    y = case.run()
    with Noted() as seen:
        case.gradients(y, torch.ones_like(y))
    assert torch.ops.aten.mul.Tensor not in seen.ops


class Noted(TorchDispatchMode):
    """Notes the ops that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func)
        return func(*args, **(kwargs or {}))


def test_without_norm_and_dropout_no_backward_kernel_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "embed_backward", None)
    case = make((3, 4), 8, device=device, norm="none")
    upstream = torch.randn(3, 4, 8, device=device)
    ours, theirs = case.gradients(case.run(), upstream), case.gradients(case.reference(), upstream)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_ids_statistics_and_parameters_are_kept_for_backward(device: torch.device) -> None:
    case = make((6, 7), 32, device=device, dropout_p=0.1)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.run()
    ours = {parameter.data_ptr() for parameter in case.parameters.values()}
    assert max(t.numel() for t in kept if t.data_ptr() not in ours) == 6 * 7


def test_tables_that_changed_before_backward_are_refused(device: torch.device) -> None:
    case = make((3, 4), 8, device=device)
    y = case.run()
    with torch.no_grad():
        case.parameters["weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn_like(y))


def test_second_derivatives_are_refused_and_not_silently_zero(device: torch.device) -> None:
    case = make((3, 4), 8, device=device)
    weight = case.parameters["weight"]

    def second(backend: str) -> torch.Tensor:
        y = case.run(backend=backend)
        (grad,) = torch.autograd.grad(y, weight, torch.randn_like(y), create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    with pytest.raises(NotImplementedError, match="embed: the gradient is not differentiable again on the triton"):
        second("triton")
    assert second("torch").ne(0).any()


def test_in_inference_mode_it_gives_the_same_bits(device: torch.device) -> None:
    case = make((3, 4), 8, device=device)
    expected = case.run()
    with torch.inference_mode():
        assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "both"])
def test_under_autocast_the_torch_backend_equals_stock_modules(
    norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = make((3, 4), 8, dtype=dtype, device=device, norm=norm, positions="none", types="none")
    word, layer = torch.nn.Embedding(11, 8, 0).to(device, dtype), torch.nn.LayerNorm(8, 1e-5).to(device, dtype)
    word.weight.data.copy_(case.parameters["weight"])
    if norm == "both":
        layer.load_state_dict({"weight": case.parameters["norm_weight"], "bias": case.parameters["norm_bias"]})
    with torch.autocast(device.type, torch.bfloat16):
        expected = layer(word(case.ids)) if norm == "both" else word(case.ids)
        y = case.run(backend="torch")
        fused = case.run()
    assert y.dtype == expected.dtype == fused.dtype
    assert torch.equal(y, expected)


@pytest.fixture
def _cuda_autocast() -> Iterator[None]:
    """CUDA's autocast, also where there is no such device."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.usefixtures("_cuda_autocast")
def test_under_cuda_autocast_a_norm_s_output_is_fp32() -> None:
    """LayerNorm autocasts to fp32 on CUDA, and CPU autocast is another matter."""
    assert norm_dtype(torch.device("cuda"), torch.bfloat16) == torch.float32
    assert norm_dtype(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
    torch.set_autocast_enabled("cuda", False)
    assert norm_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("parameters", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.usefixtures("_cuda_autocast")
def test_under_cuda_autocast_every_backend_has_stock_s_output_dtype(
    backend: str, parameters: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 tables under fp32 or bf16 norms, on tensors that only pretend to be on a GPU."""
    monkeypatch.setattr("embedkernels.ops.embed.choose", lambda *_: Choice(backend, "the best"))  # type: ignore[arg-type]
    with FakeTensorMode():
        ids = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        weight = torch.zeros(5, 8, dtype=torch.bfloat16, device="cuda")
        norm = None if parameters is None else torch.ones(8, dtype=parameters, device="cuda")
        rows = torch.nn.functional.embedding(ids, weight)
        stock = torch.nn.functional.layer_norm(rows, (8,), norm, norm)
        y = ek.embed(ids, weight, norm="layer", norm_weight=norm, norm_bias=norm)
    assert y.dtype == stock.dtype == torch.float32


def test_output_may_be_fp32_over_16_bit_tables(device: torch.device) -> None:
    case = make((3, 4), 8, dtype=torch.bfloat16, device=device)
    arguments = list(op_arguments(case, 0.0))
    arguments[-2] = torch.float32
    y = torch.ops.embedkernels.embed_forward(*arguments)[0]
    assert y.dtype == torch.float32
    wide = case.to(torch.float32)
    torch.testing.assert_close(y, wide.reference())
    upstream = torch.randn_like(y)
    ours, exact = case.gradients(y, upstream), wide.gradients(wide.reference(), upstream)
    for name in ours:
        assert ours[name].dtype == torch.bfloat16
        torch.testing.assert_close(ours[name].float(), exact[name], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", ["none", "real"])
def test_on_a_gpu_every_part_can_be_captured_with_its_backward(packed: str, device: torch.device) -> None:
    case = make(
        (4, 8), 64, device=device, positions="fairseq", norm="rms both", scale=2.0, extra="full", packed=packed,
        dropout_p=0.1, dropout_first=True, mask="bool",
    )  # fmt: skip
    upstream = torch.ones_like(case.run())

    def step() -> list[torch.Tensor]:
        return [ek.count_positions(case.ids, padding_idx=0), *case.gradients(case.run(), upstream).values()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    assert all(torch.isfinite(t.float()).all() for t in results)


@pytest.mark.gpu
def test_on_a_gpu_it_can_be_captured_in_a_graph(device: torch.device) -> None:
    case = make((4, 8), 64, device=device, dropout_p=0.1)
    for _ in range(3):
        case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)  # another mask in every replay
    assert torch.isfinite(y).all()

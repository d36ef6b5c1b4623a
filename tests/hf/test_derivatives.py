"""torch.func and forward-mode AD, for which the fused ops have no formula, go through the stock ops."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp

import embedkernels as ek
from tests.hf.models import MODELS, build, ids, padded, pair

pytestmark = pytest.mark.filterwarnings("ignore:embedkernels:UserWarning")
BY_NAME = pytest.mark.parametrize("name", MODELS)


def _parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _loss(model, inputs, upstream):
    def loss(parameters):
        return (functional_call(model, parameters, (), inputs).last_hidden_state * upstream).sum()

    return loss


@pytest.mark.parametrize("backend", ["torch", "triton"])
@BY_NAME
def test_grad_of_a_functional_call_equals_stock(name, backend, on_device):
    stock, patched = pair(name, on_device)
    if backend == "triton":
        inputs = {"input_ids": ids(2, 5)}
    else:
        inputs = padded()
    upstream = torch.randn(*inputs["input_ids"].shape, 32)
    expected = grad(_loss(stock, inputs, upstream))(_parameters(stock))
    with ek.use_backend(backend):
        ours = grad(_loss(patched, inputs, upstream))(_parameters(patched))
    assert ours.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-5, atol=1e-5)


def _math_attention():
    """SDPA as PyTorch composes it: its fused kernels have no forward-mode formula, in stock models neither."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@BY_NAME
def test_forward_mode_tangents_equal_stock(name, backend, on_device):
    stock, patched = pair(name, on_device)
    tangents = {key: torch.randn_like(p) for key, p in stock.named_parameters()}
    inputs = {"input_ids": ids(2, 4)}
    found = []
    for model in (stock, patched):
        with forward_ad.dual_level(), _math_attention(), ek.use_backend(backend):
            duals = {key: forward_ad.make_dual(p, tangents[key]) for key, p in _parameters(model).items()}
            output = functional_call(model, duals, (), inputs).last_hidden_state
            found.append(forward_ad.unpack_dual(output).tangent)
    assert found[0] is not None
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_jvp_equals_stock(name):
    stock, patched = pair(name)
    inputs, upstream = {"input_ids": ids(2, 4)}, torch.randn(2, 4, 32)
    tangents = {key: torch.randn_like(p) for key, p in stock.named_parameters()}
    with _math_attention():
        expected = jvp(_loss(stock, inputs, upstream), (_parameters(stock),), (tangents,))
        ours = jvp(_loss(patched, inputs, upstream), (_parameters(patched),), (tangents,))
    torch.testing.assert_close(ours, expected)


def test_a_tangent_on_the_input_of_the_attention_alone(on_device):
    """The tables are frozen and have no tangent: the embeddings run fused, the attention does not."""
    stock, patched = pair("bert", on_device)
    key = "encoder.layer.0.attention.self.value.weight"
    found = []
    for model in (stock, patched):
        weight = dict(model.named_parameters())[key].detach()
        torch.manual_seed(0)
        tangent = torch.randn_like(weight)
        with forward_ad.dual_level(), _math_attention(), ek.use_backend("triton"):
            output = functional_call(
                model, {key: forward_ad.make_dual(weight, tangent)}, (torch.tensor([[5, 6, 7]]),)
            )
            found.append(forward_ad.unpack_dual(output.last_hidden_state).tangent)
    assert found[0] is not None
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_stock_forward_is_warned_of_once_and_left_after(name):
    model = build(name).eval()
    ek.patch(model)
    inputs, parameters = {"input_ids": ids(2, 4)}, _parameters(model)
    loss = _loss(model, inputs, torch.randn(2, 4, 32))
    with pytest.warns(UserWarning, match=r"stock forward: torch.func or forward-mode AD"):
        grad(loss)(parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad(loss)(parameters)
        model(**inputs)
    assert ek.hf.describe(model).entries[0].status == "already"

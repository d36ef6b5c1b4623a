"""Dropout: the mask is that of the reference bit for bit, and the same in both directions."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import embedkernels as ek
from embedkernels.reference.random import row_keep_mask
from tests.embed.cases import drawn_seed, make

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# The smallest probability that drops anything (2^-24, one value of the 24 bits), the next, the largest below 1,
# and what float32 rounds up to 1.
PROBABILITIES = [2.0**-24, 3.0**-15, 0.1, 0.5, 1.0 - 2.0**-24, 0.99999999, 1.0]


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (9, 7), (40, 33), (5, 768), (2, 1500)])
def test_mask_is_the_reference_s_in_both_directions(rows: int, width: int, p: float, device: torch.device) -> None:
    ids = torch.arange(rows, device=device)
    weight = torch.ones(rows, width, device=device, requires_grad=True)
    keep = row_keep_mask(drawn_seed(3, device), rows, width, p, device)
    torch.manual_seed(3)
    y = ek.embed(ids, weight, dropout_p=p, backend="triton")
    assert torch.equal(y != 0, keep)
    y.backward(torch.ones_like(y))
    assert torch.equal(weight.grad != 0, keep)
    in_float32 = float(torch.tensor(p, dtype=torch.float32))
    if in_float32 < 1:
        scale = torch.tensor(1 / (1 - in_float32), dtype=torch.float32, device=device)
        assert torch.equal(y, keep * scale)
        assert torch.equal(weight.grad, keep * scale)


def test_share_of_kept_elements_is_one_minus_p(device: torch.device) -> None:
    weight = torch.ones(64, 256, device=device)
    y = ek.embed(torch.arange(64, device=device), weight, dropout_p=0.1, backend="triton")
    elements = y.numel()
    assert abs(int((y != 0).sum()) - 0.9 * elements) < 5 * (0.1 * 0.9 * elements) ** 0.5


def test_manual_seed_reproduces_the_mask_and_the_next_call_has_another(device: torch.device) -> None:
    case = make((4, 8), 16, device=device, dropout_p=0.5)
    torch.manual_seed(1)
    first, second = case.run(), case.run()
    torch.manual_seed(1)
    again = case.run()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_without_dropout_no_random_number_is_drawn(device: torch.device) -> None:
    case = make((2, 3), 8, device=device)
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    case.run()
    assert torch.equal(torch.rand(3, device=device), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_activation_checkpointing_gives_the_same_bits(backend: str, reentrant: bool, device: torch.device) -> None:
    case = make((3, 5), 24, device=device, dropout_p=0.4)
    upstream = torch.randn(3, 5, 24, device=device)
    parameters = list(case.parameters.values())

    def backward(y: torch.Tensor) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        y.backward(upstream)
        return [parameter.grad for parameter in parameters]

    torch.manual_seed(2)
    plain = case.run(backend=backend)
    plain_grads = backward(plain)
    torch.manual_seed(2)
    anchor = torch.zeros((), device=device, requires_grad=True)  # reentrant checkpointing wants one with a gradient
    checkpointed = checkpoint(lambda _: case.run(backend=backend), anchor, use_reentrant=reentrant)
    torch.manual_seed(99)  # whatever happens between the two passes
    torch.rand(5, device=device)
    assert torch.equal(plain, checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, backward(checkpointed), strict=True))


def test_torch_backend_draws_the_numbers_of_stock_dropout() -> None:
    case = make((4, 8), 16, dropout_p=0.3, norm="none", positions="none", types="none")
    torch.manual_seed(4)
    y = case.run(backend="torch")
    torch.manual_seed(4)
    assert torch.equal(y, F.dropout(F.embedding(case.ids, case.parameters["weight"]), 0.3))

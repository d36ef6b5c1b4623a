"""Forward and every gradient of the fused op under the numerical contract."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embedkernels as ek
from embedkernels.reference.sinusoids import sinusoids
from tests.embed.cases import (
    DTYPES,
    EXTRAS,
    MASKS,
    NORMS,
    PACKED,
    POSITIONS,
    RMS_NORMS,
    SCALES,
    SINUSOIDS,
    SOURCES,
    TYPES,
    Case,
    assert_contract,
    make,
)
from tests.properties import examples

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# 1 and 3: fewer than one Philox group; 16 and 64: several rows in a tile; 33, 384, 768: a masked rest of the tile,
# with one and several warps and rows.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 16, 33, 64, 384, 768])
def test_every_width_meets_the_contract(width: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = (2, 5) if width < 384 else (2, 3)
    assert_contract(make(shape, width, dtype=dtype, device=device, dropout_p=0.1))


# A row of several tiles: with a norm beyond 8192 columns, without beyond 1024.
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("width", "norm"), [(8200, "plain"), (1500, "none"), pytest.param(16384, "both", marks=pytest.mark.gpu)]
)
def test_rows_wider_than_a_tile_meet_the_contract(
    width: int, norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_contract(make((3,), width, dtype=dtype, device=device, norm=norm, dropout_p=0.25))


@pytest.mark.parametrize("features", ["few", "all"])
@pytest.mark.parametrize("norm", [*NORMS, *RMS_NORMS])
@pytest.mark.parametrize("width", [65, 128])
def test_rows_of_several_small_tiles_meet_the_contract(
    width: int, norm: str, features: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path as above with every feature, at widths that the interpreter can afford."""
    from embedkernels.kernels import embed as kernels

    monkeypatch.setattr(kernels, "WIDEST", 64)
    monkeypatch.setattr(kernels, "CHUNK", 32)
    kernels.tile.cache_clear()
    try:
        assert kernels.tile(width, 4, True, True).chunks == -(-width // 32)
        more = {} if features == "few" else {"scale": 3.0, "extra": "full", "mask": "bool", "dropout_first": True}
        assert_contract(make((2, 3), width, device=device, norm=norm, dropout_p=0.25, **more))
    finally:
        kernels.tile.cache_clear()


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_way_to_give_positions_and_types_meets_the_contract(
    positions: str, types: str, device: torch.device
) -> None:
    assert_contract(
        make((3, 4), 20, dtype=torch.bfloat16, device=device, positions=positions, types=types, dropout_p=0.1)
    )


@pytest.mark.parametrize(("dropout_p", "dropout_first"), [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("norm", [*NORMS, *RMS_NORMS])
def test_every_norm_meets_the_contract(
    norm: str, dropout_p: float, dropout_first: bool, device: torch.device
) -> None:
    assert_contract(make((3, 4), 33, device=device, norm=norm, dropout_p=dropout_p, dropout_first=dropout_first))


@pytest.mark.parametrize("norm", ["none", "both", "rms weight"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_a_row_meets_the_contract(
    source: str, extra: str, scale: float, norm: str, device: torch.device
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_contract(
            make((3, 4), 20, dtype=dtype, device=device, norm=norm, source=source, scale=scale, extra=extra)
        )


@pytest.mark.parametrize("norm", ["none", "both"])
@pytest.mark.parametrize("width", [16, 37])
@pytest.mark.parametrize("positions", SINUSOIDS)
def test_every_layout_of_sinusoids_meets_the_contract(
    positions: str, width: int, norm: str, device: torch.device
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_contract(make((3, 8), width, dtype=dtype, device=device, positions=positions, norm=norm))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["interleaved", "halves", "fairseq"])
def test_sinusoids_are_the_tables_of_the_models(layout: str, backend: str, device: torch.device) -> None:
    """To a unit in the last place of 1 in float32, and on the torch backend all but bit for bit."""
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
    from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings

    count, zero = 600, None
    for width in (16, 31):
        if layout == "fairseq":
            zero = 1
            table = M2M100SinusoidalPositionalEmbedding.get_embedding(count, width, zero)
        elif layout == "halves":
            table = MarianSinusoidalPositionalEmbedding(count, width).create_weight()
        else:
            table = create_sinusoidal_embeddings(count, width, torch.empty(count, width))
        places = torch.cat((torch.arange(40), torch.tensor([255, 256, 511, 599]))).to(device)
        nothing = torch.zeros(1, width, device=device)
        y = ek.embed(
            torch.zeros_like(places), nothing, sinusoids=layout, position_ids=places, position_padding_idx=zero,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(y, table.to(device)[places], rtol=0, atol=2.0**-23)


def test_sinusoids_far_out_are_as_exact(device: torch.device) -> None:
    """Where an angle in float32 has lost its sine: thousands of turns."""
    places = torch.tensor([4095, 4096, 30000, 65535, 65536, 131071, 2**20 + 1, 2**24 - 1], device=device)
    for layout in ("interleaved", "halves", "fairseq"):
        y = ek.embed(
            torch.zeros_like(places), torch.zeros(1, 64, device=device), sinusoids=layout, position_ids=places,
            backend="triton",
        )  # fmt: skip
        torch.testing.assert_close(y, sinusoids(places, 64, layout).float(), rtol=0, atol=6e-7)


@pytest.mark.parametrize("norm", ["none", "both"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_meets_the_contract(mask: str, dropout_p: float, norm: str, device: torch.device) -> None:
    assert_contract(make((3, 4), 20, device=device, norm=norm, mask=mask, dropout_p=dropout_p))


@pytest.mark.parametrize("positions", [*POSITIONS, "halves", "fairseq ids"])
@pytest.mark.parametrize("packed", PACKED[1:])
@pytest.mark.parametrize("source", SOURCES)
def test_every_packed_call_meets_the_contract(source: str, packed: str, positions: str, device: torch.device) -> None:
    parts: list[dict[str, Any]] = [
        {"types": "ids", "extra": "full", "norm": "both"},
        {"types": "one row", "extra": "one row", "norm": "none"},
        {"types": "zeros", "extra": "none", "norm": "rms weight"},
    ]
    for part in parts:
        options = {"source": source, "packed": packed, "positions": positions, "dropout_p": 0.2, "scale": 3.0, **part}
        assert_contract(*(make((3, 4), 20, device=device, **options) for _ in range(4)))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_packed_rows_are_those_of_the_padded_call(backend: str, device: torch.device) -> None:
    """Rows and gradients; padding that is left out gives the gradient that zeros upstream give."""
    case = make((3, 6), 16, device=device, positions="start")
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6], device=device).bool()
    padded = case.run(backend=backend)
    places = real.flatten().nonzero()[:, 0]
    y = case.run(backend=backend, packed=places)
    assert torch.equal(y, padded[real])
    upstream = torch.randn_like(y)
    full = torch.zeros_like(padded).masked_scatter(real[..., None], upstream)
    ours, theirs = case.gradients(y, upstream), case.gradients(padded, full)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("count", [0, 1])
def test_few_packed_rows(backend: str, count: int, device: torch.device) -> None:
    case = make((2, 3), 8, device=device, extra="full", norm="both")
    y = case.run(backend=backend, packed=torch.zeros(count, dtype=torch.int64, device=device))
    assert y.shape == (count, 8)
    grads = case.gradients(y, torch.ones_like(y))
    assert all(grad.shape == case.parameters[name].shape for name, grad in grads.items())
    assert count > 0 or not any(grad.any() for grad in grads.values())


def test_masked_rows_are_zero_and_get_no_gradient(device: torch.device) -> None:
    case = make((2, 4), 8, device=device, source="given", positions="none", types="none", norm="both")
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], device=device).bool()
    case.options["mask"] = mask
    y = case.run()
    assert torch.equal(y.ne(0).any(-1), mask)
    grad = case.gradients(y, torch.randn_like(y))["inputs_embeds"]
    assert torch.equal(grad.ne(0).any(-1), mask)


def test_a_scale_is_of_the_token_rows_alone(device: torch.device) -> None:
    """And of their gradient alone: what the other parts get does not change with it."""
    case = make((2, 4), 8, device=device, norm="none", extra="full")
    one = case.gradients(case.run(), torch.ones(2, 4, 8, device=device))
    case.options["scale"] = 4.0
    four = case.gradients(case.run(), torch.ones(2, 4, 8, device=device))
    for name in one:
        assert torch.equal(four[name], one[name] * (4.0 if name == "weight" else 1.0)), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_order_of_addition_is_kept_where_it_is_rounded(backend: str, device: torch.device) -> None:
    case = make((3, 40), 16, dtype=torch.bfloat16, device=device, norm="none")
    word, place, kind = (case.parameters[f"{name}weight"] for name in ("", "position_", "type_"))
    ids, places, kinds = case.ids, case.options["position_ids"], case.options["type_ids"]
    orders = {False: (word[ids] + kind[kinds]) + place[places], True: (word[ids] + place[places]) + kind[kinds]}
    assert not torch.equal(*orders.values())
    for position_first, expected in orders.items():
        y = case.run(backend=backend, position_first=position_first)
        if backend == "torch":
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


# The extents of the backward kernel's stages: a last tile that is not full, one and several programs, more tiles than
# programs.
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(61, 33), (200, 33), (45, 600)])
def test_many_rows_meet_the_contract(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_contract(make((rows,), width, dtype=dtype, device=device, dropout_p=0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [384, 768, 1024, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (32, 128), (7, 511)], ids=str)
def test_training_sizes_meet_the_contract(
    shape: tuple[int, int], width: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_contract(make(shape, width, dtype=dtype, device=device, positions="arange", dropout_p=0.1))


@pytest.mark.parametrize("eps", [1e-12, 0.0, 0.1])
def test_eps_of_the_norm_is_honoured(eps: float, device: torch.device) -> None:
    assert_contract(make((12, 16), 24, device=device, norm_eps=eps))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (2, 1, 3), (2, 2, 2, 2)], ids=str)
def test_ids_of_any_shape_meet_the_contract(shape: tuple[int, ...], device: torch.device) -> None:
    assert_contract(make(shape, 12, device=device, positions="arange", types="zeros"))


def test_32_bit_ids_give_the_same_bits_as_64_bit_ones(device: torch.device) -> None:
    case = make((3, 4), 16, device=device)
    short = Case(case.ids.int(), case.parameters, dict(case.options))
    for name in ("position_ids", "type_ids"):
        short.options[name] = short.options[name].int()
    upstream = torch.randn(3, 4, 16, device=device)
    a, b = case.run(), short.run()
    assert torch.equal(a, b)
    grads, short_grads = case.gradients(a, upstream), short.gradients(b, upstream)
    assert all(torch.equal(grads[name], short_grads[name]) for name in grads)


def test_strided_ids_are_read_by_their_strides(device: torch.device) -> None:
    case = make((4, 3), 16, device=device)
    turned = Case(case.ids.t().contiguous().t(), case.parameters, dict(case.options))
    every_other = torch.stack([case.options["position_ids"]] * 2, dim=-1)[..., 0]
    turned.options["position_ids"] = every_other
    assert not turned.ids.is_contiguous()
    assert not every_other.is_contiguous()
    assert torch.equal(case.run(), turned.run())


def test_position_ids_may_broadcast_along_the_sequence(device: torch.device) -> None:
    """(B, 1): another position in every sequence, the same at all its places."""
    case = make((3, 4), 16, device=device, positions="one row")
    case.options["position_ids"] = torch.tensor([[0], [5], [2]], device=device)
    assert_contract(case)


def test_tables_with_strides_meet_the_contract(device: torch.device) -> None:
    case = make((3, 4), 16, device=device)
    wide = torch.randn(11, 40, device=device)
    case.parameters["weight"] = wide[:, 3:19].requires_grad_()
    assert not case.parameters["weight"].is_contiguous()
    assert_contract(case)


def test_fp32_norm_over_16_bit_tables_meets_the_contract(device: torch.device) -> None:
    case = make((3, 4), 24, dtype=torch.bfloat16, device=device)
    for name in ("norm_weight", "norm_bias"):
        case.parameters[name] = case.parameters[name].detach().float().requires_grad_()
    assert_contract(case)


def test_upstream_gradient_may_have_any_strides(device: torch.device) -> None:
    case = make((3, 4), 16, device=device)
    dense = torch.randn(16, device=device).expand(3, 4, 16)
    y = case.run()
    ours, expected = case.gradients(y, dense), case.gradients(case.run(), dense.contiguous())
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("positions", POSITIONS[1:])
def test_padding_rows_get_no_gradient(positions: str, device: torch.device) -> None:
    case = make((12, 16), 24, device=device, positions=positions, padding_idx=2, position_padding_idx=4)
    case.ids[0, :2] = 2
    if "position_ids" in case.options:
        case.options["position_ids"] = case.options["position_ids"].clone()
        case.options["position_ids"][0, :2] = 4
    assert_contract(case)
    grads = case.gradients(case.run(), torch.randn(12, 16, 24, device=device))
    assert grads["weight"][2].eq(0).all()
    assert grads["position_weight"][4].eq(0).all()
    assert grads["weight"].ne(0).any()


def test_negative_padding_idx_counts_from_the_end(device: torch.device) -> None:
    case = make((3, 6), 8, device=device, padding_idx=-1)
    case.ids[0] = 10
    grads = case.gradients(case.run(), torch.randn(3, 6, 8, device=device))
    assert grads["weight"][10].eq(0).all()


def test_a_batch_of_padding_only_has_a_zero_token_gradient(device: torch.device) -> None:
    case = make((3, 6), 8, device=device, padding_idx=2)
    case.ids.fill_(2)
    assert_contract(case)
    grads = case.gradients(case.run(), torch.randn(3, 6, 8, device=device))
    assert grads["weight"].eq(0).all()
    assert grads["type_weight"].ne(0).any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(
    backend: str, shape: tuple[int, ...], device: torch.device
) -> None:
    case = make(shape, 8, device=device, positions="arange", types="zeros", dropout_p=0.1)
    y = case.run(backend=backend)
    assert y.shape == (*shape, 8)
    grads = case.gradients(y, torch.randn(*shape, 8, device=device))
    assert all(grad.eq(0).all() and grad.shape == case.parameters[name].shape for name, grad in grads.items())


def test_tables_may_be_the_same_tensor(device: torch.device) -> None:
    """GPT-2 looks token types up in the token table."""
    case = make((2, 4), 8, device=device, types="ids")
    case.parameters["type_weight"] = case.parameters["weight"]
    y, expected = case.run(), case.reference()
    upstream = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    weight = case.parameters["weight"]
    torch.testing.assert_close(
        torch.autograd.grad(y, weight, upstream)[0], torch.autograd.grad(expected, weight, upstream)[0]
    )


@examples(25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    width=st.integers(8, 70),  # below, a norm leaves next to nothing of a gradient but the rounding of its terms
    dtype=st.sampled_from(DTYPES),
    positions=st.sampled_from([*POSITIONS, *SINUSOIDS]),
    types=st.sampled_from(TYPES),
    norm=st.sampled_from([*NORMS, *RMS_NORMS]),
    source=st.sampled_from(SOURCES),
    extra=st.sampled_from(EXTRAS),
    mask=st.sampled_from(MASKS),
    packed=st.sampled_from(PACKED),
    scale=st.sampled_from(SCALES),
    dropout_first=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_small_call_meets_the_contract(shape, width, seed, **options):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_contract(*(make(shape, width, device=device, **options) for _ in range(4)))


@pytest.mark.parametrize("norm", ["both", "rms both"])
def test_gradient_agrees_with_finite_differences(norm: str) -> None:
    """The reference itself, in float64: what every other test measures against."""
    case = make((2, 3), 5, dtype=torch.float64, dropout_p=0.3, scale=1.5, extra="full", mask="float", norm=norm)
    names, values = zip(*case.parameters.items(), strict=True)

    def call(*parameters: torch.Tensor) -> torch.Tensor:
        return Case(case.ids, dict(zip(names, parameters, strict=True)), case.options).reference(torch.tensor([7]))

    case.options["padding_idx"] = None
    assert torch.autograd.gradcheck(call, values)


def test_float64_tables_run_on_the_torch_backend(device: torch.device) -> None:
    case = make((2, 3), 5, dtype=torch.float64, device=device)
    with ek.use_backend("triton"):
        y = case.run(backend=None)
    assert torch.equal(y, case.reference())


@pytest.mark.parametrize("layout", ["every other", "expanded", "reversed copy"])
def test_norm_parameters_of_any_stride(layout: str, device: torch.device) -> None:
    """Read by their strides, and given their gradients in their own shape, in both passes."""
    case = make((12, 16), 24, device=device)
    for name in ("norm_weight", "norm_bias"):
        values = {
            "every other": torch.randn(48, device=device)[::2],
            "expanded": torch.randn(1, device=device).expand(24),
            "reversed copy": torch.randn(24, 3, device=device)[:, 1],
        }[layout]
        case.parameters[name] = values.requires_grad_()
    assert_contract(case)

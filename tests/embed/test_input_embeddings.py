"""FusedInputEmbeddings: a module as any other, whose state_dict is Hugging Face's."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertConfig, BertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaConfig, RobertaEmbeddings

import embedkernels as ek
from embedkernels.reference.embed import positions_from_padding
from embedkernels.reference.sinusoids import sinusoids


def stem(**changes: object) -> ek.FusedInputEmbeddings:
    options = {"max_positions": 16, "num_types": 2, "padding_idx": 1, **changes}
    return ek.FusedInputEmbeddings(30, 12, **options)


@pytest.fixture
def ids(device: torch.device) -> torch.Tensor:
    drawn = torch.randint(2, 30, (3, 7), device=device)
    drawn[1, 4:] = 1
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_stock_state_dict_loads_and_gives_stock_s_bits(
    family: str, training: bool, dtype: torch.dtype, ids: torch.Tensor, device: torch.device
) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 12, "num_attention_heads": 2, "max_position_embeddings": 16}
    if family == "bert":
        stock: nn.Module = BertEmbeddings(BertConfig(**sizes, pad_token_id=1))
    else:
        stock = RobertaEmbeddings(RobertaConfig(**sizes, pad_token_id=1, type_vocab_size=2))
    ours = stem(positions="padding" if family == "roberta" else "arange")
    assert set(ours.state_dict()) == set(stock.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)
    stock.to(device, dtype).train(training)
    ours.to(device, dtype).train(training)
    type_ids = torch.randint(0, 2, ids.shape, device=device)
    with ek.use_backend("torch"):
        torch.manual_seed(5)
        y = ours(ids, type_ids=type_ids)
    torch.manual_seed(5)
    assert torch.equal(y, stock(ids, token_type_ids=type_ids))


@pytest.mark.parametrize("positions", ["arange", "padding"])
@pytest.mark.parametrize(
    ("max_positions", "num_types", "norm"), [(16, 2, "layer"), (16, None, None), (16, None, "layer")]
)
def test_forward_is_embed_with_the_children_s_parameters(
    max_positions: int,
    num_types: int | None,
    norm: str | None,
    positions: str,
    ids: torch.Tensor,
    device: torch.device,
) -> None:
    module = stem(max_positions=max_positions, num_types=num_types, norm=norm, positions=positions).to(device)
    layer, types = module.LayerNorm, module.token_type_embeddings
    torch.manual_seed(2)
    y = module(ids)
    torch.manual_seed(2)
    expected = ek.embed(
        ids,
        module.word_embeddings.weight,
        position_weight=module.position_embeddings.weight,
        position_ids=positions_from_padding(ids, 1) if positions == "padding" else None,
        type_weight=None if types is None else types.weight,
        norm=norm,
        norm_weight=None if layer is None else layer.weight,
        norm_bias=None if layer is None else layer.bias,
        dropout_p=0.1,
        padding_idx=1,
    )
    assert torch.equal(y, expected)


def test_bart_s_front_end(ids: torch.Tensor, device: torch.device) -> None:
    """Scaled tokens and positions from 2 on, then the norm."""
    module = stem(scale=12**0.5, position_offset=2, num_types=None, dropout=0.0).to(device)
    word, place = module.word_embeddings, module.position_embeddings
    assert place is not None
    expected = module.LayerNorm(word(ids) * 12**0.5 + place(torch.arange(2, 9, device=device)))
    with ek.use_backend("torch"):
        assert torch.equal(module(ids), expected)
    later = module(ids[:, 3:], position_start=3)
    torch.testing.assert_close(later, expected[:, 3:])


@pytest.mark.parametrize("layout", ["interleaved", "halves", "fairseq"])
def test_sinusoids_need_no_table(layout: str, ids: torch.Tensor, device: torch.device) -> None:
    module = stem(positions=layout, max_positions=None, num_types=None, norm="rms", dropout=0.0).to(device)
    assert sorted(module.state_dict()) == ["LayerNorm.weight", "word_embeddings.weight"]
    rows = sinusoids(torch.arange(5, 12, device=device), 12, layout).float()
    torch.testing.assert_close(module(ids, position_start=5), module.LayerNorm(module.word_embeddings(ids) + rows))


@pytest.mark.parametrize("positions", ["arange", "padding"])
def test_rows_may_be_given(positions: str, ids: torch.Tensor, device: torch.device) -> None:
    """As from the token table; positions then count every place, as RoBERTa's do."""
    module = stem(positions=positions, dropout=0.0).to(device)
    full = ids.masked_fill(ids == 1, 2)
    rows = module.word_embeddings(full).detach().requires_grad_()
    y = module(None, inputs_embeds=rows)
    torch.testing.assert_close(y, module(full), rtol=0, atol=0)
    y.square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.ne(0).any()
    assert module.word_embeddings.weight.grad is None


def test_mask_extra_and_packing_are_embed_s(ids: torch.Tensor, device: torch.device) -> None:
    module = stem(dropout=0.0, dropout_first=True).to(device)
    real, extra = ids != 1, torch.randn(7, 12, device=device)
    y = module(ids, extra=extra, mask=real)
    assert torch.equal(y.ne(0).any(-1), real)
    packed = module(ids, extra=extra, packed=real.flatten().nonzero()[:, 0])
    assert torch.equal(packed, y[real])


def test_tokens_alone_without_norm_are_an_embedding(ids: torch.Tensor, device: torch.device) -> None:
    module = ek.FusedInputEmbeddings(30, 12, norm=None, dropout=0.0).to(device)
    assert list(module.state_dict()) == ["word_embeddings.weight"]
    assert torch.equal(module(ids), nn.functional.embedding(ids, module.word_embeddings.weight))


@pytest.mark.parametrize("positions", ["arange", "padding"])
def test_decoding_token_by_token_gives_the_whole_sequence(positions: str, device: torch.device) -> None:
    module = stem(positions=positions).to(device).eval()
    ids = torch.randint(2, 30, (2, 6), device=device)
    steps = [module(ids[:, s : s + 1], position_start=s) for s in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), module(ids), rtol=0, atol=0)


def test_given_position_ids_are_used(ids: torch.Tensor, device: torch.device) -> None:
    module = stem(positions="padding").to(device).eval()
    places = torch.arange(7, device=device)[None]
    assert not torch.equal(module(ids, position_ids=places), module(ids))
    assert torch.equal(module(ids, position_ids=places), module(ids, position_ids=places.expand(3, 7)))


def test_dropout_follows_the_mode(ids: torch.Tensor, device: torch.device) -> None:
    module = stem(dropout=0.5).to(device)
    assert not torch.equal(module(ids), module(ids))
    module.eval()
    assert torch.equal(module(ids), module(ids))


def test_padding_rows_get_no_gradient(ids: torch.Tensor, device: torch.device) -> None:
    module = stem(positions="padding").to(device)
    module(ids).backward(torch.randn(3, 7, 12, device=device))
    assert module.word_embeddings.weight.grad[1].eq(0).all()
    assert module.position_embeddings.weight.grad[1].eq(0).all()
    assert all(parameter.grad.ne(0).any() for parameter in module.parameters())


@pytest.mark.parametrize("positions", ["arange", "padding"])
def test_negative_padding_idx_counts_from_the_end_of_the_token_table(positions: str, device: torch.device) -> None:
    """The table of positions has another number of rows: padding's row there is that of the same id."""
    torch.manual_seed(1)
    module = ek.FusedInputEmbeddings(12, 8, max_positions=40, padding_idx=-2, positions=positions, dropout=0.0)
    torch.manual_seed(1)
    same = ek.FusedInputEmbeddings(12, 8, max_positions=40, padding_idx=10, positions=positions, dropout=0.0)
    module, same = module.to(device), same.to(device)
    ids = torch.tensor([[3, 4, 10, 10]], device=device)
    assert torch.equal(module(ids), same(ids))
    assert module.word_embeddings.padding_idx == 10
    assert module.position_embeddings.padding_idx == (10 if positions == "padding" else None)


def test_it_can_be_copied_pickled_and_moved(ids: torch.Tensor, device: torch.device) -> None:
    module = stem().to(device).eval()
    expected = module(ids)
    assert torch.equal(copy.deepcopy(module)(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(ids), expected)
    assert module.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert stem(device="meta", dtype=torch.float16).word_embeddings.weight.dtype == torch.float16


def test_compiled_without_graph_breaks_it_gives_the_same_bits(ids: torch.Tensor, device: torch.device) -> None:
    torch._dynamo.reset()
    module = stem(positions="padding").to(device).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), module(ids))


def test_errors_name_the_argument(ids: torch.Tensor, device: torch.device) -> None:
    with pytest.raises(ValueError, match="norm must be None, 'layer' or 'rms', got 'group'"):
        stem(norm="group")
    with pytest.raises(ValueError, match=r"positions must be arange, padding, interleaved, .* got 'sinus'"):
        stem(positions="sinus")
    with pytest.raises(ValueError, match="positions 'halves' have no table: max_positions must be None"):
        stem(positions="halves")
    with pytest.raises(ValueError, match="position_offset is 2, but there are no positions"):
        stem(position_offset=2, max_positions=None)
    alone = stem(max_positions=None).to(device).eval()
    assert torch.equal(alone(ids, position_start=3), alone(ids))
    with pytest.raises(ValueError, match="FusedInputEmbeddings: scale must be between"):
        stem(scale=0.0)
    for options in ({"position_offset": -1}, {"position_offset": 2, "positions": "padding"}):
        with pytest.raises(ValueError, match="position_offset must not be negative, and 0 with positions 'padding'"):
            stem(**options)
    with pytest.raises(ValueError, match="position_start must be 0 where position_ids is given, got 2"):
        stem().to(device)(ids, position_ids=ids, position_start=2)
    with pytest.raises(ValueError, match="'padding' needs padding_idx and max_positions"):
        stem(positions="padding", padding_idx=None)
    with pytest.raises(ValueError, match="'padding' needs padding_idx and max_positions"):
        stem(positions="padding", max_positions=None)
    with pytest.raises(ValueError, match=r"counts from padding_idx \+ 1 = 16 on, but max_positions is 16"):
        stem(positions="padding", padding_idx=15)
    with pytest.raises(ValueError, match=r"counts from padding_idx \+ 1 = 30 on, but max_positions is 16"):
        stem(positions="padding", padding_idx=-1)
    for padding_idx in (30, -31):
        with pytest.raises(ValueError, match=f"padding_idx {padding_idx} is out of range for a table of 30 rows"):
            stem(padding_idx=padding_idx)
    with pytest.raises(TypeError, match="FusedInputEmbeddings: padding_idx must be an int, got float"):
        stem(padding_idx=1.5)
    with pytest.raises(IndexError, match="7 positions from position_start 10 reach position 16"):
        stem().to(device)(ids, position_start=10)


def test_repr_says_what_it_is() -> None:
    text = repr(stem(positions="padding"))
    assert "positions='padding'" in text
    assert "(LayerNorm)" in text
    text = repr(stem(scale=2.0, position_offset=2, norm="rms", dropout_first=True))
    assert "norm='rms', positions='arange', scale=2, position_offset=2, dropout_first=True" in text

"""The torch backend equals Hugging Face's embeddings bit for bit; both backends keep the contract with them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertConfig, BertEmbeddings
from transformers.models.distilbert.modeling_distilbert import DistilBertConfig
from transformers.models.distilbert.modeling_distilbert import Embeddings as DistilBertEmbeddings
from transformers.models.roberta.modeling_roberta import RobertaConfig, RobertaEmbeddings

import embedkernels as ek
from embedkernels.reference.embed import positions_from_padding
from tests.contract import assert_within_contract

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 2, "max_position_embeddings": 20}
PAD = 1

Fused = Callable[..., Tensor]


def bert() -> tuple[nn.Module, Fused]:
    stock = BertEmbeddings(BertConfig(**SIZES, pad_token_id=PAD))
    return stock, lambda ids, **more: from_bert(stock, ids, **more)


def from_bert(stock: nn.Module, ids: Tensor, **more: object) -> Tensor:
    return ek.embed(
        ids,
        stock.word_embeddings.weight,
        position_weight=stock.position_embeddings.weight,
        type_weight=stock.token_type_embeddings.weight,
        norm="layer",
        norm_weight=stock.LayerNorm.weight,
        norm_bias=stock.LayerNorm.bias,
        norm_eps=stock.LayerNorm.eps,
        dropout_p=stock.dropout.p if stock.training else 0.0,
        padding_idx=stock.word_embeddings.padding_idx,
        **more,
    )


def roberta() -> tuple[nn.Module, Fused]:
    stock = RobertaEmbeddings(RobertaConfig(**SIZES, pad_token_id=PAD, type_vocab_size=1))
    return stock, lambda ids, **more: from_bert(
        stock, ids, position_ids=positions_from_padding(ids, PAD), position_padding_idx=PAD, **more
    )


def distilbert() -> tuple[nn.Module, Fused]:
    sizes = {"vocab_size": 40, "dim": 24, "n_heads": 2, "max_position_embeddings": 20}
    stock = DistilBertEmbeddings(DistilBertConfig(**sizes, pad_token_id=PAD))
    return stock, lambda ids, **more: ek.embed(
        ids,
        stock.word_embeddings.weight,
        position_weight=stock.position_embeddings.weight,
        norm="layer",
        norm_weight=stock.LayerNorm.weight,
        norm_bias=stock.LayerNorm.bias,
        norm_eps=stock.LayerNorm.eps,
        dropout_p=stock.dropout.p if stock.training else 0.0,
        padding_idx=PAD,
        **more,
    )


class Gpt2Stem(nn.Module):
    """The first lines of ``GPT2Model.forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(40, 24), nn.Embedding(20, 24), nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        return self.drop(self.wte(ids) + self.wpe(places))


def gpt2() -> tuple[nn.Module, Fused]:
    stock = Gpt2Stem()
    return stock, lambda ids, **more: ek.embed(
        ids,
        stock.wte.weight,
        position_weight=stock.wpe.weight,
        dropout_p=stock.drop.p if stock.training else 0.0,
        **more,
    )


FAMILIES = [bert, roberta, distilbert, gpt2]


def padded_ids(device: torch.device) -> Tensor:
    ids = torch.randint(2, 40, (3, 9), device=device)
    ids[1, 6:] = PAD
    ids[2, :2] = PAD
    return ids


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_backend_gives_stock_s_bits(
    family: Callable[[], tuple[nn.Module, Fused]], dtype: torch.dtype, training: bool, device: torch.device
) -> None:
    stock, fused = family()
    stock.to(device, dtype).train(training)
    ids = padded_ids(device)
    torch.manual_seed(3)
    expected = stock(ids)
    torch.manual_seed(3)
    y = fused(ids, backend="torch")
    assert torch.equal(y, expected)
    if training:
        assert (y == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_keep_the_contract_with_stock(
    backend: str, family: Callable[[], tuple[nn.Module, Fused]], dtype: torch.dtype, device: torch.device
) -> None:
    stock, fused = family()
    stock.to(device, dtype).eval()
    ids = padded_ids(device)
    upstream = torch.randn(3, 9, 24, device=device)

    def gradients(y: Tensor) -> dict[str, Tensor]:
        stock.zero_grad()
        y.backward(upstream.to(y.dtype))
        return {name: p.grad.clone() for name, p in stock.named_parameters()}

    ours, theirs = gradients(fused(ids, backend=backend)), gradients(stock(ids))
    exact = gradients(stock.double()(ids))
    assert set(ours) == set(exact)
    for name in exact:
        assert_within_contract(ours[name], theirs[name], exact[name], f"gradient of {name}")


def test_token_types_are_added_in_stock_s_order(device: torch.device) -> None:
    stock, fused = bert()
    stock.to(device, torch.bfloat16).eval()
    ids = padded_ids(device)
    type_ids = torch.randint(0, 2, ids.shape, device=device)
    position_ids = torch.randint(0, 20, ids.shape, device=device)
    expected = stock(ids, token_type_ids=type_ids, position_ids=position_ids)
    assert torch.equal(fused(ids, type_ids=type_ids, position_ids=position_ids, backend="torch"), expected)


@pytest.mark.parametrize("past_length", [0, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions_from_padding_are_stock_roberta_s(
    dtype: torch.dtype, past_length: int, device: torch.device
) -> None:
    ids = padded_ids(device).to(dtype)
    expected = RobertaEmbeddings.create_position_ids_from_input_ids(ids, PAD, past_length)
    ours = positions_from_padding(ids, PAD, past_length)
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)


def test_positions_from_padding_of_one_sequence_and_of_none(device: torch.device) -> None:
    assert positions_from_padding(torch.tensor([4, 1, 7], device=device), 1).tolist() == [2, 1, 3]
    assert positions_from_padding(torch.zeros(0, 4, dtype=torch.int64, device=device), 1).shape == (0, 4)

"""The attention implementation "embedkernels": which calls the kernels take, which go to SDPA, which are refused."""

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import embedkernels as ek
from embedkernels.hf import attention as hf_attention
from embedkernels.hf import masks
from tests.hf.models import VOCAB, build, ids, padded, pair

BERT = transformers.BertConfig()
OLMO = transformers.OlmoConfig()


class Module(nn.Module):
    """What transformers passes as the attention module."""

    def __init__(self, is_causal=False, groups=1, config=BERT):
        super().__init__()
        self.is_causal, self.num_key_value_groups, self.config = is_causal, groups, config


@pytest.fixture
def kernel_calls(monkeypatch):
    """The keyword arguments of every call of the attention op."""
    # The package has a function of the same name, so the module is not an attribute to import.
    op = importlib.import_module("embedkernels.ops.attention")
    calls = []

    def spy(name):
        stock = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *args, **kwargs: (calls.append(kwargs), stock(*args, **kwargs))[1])

    spy("attention")
    spy("attention_in_ranges")
    return calls


def qkv(batch=2, heads=2, q=5, k=5, dim=16, kv_heads=None, dtype=torch.float32):
    kv_heads = kv_heads or heads
    # As in models: (B, S, H, D) in memory, heads moved to the front.
    return tuple(
        torch.randn(batch, length, n, dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for length, n in ((q, heads), (k, kv_heads), (k, kv_heads))
    )


def test_both_functions_are_registered():
    assert AttentionInterface._global_mapping["embedkernels"] is hf_attention.attention_forward
    assert AttentionMaskInterface._global_mapping["embedkernels"] is masks.attention_mask


def mask_arguments(pattern, q, k, offset, padding, config=BERT):
    causal = pattern == "causal"
    device = torch.get_default_device()
    return {
        "batch_size": 3,
        "q_length": q,
        "kv_length": k,
        "q_offset": offset,
        "kv_offset": 0,
        "mask_function": causal_mask_function if causal else bidirectional_mask_function,
        "attention_mask": None if padding is None else padding.to(device),
        "allow_is_causal_skip": causal,
        "allow_is_bidirectional_skip": not causal,
        "dtype": torch.float32,
        "config": config,
        "use_vmap": False,
        "device": device,
    }


def to_dense(mask, q, k, causal):
    """The dense mask that a mask of any form stands for, as the attention function reads it."""
    if mask is None:
        full = torch.ones(1, 1, q, k, dtype=torch.bool)
        return full.tril() if causal and q > 1 else full
    return masks.causal_keys_to_dense(mask, q) if mask.dim() == 2 else mask


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]], dtype=torch.bool)
SIZES = [
    (6, 6, 0),  # a whole sequence
    (1, 6, 5),  # one token after five
    (2, 6, 4),  # two tokens after four
]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize(("q", "k", "offset"), SIZES)
@pytest.mark.parametrize("padding", [None, "full", "short", "long", "none masked"])
def test_compact_masks_mean_what_the_dense_mask_says(pattern, q, k, offset, padding):
    causal = pattern == "causal"
    given = {
        None: None,
        "full": PADDING,
        "short": PADDING[:, :4],  # the rest counts as padding
        "long": F.pad(PADDING, (0, 3), value=True),
        "none masked": torch.ones(3, 6, dtype=torch.bool),
    }[padding]
    arguments = mask_arguments(pattern, q, k, offset, given)
    with ek.use_backend("triton"):
        mask = masks.attention_mask(**arguments)
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = sdpa_mask(**arguments | skips)
    assert mask is None or mask.dim() == 2 or mask.shape[2] == 1, "not compact"
    assert torch.equal(to_dense(mask, q, k, causal).expand(dense.shape), dense)
    if padding is None and (not causal or q in (1, k)):
        assert mask is None


@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize(("q", "k", "offset"), SIZES)
@pytest.mark.parametrize("padding", [None, PADDING, torch.ones(3, 6, dtype=torch.bool)])
def test_on_the_cpu_the_mask_is_the_one_of_sdpa(pattern, q, k, offset, padding):
    arguments = mask_arguments(pattern, q, k, offset, padding)
    mask, expected = masks.attention_mask(**arguments), sdpa_mask(**arguments)
    assert (mask is None) == (expected is None)
    assert mask is None or torch.equal(mask, expected)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "change",
    [
        {"q_offset": torch.tensor(0)},  # a static cache
        {"kv_length": 9},  # more keys than queries have seen
        {"mask_function": sliding_window_overlay(2)},
        {"mask_function": sliding_window_causal_mask_function(2), "q_offset": torch.tensor(0)},
        {"mask_function": and_masks(sliding_window_causal_mask_function(2), chunked_overlay(2, torch.zeros(3)))},
        {"local_size": 4},
        {"use_vmap": True, "attention_mask": None, "allow_is_causal_skip": False},
        {"allow_is_causal_skip": False},
        {"config": OLMO},  # may slice its mask: nobody has looked
        {"config": None},
    ],
)
def test_what_the_kernels_do_not_understand_gets_the_dense_mask(change):
    arguments = mask_arguments("causal", 6, 6, 0, PADDING) | change
    with ek.use_backend("triton"):
        mask = masks.attention_mask(**arguments)
    assert torch.equal(mask, sdpa_mask(**arguments))
    assert mask.shape == (3, 1, 6, arguments["kv_length"])


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]])
PATTERNS = {
    "window": sliding_window_causal_mask_function(3),
    "one key": sliding_window_causal_mask_function(1),
    "around": sliding_window_bidirectional_mask_function(2),
    "documents": and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)),
    "both": and_masks(sliding_window_causal_mask_function(2), packed_sequence_mask_function(DOCUMENTS)),
    "each way": and_masks(bidirectional_mask_function, packed_sequence_mask_function(DOCUMENTS)),
}


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("q", "k", "offset"), SIZES)
@pytest.mark.parametrize("padding", [None, PADDING])
def test_masks_of_ranges_mean_what_the_dense_mask_says(pattern, q, k, offset, padding):
    arguments = mask_arguments("causal", q, k, offset, padding) | {"mask_function": PATTERNS[pattern]}
    if pattern in ("window", "one key", "around"):
        arguments["local_size"] = 3
    else:
        arguments["allow_is_causal_skip"] = False
    with ek.use_backend("triton"):
        mask = masks.attention_mask(**arguments)
    dense = sdpa_mask(**arguments | {"allow_is_causal_skip": False})
    if q != k and pattern in ("documents", "both", "each way"):
        assert torch.equal(mask, dense)
        return
    assert masks.is_ranges(mask)
    assert mask.shape[1:] == (1, 2 if padding is None else 3, q + k)
    assert torch.equal(masks.ranges_to_dense(mask, q).expand(dense.shape), dense)
    # What a key is seen by is what sees it.
    of_queries, of_keys = mask[:, 0, :2, :q], mask[:, 0, :2, q:]
    i, j = torch.arange(q)[:, None], torch.arange(k)
    seen = (j >= of_queries[:, 0, :, None]) & (j < of_queries[:, 1, :, None])
    assert torch.equal(seen, (i >= of_keys[:, 0, None]) & (i < of_keys[:, 1, None]))
    assert (of_queries.diff(dim=2) >= 0).all()
    assert (of_keys.diff(dim=2) >= 0).all()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_call_in_ranges_equals_sdpa(pattern, padding, backend, kernel_calls):
    """The torch backend gets such a mask where a head is of a size that the kernels do not take."""
    size = 16 if backend == "triton" else 12
    q, k, v = (torch.randn(3, heads, 6, size) for heads in (4, 2, 2))
    module = Module(True, groups=2)
    arguments = mask_arguments("causal", 6, 6, 0, padding) | {"mask_function": PATTERNS[pattern]}
    with ek.use_backend("triton"):
        mask = masks.attention_mask(**arguments)
        output, _ = hf_attention.attention_forward(module, q, k, v, mask)
    dense = sdpa_mask(**arguments | {"allow_is_causal_skip": False})
    expected, _ = sdpa_attention_forward(module, q, k, v, dense)
    # A query without keys gives zeros here, anything in stock.
    sees = dense.any(-1)[:, 0, :, None, None].expand(expected.shape)
    torch.testing.assert_close(output[sees], expected[sees], rtol=1e-5, atol=1e-5)
    assert output[~sees].count_nonzero() == 0
    assert len(kernel_calls) == (backend == "triton")


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["mistral", "modernbert"])
def test_documents_count_beside_a_window(name):
    """The mask that transformers makes knows nothing of ``cu_seq_lens_q``."""
    stock, patched = pair(name, layers=2)
    input_ids = ids(1, 12)
    ends = {"cu_seq_lens_q": torch.tensor([0, 6, 12]), "cu_seq_lens_k": torch.tensor([0, 6, 12])}
    positions = torch.arange(6).repeat(2)[None]
    for more in ({}, {"attention_mask": torch.ones(1, 12, dtype=torch.long)}):
        with ek.use_backend("triton"):
            output = patched(input_ids, position_ids=positions, **ends, **more).last_hidden_state
        expected = torch.cat([stock(part).last_hidden_state for part in input_ids.split(6, 1)], 1)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_device")
def test_a_static_cache_with_a_window():
    """transformers makes the masks before it calls the model, which takes what has four dimensions as it is."""
    stock = transformers.MistralForCausalLM(build("mistral", layers=2).config).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    inputs = padded(2, 7, "left")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "cache_implementation": "static"}
    expected = stock.generate(**inputs, **options, disable_compile=True)
    with ek.use_backend("triton"):
        assert torch.equal(patched.generate(**inputs, **options, disable_compile=True), expected)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("length", [5, 6, 7])
def test_a_window_around_a_query_that_just_holds_all(length):
    stock = build("mistral")
    stock.config.is_causal = False
    for layer in stock.layers:
        layer.self_attn.is_causal = False
    patched = copy.deepcopy(stock)
    ek.patch(patched)
    input_ids = ids(2, length)
    with ek.use_backend("triton"):
        output = patched(input_ids).last_hidden_state
    torch.testing.assert_close(output, stock(input_ids).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["mistral", "modernbert", "llama"])
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_models_with_windows_and_packed_rows_need_no_dense_mask(name, kind):
    stock, patched = pair(name, layers=2)
    if kind == "packed":
        inputs = {"input_ids": ids(2, 9), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}
        kept = torch.ones(2, 9, dtype=torch.bool)
    else:
        inputs = padded(2, 9, kind)
        kept = inputs["attention_mask"].bool()
    expected = stock(**inputs).last_hidden_state
    with ek.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = patched(**inputs).last_hidden_state
    torch.testing.assert_close(output[kept], expected[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_making_a_compact_mask_reads_no_value(pattern, padding):
    """On fake tensors, anything that waits for a value on the device is an error."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, ek.use_backend("triton"):
        fake = None if padding is None else mode.from_tensor(padding)
        masks.attention_mask(**mask_arguments(pattern, 6, 6, 0, fake))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "keys", "decode", "chunk", "groups", "cross"])
def test_a_call_the_kernels_take_equals_sdpa(kind, causal, kernel_calls):
    module = Module(causal, groups=2 if kind == "groups" else 1)
    sizes = {"decode": {"q": 1, "k": 6}, "chunk": {"q": 2, "k": 6}, "cross": {"q": 3, "k": 6}}.get(
        kind, {"q": 6, "k": 6}
    )
    q, k, v = qkv(batch=3, kv_heads=1 if kind == "groups" else 2, **sizes)
    dense = mask = None
    if kind != "none":
        arguments = mask_arguments("causal" if causal else "bidirectional", q.shape[2], 6, 6 - q.shape[2], PADDING)
        dense = sdpa_mask(**arguments)
        with ek.use_backend("triton"):
            mask = masks.attention_mask(**arguments)
    expected, _ = sdpa_attention_forward(module, q, k, v, dense, scaling=0.3)
    upstream = torch.randn(expected.shape)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    with ek.use_backend("triton"):
        output, weights = hf_attention.attention_forward(module, q, k, v, mask, scaling=0.3)
        ours = torch.autograd.grad(output, (q, k, v), upstream)
    assert weights is None
    assert len(kernel_calls) == 1
    assert output.shape == expected.shape
    assert output.is_contiguous()
    # SDPA gives a row without keys zeros too.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one, theirs_one, rtol=1e-4, atol=1e-5)


def test_on_the_cpu_the_call_is_that_of_sdpa(kernel_calls):
    q, k, v = qkv(kv_heads=1)
    module = Module(True, groups=2)
    for mask in (None, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), torch.randn(2, 2, 5, 5)):
        torch.manual_seed(0)
        expected, _ = sdpa_attention_forward(module, q, k, v, mask, dropout=0.2)
        torch.manual_seed(0)
        output, _ = hf_attention.attention_forward(module, q, k, v, mask, dropout=0.2)
        assert torch.equal(output, expected)
    assert not kernel_calls


@pytest.mark.usefixtures("on_device")
def test_the_empty_static_cache_is_cut_off(kernel_calls):
    """Causal with more keys than queries and no mask: the keys behind are not written yet."""
    q, k, v = qkv(q=3, k=6)
    expected, _ = sdpa_attention_forward(Module(True), q, k, v, None)
    with torch.no_grad():
        k[:, :, 3:] = float("nan")
        v[:, :, 3:] = float("nan")
    with ek.use_backend("triton"):
        output, _ = hf_attention.attention_forward(Module(True), q, k, v, None)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert len(kernel_calls) == 1


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("keyword", "attribute", "causal"), [(None, True, True), (False, True, False), (True, False, True)]
)
def test_the_keyword_is_causal_goes_before_the_attribute(keyword, attribute, causal, kernel_calls):
    q, k, v = qkv()
    with ek.use_backend("triton"):
        hf_attention.attention_forward(Module(attribute), q, k, v, None, is_causal=keyword)
    assert kernel_calls[0]["is_causal"] is causal


TENSORS = ("attention_mask", "position_bias")


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    "call",
    [
        {"attention_mask": torch.randn(2, 1, 5, 5)},
        {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()},
        {"position_bias": torch.randn(1, 2, 5, 5)},
        {"position_bias": torch.randn(1, 2, 5, 5), "attention_mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)},
        {"attention_mask": torch.ones(5, 5, dtype=torch.bool).tril(), "config": OLMO},
        {"dim": 8},
        {"dim": 144},
        {"dtype": torch.float64},
    ],
)
def test_what_the_kernels_do_not_take_goes_to_sdpa_and_says_so_once(call, kernel_calls, monkeypatch):
    call = {key: value.to(torch.get_default_device()) if key in TENSORS else value for key, value in call.items()}
    q, k, v = qkv(dim=call.pop("dim", 16), dtype=call.pop("dtype", torch.float32))
    module = Module(True, config=call.pop("config", BERT))
    mask = call.pop("attention_mask", None)
    expected, _ = sdpa_attention_forward(module, q, k, v, mask, **call)
    monkeypatch.setattr(hf_attention, "_said", set())
    with ek.use_backend("triton"):
        with pytest.warns(UserWarning, match="attention runs on SDPA: "):
            output, _ = hf_attention.attention_forward(module, q, k, v, mask, **call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hf_attention.attention_forward(module, q, k, v, mask, **call)
    assert torch.equal(output, expected)
    assert not kernel_calls


def test_a_compact_mask_on_the_torch_path_is_made_dense():
    """A mask made for the kernels may reach a device or dtype where they do not run."""
    q, k, v = qkv(batch=3, q=2, k=6)
    dense = sdpa_mask(**mask_arguments("causal", 2, 6, 4, PADDING))
    expected, _ = sdpa_attention_forward(Module(True), q, k, v, dense)
    with ek.use_backend("torch"):
        output, _ = hf_attention.attention_forward(Module(True), q, k, v, PADDING)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_nobody_would_honour_is_refused(name):
    value = {"softcap": 30.0, "s_aux": torch.zeros(2)}[name]
    with pytest.raises(ValueError, match=rf"does not support {name}.*eager"):
        hf_attention.attention_forward(Module(), *qkv(), None, **{name: value})


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_without_a_mask(backend, causal, packed):
    """Of w keys, the query's own among them, and as many on the other side where attention is not causal."""
    q, k, v = qkv(batch=1, q=7, k=7)
    near = (torch.arange(7) - torch.arange(7)[:, None]).abs() < 3
    visible = near.tril() if causal else near
    more = {}
    if packed:
        more = {"cu_seq_lens_q": torch.tensor([0, 4, 7])}
        visible = visible & torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool()
    with ek.use_backend(backend):
        output, _ = hf_attention.attention_forward(Module(causal), q, k, v, None, sliding_window=3, **more)
    expected = F.scaled_dot_product_attention(q, k, v, visible)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_a_window_on_a_cache_needs_a_mask_that_contains_it():
    q, k, v = qkv(q=2)
    with pytest.raises(ValueError, match=r"sliding_window=3 for 5 keys and 2 queries"):
        hf_attention.attention_forward(Module(True), q, k, v, None, sliding_window=3)
    hf_attention.attention_forward(Module(True), q, k, v, None, sliding_window=5)
    mask = torch.ones(2, 1, 2, 5, dtype=torch.bool).tril(3)
    hf_attention.attention_forward(Module(True), q, k, v, mask, sliding_window=3)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "keys"])
def test_packed_sequences_do_not_see_each_other(backend, causal, mask):
    q, k, v = qkv(batch=1, q=7, k=7)
    ends = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    kept = torch.ones(7, 7, dtype=torch.bool).tril() if causal else torch.ones(7, 7, dtype=torch.bool)
    given = {
        None: None,
        "bool": kept[None, None],
        "float": torch.zeros(1, 1, 7, 7).masked_fill(~kept, torch.finfo(torch.float32).min),
        "keys": torch.ones(1, 7, dtype=torch.bool) if causal else torch.ones(1, 1, 1, 7, dtype=torch.bool),
    }[mask]
    with ek.use_backend(backend):
        output, _ = hf_attention.attention_forward(
            Module(causal), q, k, v, given, cu_seq_lens_q=ends, cu_seq_lens_k=ends
        )
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        part = (slice(None), slice(None), slice(begin, end))
        alone = F.scaled_dot_product_attention(q[part], k[part], v[part], is_causal=causal)
        torch.testing.assert_close(output[:, begin:end], alone.transpose(1, 2))


def test_packed_sequences_are_refused_where_they_cannot_be_told_apart():
    ends = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"cu_seq_lens_q.* batch of 2"):
        hf_attention.attention_forward(Module(), *qkv(), None, cu_seq_lens_q=ends)


def test_packed_sequences_that_continue_cached_ones():
    """Causal, with more keys than queries: the last query of a sequence is at its last key, as in FlashAttention."""
    q, k, v = qkv(batch=1, q=3, k=7)
    of_q, of_k = torch.tensor([0, 1, 3]), torch.tensor([0, 4, 7])
    output, _ = hf_attention.attention_forward(Module(True), q, k, v, None, cu_seq_lens_q=of_q, cu_seq_lens_k=of_k)
    visible = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2))


def test_a_packed_batch_through_bert_equals_its_sequences():
    """SDPA attends across the documents of a packed bidirectional batch; this implementation is told not to."""
    model = build("bert").eval()
    ek.patch(model)
    first, second = ids(1, 4), ids(1, 3)
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 7], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 4, 7], dtype=torch.int32),
        "max_length_q": 4,
        "max_length_k": 4,
    }
    output = model(**packed).last_hidden_state
    torch.testing.assert_close(output[:, :4], model(first).last_hidden_state)
    torch.testing.assert_close(output[:, 4:], model(second).last_hidden_state)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_packed_batch_through_llama_equals_stock(backend):
    stock, patched = pair("llama")
    packed = {"input_ids": ids(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    expected = stock(**packed).last_hidden_state
    with ek.use_backend(backend):
        output = patched(**packed).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    alone = stock(packed["input_ids"][:, :3]).last_hidden_state
    torch.testing.assert_close(output[:, :3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_device")
def test_llama_made_bidirectional_equals_stock(kernel_calls):
    stock, patched = pair("llama")
    inputs = padded(2, 5)
    kept = inputs["attention_mask"].bool()
    expected = stock(**inputs, is_causal=False).last_hidden_state
    with ek.use_backend("triton"):
        output = patched(**inputs, is_causal=False).last_hidden_state
    torch.testing.assert_close(output[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert kernel_calls


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoding_with_a_cache_in_any_steps_equals_one_forward(name, kernel_calls):
    stock, patched = pair(name)
    stock.eval()
    patched.eval()
    inputs = padded(2, 6, "left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    kept = inputs["attention_mask"].bool()
    expected = stock(**inputs, position_ids=positions).last_hidden_state
    cache, outputs = transformers.DynamicCache(config=patched.config), []
    with ek.use_backend("triton"):
        for begin, end in ((0, 3), (3, 5), (5, 6)):
            output = patched(
                input_ids=inputs["input_ids"][:, begin:end],
                attention_mask=inputs["attention_mask"][:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
            )
            outputs.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(outputs, 1)[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert len(kernel_calls) == 3


@pytest.mark.usefixtures("on_device")
def test_bert_as_a_decoder_with_cross_attention_equals_stock(kernel_calls):
    config = copy.deepcopy(build("bert").config)
    config.is_decoder = config.add_cross_attention = True
    torch.manual_seed(0)
    stock = transformers.BertModel(config).eval()
    patched = copy.deepcopy(stock)
    ek.patch(patched, strict=True)
    inputs = padded(2, 5, "right") | {"encoder_hidden_states": torch.randn(2, 4, 32)}
    inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])
    expected = stock(**inputs).last_hidden_state
    assert torch.equal(patched(**inputs).last_hidden_state, expected)
    with ek.use_backend("triton"):
        torch.testing.assert_close(patched(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert len(kernel_calls) == 2


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_batch_of_padding_only_stays_finite(name):
    _, patched = pair(name)
    inputs = {"input_ids": torch.full((2, 4), 1), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    with ek.use_backend("triton"):
        output = patched(**inputs).last_hidden_state
        output.backward(torch.randn(output.shape))
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in patched.parameters() if p.grad is not None)


@pytest.mark.usefixtures("on_device")
def test_autocast_lowers_the_precision_as_sdpa_does(kernel_calls):
    q, k, v = qkv()
    with torch.autocast(q.device.type, torch.float16):  # the interpreter has no bf16 dot
        expected, _ = sdpa_attention_forward(Module(), q, k, v, None)
        with ek.use_backend("triton"):
            output, _ = hf_attention.attention_forward(Module(), q, k, v, None)
    assert output.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(output, expected, rtol=2e-3, atol=2e-3)
    assert len(kernel_calls) == 1


@pytest.mark.usefixtures("on_device")
def test_dropout_reaches_the_kernels(kernel_calls):
    _, patched = pair("bert", dropout=0.25)
    with ek.use_backend("triton"):
        patched(ids(1, 3))
        patched.eval()(ids(1, 3))
    assert [call["dropout_p"] for call in kernel_calls] == [0.25, 0.0]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("window", [3, None])
def test_any_model_of_the_interface_can_use_it(window):
    """Masks that contain a window are dense, and the model equals stock, window and all."""
    config = transformers.MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        sliding_window=window,
    )
    stock = transformers.MistralModel(config).eval()
    patched = copy.deepcopy(stock)
    patched.set_attn_implementation("embedkernels")
    for inputs in (padded(2, 6, "left"), {"input_ids": ids(2, 6)}):
        expected = stock(**inputs).last_hidden_state
        with ek.use_backend("triton"):
            output = patched(**inputs).last_hidden_state
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_kernels_compile_into_one_graph(name):
    stock, patched = pair(name)
    inputs = padded(2, 5)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with ek.use_backend("triton"):
        output = compiled(**inputs).last_hidden_state
        output.backward(torch.randn(output.shape))
    kept = inputs["attention_mask"].bool()
    expected = stock(**inputs).last_hidden_state
    torch.testing.assert_close(output[kept], expected[kept], rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_attention_weights_are_missed_with_a_warning_as_in_sdpa(name, backend, monkeypatch):
    stock, patched = pair(name)
    inputs = {"input_ids": ids(2, 4), "output_attentions": True}
    assert stock(**inputs).attentions == ()
    monkeypatch.setattr(hf_attention, "_said", set())
    with ek.use_backend(backend):
        with pytest.warns(UserWarning, match=r'no attention weights for output_attentions=True: set "eager"'):
            assert patched(**inputs).attentions == ()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            patched(**inputs)
    with pytest.raises(ValueError, match="output_attentions"):
        stock.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        patched.config.output_attentions = True


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("columns", [1, 3, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_of_another_length_runs_where_stock_runs(name, backend, columns, masked):
    stock, patched = pair(name)
    inputs = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, columns, dtype=torch.long)}
    inputs["attention_mask"][1, -1] = 0 if masked else 1
    try:
        expected = stock(**inputs).last_hidden_state
    except RuntimeError:
        with (
            ek.use_backend(backend),
            pytest.raises(ValueError, match=rf"attention_mask is of {columns} keys.* are 5"),
        ):
            patched(**inputs)
    else:
        with ek.use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = patched(**inputs).last_hidden_state
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("on_device")
def test_a_mask_of_another_length_for_cross_attention():
    config = copy.deepcopy(build("bert").config)
    config.is_decoder = config.add_cross_attention = True
    patched = transformers.BertModel(config).eval()
    ek.patch(patched, strict=True)
    inputs = {"input_ids": ids(2, 5), "encoder_hidden_states": torch.randn(2, 4, 32)}
    longer = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with ek.use_backend("triton"), pytest.raises(ValueError, match=r"attention_mask is of 6 keys.* are 4"):
        patched(**inputs, encoder_attention_mask=longer)

"""Padding-free: a base model runs on the real tokens of a padded batch, packed into one row.

The base model's forward is entered with ids and mask as always. The real tokens, with the positions they have in the
padded batch, become one row of T tokens, in which each sequence of the batch is a document; attention goes by the
documents' ends (``cu_seq_lens_q``), and everything else in these models treats every token by itself. What comes out
is unpacked: (B, S, D), zeros where there was padding. One look at the mask is all that the host waits for; where a
collator (:class:`embedkernels.hf.PackingCollator`) has packed the tokens before, it waits for nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from embedkernels.hf import attention as hf_attention
from embedkernels.hf import guards, masks
from embedkernels.hf.adapters import of_transformers
from embedkernels.hf.calls import Forward, as_it_is_called, bound_by_name
from embedkernels.ops.backend import makes_a_program
from embedkernels.ops.eager import is_eager
from embedkernels.ops.positions import count_positions

# On a base model that is padding-free: its :class:`Around`.
FLAG = "_embedkernels_padding_free"
# Heads that look at nothing but what the base model gives, and labels. Others find the last token by ids, or average
# by the mask, which a batch that comes packed does not have in the shape of the output.
_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForSequenceClassification")
# The keyword of a batch that a collator has packed.
PACKED = hf_attention.PACKED


@dataclass(frozen=True)
class BaseModel:
    """A class of base models that can run on real tokens alone.

    Attributes:
        name: the class, as ``"bert.BertModel"`` of transformers.models.
        positions: where position ids come from if none are given: ``"arange"``, or ``"padding"``, counting the tokens
            that are not padding by their ids.
        decoder: causal, with a cache, and no output but of every token.
        pooler: how the output of every sequence is made of its first token: not at all, by ``pooler`` as a module
            that takes the hidden states, or by ``pooler`` and ``pooler_activation``.
    """

    name: str
    positions: Literal["arange", "padding"] = "arange"
    decoder: bool = False
    pooler: Literal["", "module", "activation"] = ""


MODELS = (
    BaseModel("bert.BertModel", pooler="module"),
    BaseModel("electra.ElectraModel"),
    BaseModel("albert.AlbertModel", pooler="activation"),
    BaseModel("roberta.RobertaModel", "padding", pooler="module"),
    BaseModel("xlm_roberta.XLMRobertaModel", "padding", pooler="module"),
    BaseModel("camembert.CamembertModel", "padding", pooler="module"),
    BaseModel("distilbert.DistilBertModel"),
    BaseModel("modernbert.ModernBertModel"),
    BaseModel("gpt2.GPT2Model", decoder=True),
    BaseModel("llama.LlamaModel", decoder=True),
    BaseModel("mistral.MistralModel", decoder=True),
    BaseModel("qwen2.Qwen2Model", decoder=True),
    BaseModel("qwen3.Qwen3Model", decoder=True),
)
_BY_CLASS = {
    f"transformers.models.{module}.modeling_{module}.{cls}": row
    for row in MODELS
    for module, cls in [row.name.split(".")]
}


def base_model_of(cls: type) -> BaseModel | None:
    """The row for a stock class, or None."""
    row = _BY_CLASS.get(f"{cls.__module__}.{cls.__qualname__}")
    return row if row is not None and of_transformers(cls) else None


@dataclass(frozen=True)
class Around:
    """What the models around a base model ask of it.

    Attributes:
        problem: why padding cannot be left out, or empty.
        padded_only: the head that cannot take a batch that comes packed, or empty.
        last_by_id: the head for which the last token of a text is the last that is not ``pad_token_id``, or empty.
    """

    problem: str = ""
    padded_only: str = ""
    last_by_id: str = ""


def around(base: nn.Module, model: nn.Module) -> Around:
    """What the models around ``base`` in ``model`` ask of it, on whatever paths they hold it."""
    row: Any = base_model_of(stock_of(base))
    modules = dict(model.named_modules(remove_duplicate=False))
    problem = padded_only = last_by_id = ""
    for path in [path for path, module in modules.items() if module is base]:
        parts = path.split(".")
        outside = [modules[".".join(parts[:end])] for end in range(len(parts) if path else 0)]
        for outer in outside:
            if not isinstance(outer, PreTrainedModel):
                continue
            name, kinds = type(outer).__name__, [kind.__name__ for kind in type(outer).__mro__]
            if any(kind.endswith("ForQuestionAnswering") for kind in kinds):
                problem = f"the loss of {name} sets the score of each token against those of padding too"
            classifies = any(kind.endswith("ForSequenceClassification") for kind in kinds)
            if classifies and row.decoder:
                last_by_id = padded_only = name
            averages = classifies and getattr(outer.config, "classifier_pooling", "cls") != "cls"
            if averages or not name.endswith(_HEADS) or not of_transformers(stock_of(outer)):
                padded_only = name
    return Around(problem, padded_only, last_by_id)


def stock_of(module: nn.Module) -> type:
    """The class of a module, before it was patched."""
    stock: type = getattr(type(module), "_embedkernels_stock", type(module))
    return stock


def supported() -> str:
    """The models that can run padding-free, for messages."""
    return ", ".join(row.name.split(".")[1] for row in MODELS)


def is_padding_free(module: nn.Module) -> bool:
    """Whether ``patch(padding_free=True)`` has changed this base model and ``unpatch`` has not changed it back."""
    return FLAG in module.__dict__


def unpadded(row: BaseModel, forward: Forward, stock_forward: Forward) -> Forward:
    """``forward`` on the real tokens alone, for models with the flag and calls with padding.

    Args:
        row: that of the class.
        forward: what runs otherwise, and on the real tokens.
        stock_forward: the stock forward.
    """
    by_name = bound_by_name(stock_forward)
    parameters = frozenset(inspect.signature(stock_forward).parameters)

    @functools.wraps(stock_forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A graph would depend on how many tokens are real.
        if not is_padding_free(self) or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        call = by_name(args, kwargs)
        if call is not None and call.get(PACKED):
            head = self.__dict__[FLAG].padded_only
            reason = _misfit(self, row, call, parameters) or (head and f"{head} looks at ids or mask of a padded one")
            if self.__dict__.get("_is_replica"):
                reason = "torch.nn.DataParallel would tear it apart: use DistributedDataParallel"
            if reason:
                raise ValueError(f"{type(self).__name__} cannot run on a packed batch: {reason}")
            return _run(self, row, forward, call, _packed_before(call), parameters)
        if call is None or not _has_padding_mask(call):
            return forward(self, *args, **kwargs)
        packing = None
        reason = _misfit(self, row, call, parameters)
        if reason is None:
            packing, reason = _packing(self, row, call)
        if reason is not None:
            guards.warn_once(self, f"{type(self).__name__}, padding and all,", reason)
        if packing is None:
            return forward(self, *args, **kwargs)
        return _run(self, row, forward, call, packing, parameters)

    return run


def _has_padding_mask(call: dict[str, Any]) -> bool:
    """Whether this is a call that could have padding, and that stock would not refuse."""
    mask, ids, embeds = (call.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
    if mask is None or (ids is None) == (embeds is None) or call.get("cu_seq_lens_q") is not None:
        return False
    tokens: Any = embeds if ids is None else ids
    return not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != tokens.shape[:2])


def _misfit(model: Any, row: BaseModel, call: dict[str, Any], parameters: frozenset[str]) -> str | None:
    """Why this call cannot run on real tokens alone, as far as can be told without looking into its tensors."""
    mask, tokens, packed = call.get("attention_mask"), call.get("input_ids"), call.get(PACKED)
    tokens = call.get("inputs_embeds") if tokens is None else tokens
    if packed and (mask is not None or tokens is None or tokens.shape[0] != 1):
        return "it takes one row of input_ids or inputs_embeds, and no attention_mask"
    if not packed and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "attention_mask is not of the shape of input_ids"
    names = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
    for name in (as_it_is_called(name, parameters) for name in names):
        if name is not None and call.get(name) is not None:
            return f"{name} is given"
    if row.decoder:
        use_cache = call.get("use_cache")
        by_default = not packed and not model.training and getattr(model.config, "use_cache", False)
        if use_cache or (use_cache is None and by_default):
            return "a cache is asked for: pass use_cache=False where none is needed"
        as_dict = call.get("return_dict")
        if use_cache is None and not (model.config.return_dict if as_dict is None else as_dict):
            return "a tuple of outputs would lack the cache that stock makes: pass use_cache=False"
    elif getattr(model.config, "is_decoder", False):
        return "it is set up as a decoder (config.is_decoder)"
    attentions = call.get("output_attentions")
    if model.config.output_attentions if attentions is None else attentions:
        return "output_attentions is asked for"
    if model.config._attn_implementation != hf_attention.NAME:
        return f"its attention implementation is {model.config._attn_implementation!r}"
    if model.__dict__[FLAG].problem:
        return str(model.__dict__[FLAG].problem)
    if getattr(model.config, "num_hidden_layers", 1) == 0:
        return "it has no layers"
    table = model.get_input_embeddings()
    if table._forward_pre_hooks or not guards.only_require_grads(table._forward_hooks):
        return "a hook on its token table, as NEFTune's, sees how many tokens there are"
    if mask is not None and mask.is_cuda and (why := _why_not_kernels(model, mask.device)) is not None:
        return f"without the kernels documents would need a mask of all pairs: {why}"
    if getattr(model.config, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward is set: real tokens are not whole chunks"
    if makes_a_program():
        return "torch.export or torch.jit traces: sizes would depend on the mask"
    if not is_eager(mask, tokens):
        return "something watches or transforms the call (torch.func, a mode, a subclass of Tensor)"
    if mask is not None and mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured: sizes would depend on the mask"
    return None


def _why_not_kernels(model: Any, device: torch.device) -> str | None:
    if masks.attention_backend(device) != "triton":
        return "they do not run on this device"
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    return hf_attention.why_not_heads(size, model.dtype)


@dataclass(frozen=True)
class _Packing:
    """Where the T real tokens of a (B, S) batch are.

    Attributes:
        shape: (B, S).
        index: int64 (T,), of B·S.
        ends: int32 (B + 1,), where each sequence starts in the row of T tokens, and the end.
        given: whether the model was called with the row of T tokens.
    """

    shape: tuple[int, int]
    index: Tensor
    ends: Tensor
    given: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """(1, T, ...) of (B, S, ...), or of (1, S, ...) for all sequences."""
        x = x.expand(self.shape[0], *x.shape[1:])
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, x: Any) -> Any:
        """(B, S, ...) of (1, T, ...), zeros for padding; of any other as it is."""
        if isinstance(x, tuple | list):
            return type(x)(self.unpack(each) for each in x)
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[:2] != (1, self.index.shape[0]):
            return x
        batch, length = self.shape
        index = self.index.to(x.device)
        return x.new_zeros(batch * length, *x.shape[2:]).index_copy(0, index, x[0]).unflatten(0, self.shape)


def _packing(model: Any, row: BaseModel, call: dict[str, Any]) -> tuple[_Packing | None, str | None]:
    """Where the real tokens are; None if all are or none is, or, with the reason, if that would not be exact."""
    ids = call.get("input_ids")
    tokens: Any = call["inputs_embeds"] if ids is None else ids
    mask: Tensor = call["attention_mask"].to(tokens.device)
    batch, length = mask.shape
    last_by_id = model.__dict__[FLAG].last_by_id
    padding = getattr(model.config, "pad_token_id", None)
    if last_by_id and (ids is None or padding is None):
        return None, f"{last_by_id} finds the last token by its id, and there are no ids or no pad_token_id"
    buffer = getattr(model._modules.get("embeddings"), "position_ids", None)
    if buffer is not None and buffer.shape[-1] < length:
        return None, None  # stock refuses it, unless positions are given
    real = mask.bool()
    lengths = real.sum(1)
    begins = real[:, 1:] & ~real[:, :-1]
    unlike = (real != (tokens != padding)).sum() if last_by_id else real.new_zeros((), dtype=torch.int64)
    torn_rows = (begins.sum(1) + real[:, 0] > 1).sum()
    facts = torch.stack([lengths.sum(), real[:, :1].all(1).sum(), torn_rows, real[:, -1:].sum(), unlike])
    total, first_is_real, torn, last_is_real, mistaken = facts.tolist()  # all that the host waits for
    if total in (0, batch * length):
        return None, None
    if not row.decoder and first_is_real < batch:
        return None, "the first token of a sequence is padding: what is made of that one would be of none"
    if mistaken:
        return None, f"{last_by_id} finds the last token by its id, and ids and mask say different things"
    if not last_is_real and _rotates_by_length(model.config):
        return None, "its rotary positions depend on the length of the batch, padding and all"
    if torn and getattr(model.config, "sliding_window", None) is not None:
        return None, "padding inside of a sequence: a sliding window counts it"
    index = torch.nonzero_static(real.flatten(), size=total)[:, 0]
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    return _Packing((batch, length), index, ends), None


def _rotates_by_length(of: Any) -> bool:
    kinds = str(getattr(of, "rope_parameters", None) or getattr(of, "rope_scaling", None))
    return "'dynamic'" in kinds or "'longrope'" in kinds


def _packed_before(call: dict[str, Any]) -> _Packing:
    """Where the tokens of a row that came packed would be in a padded batch."""
    ends, longest = call["cu_seq_lens_q"], int(call["max_length_q"])
    tokens: Any = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
    at = torch.arange(tokens.shape[1], device=ends.device)
    sequence = torch.searchsorted(ends[1:].long(), at, right=True)
    index = sequence * longest + at - ends.index_select(0, sequence)
    return _Packing((ends.shape[0] - 1, longest), index, ends, given=True)


def _position_ids(model: Any, row: BaseModel, call: dict[str, Any], packing: _Packing) -> Tensor:
    """(1, T): the positions that the tokens have in the padded batch."""
    given: Any = call.get("position_ids")
    if given is not None:
        return torch.as_tensor(given) if packing.given else packing.pack(given)
    stem = model._modules.get("embeddings")
    if row.positions == "padding":
        padding = stem.padding_idx
        ids = call.get("input_ids")
        if ids is not None and packing.given:
            batch, length = packing.shape
            ids = ids.new_full((batch * length,), padding).index_copy(0, packing.index, ids[0]).view(batch, length)
        if ids is not None:
            counted = count_positions(ids, padding_idx=padding, start=padding, padding_position=padding)
            return packing.pack(counted)
        return packing.index[None] % packing.shape[1] + padding + 1
    places = packing.index % packing.shape[1]
    buffer = getattr(stem, "position_ids", None)
    return places[None] if buffer is None else buffer[0].index_select(0, places)[None]


def _run(
    model: Any,
    row: BaseModel,
    forward: Callable[..., Any],
    call: dict[str, Any],
    packing: _Packing,
    parameters: frozenset[str],
) -> Any:
    packed = {name: value for name, value in call.items() if name != PACKED}
    for name in ("input_ids", "inputs_embeds", "token_type_ids"):
        if call.get(name) is not None and not packing.given:
            packed[name] = packing.pack(call[name])
    types = getattr(model._modules.get("embeddings"), "token_type_ids", None)
    if types is not None and "token_type_ids" in parameters and call.get("token_type_ids") is None:
        packed["token_type_ids"] = packing.pack(types[:, : packing.shape[1]])
    if "use_cache" in parameters:
        packed["use_cache"] = False
    as_dict = packed.pop("return_dict", None)
    packed |= {
        "position_ids": _position_ids(model, row, call, packing),
        # Of four dimensions, it goes through transformers' mask functions as it is.
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=packing.index.device),
        "cu_seq_lens_q": packing.ends,
        "cu_seq_lens_k": packing.ends,
        "max_length_q": packing.shape[1],
        "max_length_k": packing.shape[1],
        "return_dict": True,
    }
    pooler = model._modules.get("pooler") if row.pooler else None
    causal = row.decoder and getattr(model.config, "is_causal", True)
    with hf_attention.every_call_is_packed(type(model).__name__, causal):
        found = forward(model if pooler is None else _WithoutPooler(model), **packed)
    values = {name: packing.unpack(value) for name, value in found.items()}
    if pooler is not None:
        hidden = found.last_hidden_state[0]
        first = hidden.index_select(0, packing.ends[:-1].to(hidden.device))
        pooled = pooler(first[:, None]) if row.pooler == "module" else model.pooler_activation(pooler(first))
        values["pooler_output"] = pooled
    # Made anew: its order is that of the class, which a tuple has.
    output = type(found)(**values)
    as_dict = model.config.return_dict if as_dict is None else as_dict
    return output if as_dict else output.to_tuple()


class _WithoutPooler:
    """A model as its own stock forward sees it during one call: its pooler is called afterwards."""

    pooler = None

    def __init__(self, model: nn.Module) -> None:
        object.__setattr__(self, "_model", model)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

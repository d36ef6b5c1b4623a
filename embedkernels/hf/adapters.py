"""What of Hugging Face can be fused, and how: one table, of the forwards that look tokens up.

Models copy their input embeddings from one another, so a row stands for a forward, not for a class: it holds the
fingerprint of the source (``embedkernels.hf.bodies``), the attributes that hold the parts, and how they are put
together. Every class of transformers with that forward has that row, new ones too, and a class whose forward a
release changes has none. The forward of a model that has its embeddings in the middle of it changes more often: its
row holds the fingerprints of all that are known.
Tables that no row covers are looked up one by one, which needs no row. Nothing of transformers is imported here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from embedkernels.hf.bodies import fingerprint_of, unwrapped_fingerprint

Recipe = Literal["stem", "inline", "scaled", "lookup"]


@dataclass(frozen=True)
class Adapter:
    """One row of the table.

    Attributes:
        example: a class that has it, as ``"bert.BertEmbeddings"`` of transformers.models.
        recipe: ``"stem"``: a module of its own whose whole forward is one fused op. ``"inline"``: a model that adds
            positions, normalises or drops out at the start of its forward. ``"scaled"``: an nn.Embedding that
            multiplies its rows. ``"lookup"``: an nn.Embedding.
        bodies: fingerprints of the forwards that are known to embed in this way.
        tokens, positions, types, norm, dropout: attributes that hold the parts; None where there is none. An inline
            model's dropout may be a number.
        scale: attribute with the factor of the token rows; None where there is none.
        scaled_table: the token table of an inline model is a scaled one.
        position_rule: where position ids come from if none are given: ``"arange"``, or, counting the tokens that are
            not padding by their ids, ``"padding"``, or by the attention mask, ``"mask"``. The table of an inline
            model may count by itself (:class:`embedkernels.hf.positions.PositionTable`).
        types_by_place: token types that are not given come from a buffer by place in the sequence, not by position.
        position_first: positions are added before types.
        dropout_first: dropout comes before the norm.
        extra: which rows of other tables are added last, a key of ``embedkernels.hf.extras.EXTRAS``.
        mask: the argument that rows are multiplied by.
        optional: attributes that may be None.
        off: attributes that must be None, False or 0 for the fused forward, which does not do what they ask for.
        on: attributes that must be true if there are positions.
        unused: arguments that change nothing while ``off`` holds.
        bounded: stock refuses a sequence longer than the position table by itself.
        whole_windows: stock pads a sequence that is not made of whole attention windows with rows of the token table.
        dropout_again: the dropout module of an inline model is called once more, at the end of its forward.
        returns_positions: the forward returns the position ids as well.
    """

    example: str
    recipe: Recipe
    bodies: tuple[str, ...] = ()
    tokens: str = "word_embeddings"
    positions: str | None = None
    types: str | None = None
    norm: str | None = None
    dropout: str | None = None
    scale: str | None = None
    scaled_table: bool = False
    position_rule: Literal["arange", "padding", "mask"] = "arange"
    types_by_place: bool = False
    position_first: bool = False
    dropout_first: bool = False
    extra: str | None = None
    mask: str | None = None
    optional: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    bounded: bool = False
    whole_windows: bool = False
    dropout_again: bool = False
    returns_positions: bool = False

    @functools.cached_property
    def tables(self) -> tuple[str, ...]:
        """The attributes that hold embedding tables."""
        return tuple(part for part in (self.tokens, self.positions, self.types) if part is not None)

    @property
    def formula(self) -> str:
        """What is computed in one pass, for people."""
        summands = [word for word, part in (("position", self.positions), ("type", self.types)) if part]
        if not self.position_first:
            summands.reverse()
        if self.extra:
            summands.append(self.extra)
        steps = [" + ".join(["scale * token" if self.scale or self.scaled_table else "token", *summands])]
        after = [word for word, part in (("norm", self.norm), ("mask", self.mask), ("dropout", self.dropout)) if part]
        return " -> ".join(steps + (after[::-1] if self.dropout_first else after))

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the fused forward and backward call (keys of ``embedkernels.ops.backend.SUPPORTED``)."""
        return ("embedding" if self.recipe == "lookup" else "embed", "embedding_grad")


LOOKUP = Adapter("nn.Embedding", "lookup", tokens="")


def _stem(example: str, body: str, **parts: Any) -> Adapter:
    """Token + type + position -> LayerNorm -> dropout by BERT's names, but for what is given."""
    bert = {
        "positions": "position_embeddings",
        "types": "token_type_embeddings",
        "norm": "LayerNorm",
        "dropout": "dropout",
    }
    return Adapter(example, "stem", (body,), **(bert | parts))


def _inline(example: str, bodies: tuple[str, ...], **parts: Any) -> Adapter:
    """Token + position -> dropout by BART's names, but for what is given."""
    bart = {"tokens": "embed_tokens", "positions": "embed_positions", "dropout": "dropout"}
    return Adapter(example, "inline", bodies, **(bart | parts))


_TOKEN_AND_POSITION = {
    "tokens": "token_embedding",
    "positions": "position_embedding",
    "types": None,
    "norm": None,
    "dropout": None,
}

ADAPTERS: tuple[Adapter, ...] = (
    # Token + type + position -> norm -> dropout.
    _stem("bert.BertEmbeddings", "ce63879430a6"),
    _stem("albert.AlbertEmbeddings", "e6d79a8cb701"),
    _stem("align.AlignTextEmbeddings", "2e0da5ca6520", types_by_place=True),
    _stem("splinter.SplinterEmbeddings", "51f82beb6794"),
    _stem("rembert.RemBertEmbeddings", "4b24ac1ef3de"),
    _stem("flava.FlavaTextEmbeddings", "149f8d4f8179", types_by_place=True),
    _stem("ernie.ErnieEmbeddings", "e56dae0cbbf0", extra="task type"),
    _stem("visual_bert.VisualBertEmbeddings", "d0d806cad339"),
    _stem("convbert.ConvBertEmbeddings", "8ef58cfb2622", types_by_place=True, position_first=True),
    _stem("squeezebert.SqueezeBertEmbeddings", "ccb7bb42d629", position_first=True),
    _stem("tvp.TvpTextInputEmbeddings", "4b851ad7b898", position_first=True, norm="layer_norm"),
    _stem(
        "big_bird.BigBirdEmbeddings",
        "9caf84f8ab5e",
        types_by_place=True,
        dropout_first=True,
        off=("rescale_embeddings",),
    ),
    _stem("megatron_bert.MegatronBertEmbeddings", "342d771a0b8b", norm=None),
    _stem(
        "deberta_v2.DebertaV2Embeddings",
        "e999c2f0d2d6",
        position_first=True,
        mask="mask",
        optional=("position_embeddings", "token_type_embeddings"),
        off=("embed_proj",),
        on=("position_biased_input",),
    ),
    # The same with positions that count the tokens which are not padding.
    _stem("roberta.RobertaEmbeddings", "c60b976969b2", position_rule="padding"),
    _stem("xlm_roberta_xl.XLMRobertaXLEmbeddings", "137e73f9061c", position_rule="padding", norm=None),
    _stem("longformer.LongformerEmbeddings", "9e98cacff697", position_rule="padding", position_first=True),
    _stem("luke.LukeEmbeddings", "3eea9cb4ad01", position_rule="padding", position_first=True),
    _stem("lilt.LiltTextEmbeddings", "8f591de76fac", position_rule="padding", returns_positions=True),
    _stem("layoutlmv3.LayoutLMv3TextEmbeddings", "77ab54b72f52", position_rule="padding", extra="boxes"),
    _stem("markuplm.MarkupLMEmbeddings", "d05e8317fa7d", position_rule="padding", position_first=True, extra="xpath"),
    _stem("mpnet.MPNetEmbeddings", "8275c227ccb5", position_rule="padding", types=None),
    # Token + position -> norm -> dropout.
    _stem("distilbert.Embeddings", "41885a96b16d", types=None),
    _stem("bert_generation.BertGenerationEmbeddings", "2daebfc69f89", types=None),
    _stem("git.GitEmbeddings", "02988ed0ba71", types=None),
    _stem("blip.BlipTextEmbeddings", "ccf19fdb553c", types=None),
    # Token + position.
    _stem("clip.CLIPTextEmbeddings", "bcc81e6fc87c", **_TOKEN_AND_POSITION, bounded=True),
    _stem("owlvit.OwlViTTextEmbeddings", "7b8e797281ea", **_TOKEN_AND_POSITION),
    # Token + type -> norm -> dropout.
    _stem("roformer.RoFormerEmbeddings", "56ccaa096468", positions=None),
    _stem("nomic_bert.NomicBertEmbeddings", "f0b5df7b1612", positions=None, unused=("position_ids",)),
    _stem(
        "gte.GteEmbeddings",
        "327b0c755985",
        positions=None,
        unused=("position_ids",),
        optional=("token_type_embeddings",),
    ),
    # Token -> norm -> dropout.
    _stem(
        "modernbert.ModernBertEmbeddings",
        "480d505cb5a7",
        tokens="tok_embeddings",
        positions=None,
        types=None,
        norm="norm",
        dropout="drop",
    ),
    _stem("funnel.FunnelEmbeddings", "3f2a43946588", positions=None, types=None, norm="layer_norm"),
    # Scaled rows: by a number, and by a number in the weight's dtype.
    Adapter("bart.BartScaledWordEmbedding", "scaled", ("e8fdd4d0918f",), tokens="", scale="embed_scale"),
    Adapter("gemma.GemmaTextScaledWordEmbedding", "scaled", ("9f05a2901a2b",), tokens="", scale="embed_scale"),
    # Models with their embeddings in their own forward, as transformers 5.17 to 5.24 have it.
    *(
        _inline(example, bodies, **parts)
        for parts, examples in (
            (
                {"tokens": "wte", "positions": "wpe", "dropout": "drop"},
                {
                    "gpt2.GPT2Model": ("182d85b2f1f0",),
                    "gpt_neo.GPTNeoModel": ("7dfdaa013a0d",),
                    "gpt_bigcode.GPTBigCodeModel": ("bdc3ac55faa9",),
                    "imagegpt.ImageGPTModel": ("b163b05a7046", "7be30fa79c3e"),
                },
            ),
            (
                {
                    "tokens": "word_embeddings",
                    "positions": None,
                    "norm": "word_embeddings_layernorm",
                    "dropout": None,
                },
                {"bloom.BloomModel": ("abc06a0c5bdc", "44af11e1a8c3")},
            ),
            (
                {"norm": "layernorm_embedding", "scaled_table": True},
                {
                    "bart.BartEncoder": ("7e4c4f078345", "c0a5b1dbd33c"),
                    "bart.BartDecoder": ("2de809f3ba09", "bcb3397c5af7"),
                    "mbart.MBartEncoder": ("53d92ad22247", "590d699a8be0"),
                    "mbart.MBartDecoder": ("cb93dc25f9de", "3c05777c82b9"),
                },
            ),
            (
                {"norm": "layernorm_embedding", "optional": ("layernorm_embedding",), "scaled_table": True},
                {"trocr.TrOCRDecoder": ("80004fb92da2", "9171cc05ae62")},
            ),
            (
                {"norm": "layernorm_embedding", "scale": "embed_scale"},
                {
                    "mvp.MvpEncoder": ("6daa6d345914", "f02907b9a491"),
                    "mvp.MvpDecoder": ("7fad02e29bbe", "685fd31a8e45"),
                    "blenderbot_small.BlenderbotSmallEncoder": ("7a543cc1a2fa", "a8cb249b6353"),
                },
            ),
            (
                # Its positions and its dropout come after the norm: they stay stock.
                {"positions": None, "norm": "layernorm_embedding", "dropout": None},
                {"blenderbot_small.BlenderbotSmallDecoder": ("5e96d883e160", "b43d6174b2cf")},
            ),
            (
                {"norm": "layernorm_embedding"},
                {"led.LEDDecoder": ("306e6b47b853", "a448db84391f")},
            ),
            (
                {"norm": "layernorm_embedding", "whole_windows": True},
                {"led.LEDEncoder": ("285031966f8e", "4865899a6b55")},
            ),
            (
                {"scaled_table": True},
                {
                    "bigbird_pegasus.BigBirdPegasusEncoder": ("2b69c950dfb8", "547c9c8e88e4"),
                    "bigbird_pegasus.BigBirdPegasusDecoder": ("fd07fcc38c3b", "9eb36cecf090"),
                    "biogpt.BioGptModel": ("2e20d539ee4a", "7306e589a577"),
                    "blenderbot.BlenderbotEncoder": ("007eadcb02df", "420e4bd7812c"),
                    "blenderbot.BlenderbotDecoder": ("90a696b37b9e", "9b312f0ff05b"),
                    "m2m_100.M2M100Encoder": ("dd44f6ec757a", "4e00d4083a84"),
                    "m2m_100.M2M100Decoder": ("659c42e662fd", "4b97300f0964"),
                    "nllb_moe.NllbMoeEncoder": ("020817313351", "b048ed11b463"),
                    "nllb_moe.NllbMoeDecoder": ("6aa17aa60c3e", "a84678182d0c"),
                    "seamless_m4t.SeamlessM4TDecoder": ("99a4320b1f7f", "2d44b678e919"),
                    "xglm.XGLMModel": ("9302987ebd66", "176073a7a4c5"),
                },
            ),
            (
                {"scaled_table": True, "off": ("is_t2u_encoder",)},
                {"seamless_m4t.SeamlessM4TEncoder": ("3870f8bd8f97", "fd77cdc75f87")},
            ),
            (
                {"scale": "embed_scale"},
                {
                    "pegasus.PegasusEncoder": ("d83a305876f4", "58ea14cbe3b0"),
                    "pegasus.PegasusDecoder": ("44db1f693c11", "7bbc1599a581"),
                    "marian.MarianEncoder": ("62774e89ade7", "a77fb5111877"),
                    "marian.MarianDecoder": ("807411de5e74", "aad7836c6d60"),
                },
            ),
            (
                {},
                {"whisper.WhisperDecoder": ("753b3ea19c95", "8b865b273cac")},
            ),
            (
                {"dropout": None, "position_rule": "mask", "off": ("project_in",)},
                {"opt.OPTDecoder": ("b745f9a71464", "7fd5523ad169")},
            ),
            (
                {"positions": None, "dropout_again": True},
                {
                    "longt5.LongT5Stack": ("d8b8237196f7",),
                    "pix2struct.Pix2StructTextModel": ("c19119d4bcba",),
                    "pop2piano.Pop2PianoStack": ("58d997f01148",),
                    "switch_transformers.SwitchTransformersStack": ("39e2d2f0d938",),
                    "t5.T5Stack": ("d5859aacd702",),
                    "umt5.UMT5Stack": ("78da4770d061",),
                },
            ),
        )
        for example, bodies in examples.items()
    ),
)


_PACKAGE = "transformers.models."
BY_BODY = {body: adapter for adapter in ADAPTERS for body in adapter.bodies}
_EXAMPLES = frozenset(adapter.example for adapter in ADAPTERS)
# A forward that names none of these is of no row: its source need not be read.
_NAMES = frozenset(
    name for adapter in ADAPTERS if (name := adapter.scale if adapter.recipe == "scaled" else adapter.tokens)
)


def adapter_for(cls: type[nn.Module]) -> Adapter | None:
    """The row of a class of transformers, by its own forward; None for any other class, subclasses of these too."""
    if not of_transformers(cls):
        return None
    forward: Any = cls.__dict__.get("forward")
    code = getattr(inspect.unwrap(forward), "__code__", None) if forward is not None else None
    if code is None or _NAMES.isdisjoint(code.co_names):
        return None
    adapter = BY_BODY.get(unwrapped_fingerprint(forward) or "")
    # Of modules nothing but the decorators for renamed keywords is looked through.
    if adapter is not None and adapter.recipe != "inline" and fingerprint_of(forward) not in adapter.bodies:
        return None
    # A scaled table is an nn.Embedding; nothing else has this forward, or it would not be known what it scales.
    if adapter is not None and adapter.recipe == "scaled" and cls.__mro__[1] is not nn.Embedding:
        return None
    return adapter


def lost(cls: type[nn.Module]) -> bool:
    """Whether a class of transformers is the example of a row, but has another forward than the row stands for."""
    named = f"{cls.__module__.removeprefix(_PACKAGE).split('.')[0]}.{cls.__qualname__}"
    return named in _EXAMPLES and of_transformers(cls) and adapter_for(cls) is None


def of_transformers(cls: type) -> bool:
    """Whether a class is one of transformers' models', and still what its module calls by that name."""
    module = cls.__module__
    return module.startswith(_PACKAGE) and getattr(sys.modules.get(module), cls.__qualname__, None) is cls


def base_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The first base of ``cls`` that has a row."""
    return next((base for base in cls.__mro__[1:] if adapter_for(base) is not None), None)


class Family(NamedTuple):
    """Models whose attention is patched.

    Attributes:
        model: the name in reports.
        model_type: ``config.model_type``. Models of this type hand the attention mask to the attention function as
            they got it, so it may have the compact form of ``embedkernels.hf.masks``.
        module: the transformers module that defines them.
    """

    model: str
    model_type: str
    module: str


FAMILIES = (
    Family("BERT", "bert", "transformers.models.bert.modeling_bert"),
    Family("ELECTRA", "electra", "transformers.models.electra.modeling_electra"),
    Family("RoBERTa", "roberta", "transformers.models.roberta.modeling_roberta"),
    Family("XLM-RoBERTa", "xlm-roberta", "transformers.models.xlm_roberta.modeling_xlm_roberta"),
    Family("CamemBERT", "camembert", "transformers.models.camembert.modeling_camembert"),
    Family("DistilBERT", "distilbert", "transformers.models.distilbert.modeling_distilbert"),
    Family("ALBERT", "albert", "transformers.models.albert.modeling_albert"),
    Family("ModernBERT", "modernbert", "transformers.models.modernbert.modeling_modernbert"),
    Family("GPT-2", "gpt2", "transformers.models.gpt2.modeling_gpt2"),
    Family("Llama", "llama", "transformers.models.llama.modeling_llama"),
    Family("Mistral", "mistral", "transformers.models.mistral.modeling_mistral"),
    Family("Qwen2", "qwen2", "transformers.models.qwen2.modeling_qwen2"),
    Family("Qwen3", "qwen3", "transformers.models.qwen3.modeling_qwen3"),
)
MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)
_BY_MODULE = {family.module: family for family in FAMILIES}


def supported() -> str:
    """What ``patch`` covers, for messages."""
    return f"every nn.Embedding, and the attention of {', '.join(family.model for family in FAMILIES)}"


def family_of(module: nn.Module) -> Family | None:
    """The family of the model that ``module`` belongs to: its class or a base of it is defined in that module."""
    for base in type(module).__mro__:
        if base.__module__ in _BY_MODULE:
            return _BY_MODULE[base.__module__]
    return None

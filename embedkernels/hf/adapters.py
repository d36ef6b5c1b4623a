"""What of Hugging Face can be fused, and how: one table, of the forwards that look tokens up.

Models copy their input embeddings from one another, so a row stands for a forward, not for a class: it holds the
fingerprint of the source (``embedkernels.hf.bodies``), the attributes that hold the parts, and how they are put
together. Every class of transformers with that forward has that row, new ones too, and a class whose forward a
release changes has none. Models that have their embeddings in the middle of their own forward are rows by name, and
by the fingerprints of their forwards that are known.
Tables that no row covers are looked up one by one, which needs no row. Nothing of transformers is imported here.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from embedkernels.hf.bodies import fingerprint_of, undeprecated, unwrapped_fingerprint

Recipe = Literal["stem", "inline", "scaled", "lookup"]


@dataclass(frozen=True)
class Adapter:
    """One row of the table.

    Attributes:
        example: a class that has it, as ``"bert.BertEmbeddings"`` of transformers.models; for ``"inline"`` the one.
        recipe: ``"stem"``: a module of its own whose whole forward is one fused op. ``"inline"``: a model that adds
            positions, normalises or drops out at the start of its forward. ``"scaled"``: an nn.Embedding that
            multiplies its rows. ``"lookup"``: an nn.Embedding.
        body: fingerprint of the forward; None for ``"inline"``.
        bodies: of an inline model, the fingerprints of the forwards that are known to embed in this way.
        tokens, positions, types, norm, dropout: attributes that hold the parts; None where there is none. An inline
            model's dropout may be a number.
        scale: attribute with the factor of the token rows; None where there is none.
        scaled_table: the token table of an inline model is a scaled one.
        position_rule: where position ids come from if none are given: ``"arange"`` or, counting the tokens that are
            not padding, ``"padding"``.
        types_by_place: token types that are not given come from a buffer by place in the sequence, not by position.
        position_first: positions are added before types.
        dropout_first: dropout comes before the norm.
        mask: the argument that rows are multiplied by.
        optional: attributes that may be None.
        off: attributes that must be None, False or 0 for the fused forward, which does not do what they ask for.
        on: attributes that must be true if there are positions.
        unused: arguments that change nothing while ``off`` holds.
        bounded: stock refuses a sequence longer than the position table by itself.
        returns_positions: the forward returns the position ids as well.
    """

    example: str
    recipe: Recipe
    body: str | None = None
    tokens: str = "word_embeddings"
    positions: str | None = None
    types: str | None = None
    norm: str | None = None
    dropout: str | None = None
    scale: str | None = None
    scaled_table: bool = False
    position_rule: Literal["arange", "padding"] = "arange"
    types_by_place: bool = False
    position_first: bool = False
    dropout_first: bool = False
    mask: str | None = None
    optional: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    bounded: bool = False
    returns_positions: bool = False
    bodies: tuple[str, ...] = ()

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
    return Adapter(example, "stem", body, **(bert | parts))


def _inline(example: str, bodies: tuple[str, ...], tokens: str, positions: str | None, **parts: Any) -> Adapter:
    return Adapter(example, "inline", None, tokens, positions, bodies=bodies, **parts)


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
    _stem("ernie.ErnieEmbeddings", "e56dae0cbbf0", off=("use_task_id",), unused=("task_type_ids",)),
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
    Adapter("bart.BartScaledWordEmbedding", "scaled", "e8fdd4d0918f", tokens="", scale="embed_scale"),
    Adapter("gemma.GemmaTextScaledWordEmbedding", "scaled", "9f05a2901a2b", tokens="", scale="embed_scale"),
    # Models with their embeddings in their own forward, as transformers 5.17 and 5.23 have it.
    _inline("gpt2.GPT2Model", ("182d85b2f1f0",), "wte", "wpe", dropout="drop"),
    _inline("gpt_neo.GPTNeoModel", ("7dfdaa013a0d",), "wte", "wpe", dropout="drop"),
    _inline("gpt_bigcode.GPTBigCodeModel", ("bdc3ac55faa9",), "wte", "wpe", dropout="drop"),
    _inline(
        "bloom.BloomModel",
        ("abc06a0c5bdc", "44af11e1a8c3"),
        "word_embeddings",
        None,
        norm="word_embeddings_layernorm",
    ),
    *(
        _inline(example, bodies, "embed_tokens", "embed_positions", dropout="dropout", **parts)
        for parts, examples in (
            (
                {"norm": "layernorm_embedding", "scaled_table": True},
                {
                    "bart.BartEncoder": ("7e4c4f078345", "c0a5b1dbd33c"),
                    "bart.BartDecoder": ("2de809f3ba09", "bcb3397c5af7"),
                    "mbart.MBartEncoder": ("53d92ad22247", "590d699a8be0"),
                    "mbart.MBartDecoder": ("cb93dc25f9de", "3c05777c82b9"),
                    "plbart.PLBartEncoder": ("7e4c4f078345", "c0a5b1dbd33c"),
                    "plbart.PLBartDecoder": ("2de809f3ba09", "bcb3397c5af7"),
                },
            ),
            (
                {"norm": "layernorm_embedding", "scale": "embed_scale"},
                {
                    "mvp.MvpEncoder": ("6daa6d345914", "f02907b9a491"),
                    "mvp.MvpDecoder": ("7fad02e29bbe", "685fd31a8e45"),
                },
            ),
            (
                {"scaled_table": True},
                {
                    "bigbird_pegasus.BigBirdPegasusEncoder": ("2b69c950dfb8", "547c9c8e88e4"),
                    "bigbird_pegasus.BigBirdPegasusDecoder": ("fd07fcc38c3b", "9eb36cecf090"),
                    "blenderbot.BlenderbotEncoder": ("007eadcb02df", "420e4bd7812c"),
                    "blenderbot.BlenderbotDecoder": ("90a696b37b9e", "9b312f0ff05b"),
                },
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
        )
        for example, bodies in examples.items()
    ),
)


class PositionTable(NamedTuple):
    """An nn.Embedding of positions whose forward only counts them, from the number of tokens in a cache on.

    Attributes:
        example: a class that has it.
        body: fingerprint of the forward.
        offset: attribute with what is added to every position; None for nothing.
        learned: whether gradients reach the table.
    """

    example: str
    body: str
    offset: str | None
    learned: bool


POSITION_TABLES = (
    PositionTable("bart.BartLearnedPositionalEmbedding", "8782d1730dfe", "offset", True),
    PositionTable("blenderbot.BlenderbotLearnedPositionalEmbedding", "953ba78701c5", None, True),
    PositionTable("marian.MarianSinusoidalPositionalEmbedding", "6b9d268e2aaa", None, False),
)

_PACKAGE = "transformers.models."
_BY_BODY: dict[str | None, Adapter] = {adapter.body: adapter for adapter in ADAPTERS if adapter.body is not None}
_INLINE = {adapter.example: adapter for adapter in ADAPTERS if adapter.body is None}
_EXAMPLES = frozenset(adapter.example for adapter in ADAPTERS)
_POSITIONS: dict[str | None, PositionTable] = {table.body: table for table in POSITION_TABLES}
# A forward that names none of these is of no row: its source need not be read.
_NAMES = frozenset(
    name
    for adapter in ADAPTERS
    for name in (
        adapter.tokens if adapter.recipe == "stem" else adapter.scale if adapter.recipe == "scaled" else None,
    )
    if name is not None
)


def adapter_for(cls: type[nn.Module]) -> Adapter | None:
    """The row of a class of transformers, by its own forward; None for any other class, subclasses of these too."""
    if not _of_transformers(cls):
        return None
    inline = _INLINE.get(f"{cls.__module__.removeprefix(_PACKAGE).split('.')[0]}.{cls.__qualname__}")
    if inline is not None:
        return inline if unwrapped_fingerprint(cls.__dict__.get("forward")) in inline.bodies else None
    forward: Any = cls.__dict__.get("forward")
    code = getattr(undeprecated(forward), "__code__", None)
    if code is None or _NAMES.isdisjoint(code.co_names):
        return None
    adapter = _BY_BODY.get(fingerprint_of(forward))
    # A scaled table is an nn.Embedding; nothing else has this forward, or it would not be known what it scales.
    if adapter is not None and adapter.recipe == "scaled" and cls.__mro__[1] is not nn.Embedding:
        return None
    return adapter


def lost(cls: type[nn.Module]) -> bool:
    """Whether a class of transformers is the example of a row, but has another forward than the row stands for."""
    named = f"{cls.__module__.removeprefix(_PACKAGE).split('.')[0]}.{cls.__qualname__}"
    return named in _EXAMPLES and _of_transformers(cls) and adapter_for(cls) is None


def _of_transformers(cls: type) -> bool:
    """Whether a class is one of transformers' models', and still what its module calls by that name."""
    module = cls.__module__
    return module.startswith(_PACKAGE) and getattr(sys.modules.get(module), cls.__qualname__, None) is cls


def position_table(cls: type) -> PositionTable | None:
    """The row of a class that looks positions up."""
    if not _of_transformers(cls) or cls.__mro__[1] is not nn.Embedding:
        return None
    return _POSITIONS.get(fingerprint_of(cls.__dict__["forward"]) if "forward" in cls.__dict__ else None)


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
    Family("GPT-2", "gpt2", "transformers.models.gpt2.modeling_gpt2"),
    Family("Llama", "llama", "transformers.models.llama.modeling_llama"),
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

"""Rotary positions of Hugging Face models: which functions apply them, and forwards that call ``rope`` instead.

A model's attention calls a function of its module, ``apply_rotary_pos_emb`` in most, which models copy from one
another. A row of the table stands for such a function by the fingerprint of its source and that of the helper that
pairs elements. A fused class's forward is the stock forward with that one name changed to a function of this module:
nothing else of the model, of its module or of other models changes.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedkernels.hf.bodies import fingerprint_of, undeprecated
from embedkernels.ops.backend import choose, makes_a_program, needs_stock_autograd
from embedkernels.ops.rope import KERNEL_DTYPES, rope

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rotation:
    """What a function of transformers that applies rotary positions computes.

    Attributes:
        example: a class that calls it, as ``"llama.LlamaAttention"`` of transformers.models.
        body: fingerprint of the function.
        helper: fingerprint of the one function of its module that it calls.
        takes: its arguments: ``"pair"``: q, k, cos, sin, unsqueeze_dim. ``"positions"``: the same with position_ids,
            which it ignores, before unsqueeze_dim. ``"one"``: x, cos, sin, unsqueeze_dim. ``"gptj"``: x, sin, cos,
            with tokens before heads.
        interleaved: pairs are neighbours.
        tables: which columns of the tables count: ``"all"``, one for each element; ``"first half"``; ``"half"``:
            they have R/2, one for both elements of a pair.
        partial: heads may be longer than the tables; the rest is copied.
        back: the result has the dtype of q and k, whatever that of the tables.
    """

    example: str
    body: str
    helper: str
    takes: Literal["pair", "positions", "one", "gptj"] = "pair"
    interleaved: bool = False
    tables: Literal["all", "first half", "half"] = "all"
    partial: bool = False
    back: bool = False

    @property
    def formula(self) -> str:
        """What is computed, for people."""
        what = "query and key each on its own" if self.takes in ("one", "gptj") else "query and key together"
        return f"{what}, pairs of {'neighbours' if self.interleaved else 'halves'}" + (
            ", part of a head" if self.partial else ""
        )


# rotate_half by halves, by neighbours (two ways to write it), GPT-J's, and gpt-oss' function for one tensor.
_HALVES, _NEIGHBOURS, _STACKED, _GPTJ = "54f0913dc247", "8174ca0ed6e0", "bd9f12732976", "fd51e01259ed"
_OF_ONE, _OF_ONE_INTERLEAVED = "dc64aae68ebc", "4c5fd097a70a"

ROTATIONS: tuple[Rotation, ...] = (
    Rotation("llama.LlamaAttention", "5a8156f1e2dc", _HALVES),
    Rotation("falcon.FalconAttention", "e36a6ab6cd5b", _HALVES),
    Rotation("blt.BltSelfAttention", "e36a6ab6cd5b", _STACKED, interleaved=True),
    Rotation("gpt_neox.GPTNeoXAttention", "c478fb3a39c6", _HALVES, partial=True),
    Rotation("phi3.Phi3Attention", "faa6cd7de867", _HALVES, partial=True),
    Rotation("nemotron.NemotronAttention", "4e7de8a8c454", _HALVES, partial=True),
    Rotation("glmasr.GlmAsrAttention", "c7657cb19953", _HALVES, takes="positions", partial=True),
    Rotation("olmo.OlmoAttention", "ad1a404ed6d4", _HALVES, back=True),
    Rotation("modernbert.ModernBertAttention", "089e202edcd6", _HALVES, back=True),
    Rotation("hunyuan_vl.HunYuanVLDenseV1Attention", "5d10380f0b99", _HALVES, back=True),
    Rotation("cohere.CohereAttention", "6cb7272b5aec", _STACKED, interleaved=True, back=True),
    Rotation("ernie4_5_vl_moe.Ernie4_5_VLMoeTextAttention", "bd7855e5edfc", _NEIGHBOURS, interleaved=True, back=True),
    Rotation("glm4v.Glm4vTextAttention", "60a47f80a62f", _NEIGHBOURS, interleaved=True, partial=True),
    Rotation("glm.GlmAttention", "6c8b05f6f10a", _NEIGHBOURS, interleaved=True, tables="first half", partial=True),
    Rotation("helium.HeliumAttention", "35a5a46d9ecd", _NEIGHBOURS, interleaved=True, tables="first half"),
    Rotation(
        "ernie4_5.Ernie4_5Attention", "8b38b892e958", _NEIGHBOURS, interleaved=True, tables="first half", back=True
    ),
    Rotation("gpt_oss.GptOssAttention", "8ca32c198703", _OF_ONE, tables="half"),
    Rotation(
        "openai_privacy_filter.OpenAIPrivacyFilterAttention",
        "8ca32c198703",
        _OF_ONE_INTERLEAVED,
        interleaved=True,
        tables="half",
    ),
    Rotation("gemma3n.Gemma3nTextAttention", "1f6fe53b2573", _HALVES, takes="one"),
    Rotation("gptj.GPTJAttention", "bfbf96751368", _GPTJ, takes="gptj", interleaved=True, tables="half"),
)
BY_BODIES = {(rotation.body, rotation.helper): rotation for rotation in ROTATIONS}


def called_like_one(name: str) -> bool:
    """Whether a name of transformers stands for a function that applies rotary positions."""
    return "apply" in name and ("rotary" in name or "rope" in name)


@dataclass(frozen=True)
class Rotary:
    """The rotary function that a class calls.

    Attributes:
        name: its name in the module of the class.
        rotation: its row; None if there is none.
        why: why the class stays stock, where it does.
    """

    name: str
    rotation: Rotation | None
    why: str = ""


def rotary_of(cls: type[nn.Module]) -> Rotary | None:
    """The rotary function that the own forward of a class of transformers calls, or None if it calls none."""
    forward: Any = cls.__dict__.get("forward")
    module = sys.modules.get(cls.__module__)
    if forward is None or not cls.__module__.startswith("transformers.models.") or (
        getattr(module, cls.__qualname__, None) is not cls
    ):  # fmt: skip
        return None
    code: CodeType | None = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return None
    names = [name for name in code.co_names if called_like_one(name) and hasattr(module, name)]
    if not names:
        return None
    if len(names) > 1:
        return Rotary(names[0], None, f"it calls {' and '.join(names)}")
    name = names[0]
    if code is not getattr(undeprecated(forward), "__code__", None):
        return Rotary(name, None, "its forward is decorated")
    uses = {op.opname for op in dis.get_instructions(undeprecated(forward)) if op.argval == name}
    if uses != {"LOAD_GLOBAL"}:
        return Rotary(name, None, f"{name} is an attribute in it")
    rotation = _rotation(vars(module)[name])
    return Rotary(
        name, rotation, "" if rotation else f"{name} has no row: it computes something else, or was replaced"
    )


def _rotation(function: Any) -> Rotation | None:
    function = _within_module(function)
    if not isinstance(function, FunctionType):
        return None
    names = function.__globals__
    helpers = [names[name] for name in function.__code__.co_names if isinstance(names.get(name), FunctionType)]
    if len(helpers) != 1:
        return None
    return BY_BODIES.get((fingerprint_of(function) or "", fingerprint_of(helpers[0]) or ""))


def _within_module(function: Any) -> Any:
    """The function within the nn.Module that the package ``kernels`` makes of it, where that is installed."""
    if not isinstance(function, nn.Module) or not hasattr(function, "kernel_layer_name"):
        return function
    cells = getattr(type(function).forward, "__closure__", None) or ()
    inner = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)]
    return inner[0] if len(inner) == 1 else function


def rebound(cls: type[nn.Module]) -> Function:
    """The forward of ``cls`` with its rotary function replaced by one that runs on ``rope`` where that fits.

    Renamed keywords are not translated by it, as the decorators around the stock forward do.

    Args:
        cls: a class whose :func:`rotary_of` has a row.
    """
    forward: Any = undeprecated(cls.__dict__["forward"])
    found = rotary_of(cls)
    assert found is not None
    assert found.rotation is not None
    names = forward.__globals__
    fused = f"_embedkernels_{found.name}"
    # In the module itself, so that torch.compile finds it where it looks for the names of this code.
    if fused not in names or names[fused].replaces is not names[found.name]:
        names[fused] = _replacement(found.name, sys.modules[cls.__module__], found.rotation)
    code = forward.__code__
    code = code.replace(co_names=tuple(fused if name == found.name else name for name in code.co_names))
    made = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return functools.wraps(forward)(made)


def _replacement(name: str, module: Any, rotation: Rotation) -> Function:
    """A function with the arguments of ``module.name``, as that is now."""
    known = getattr(module, name)

    def stock(*arguments: Any) -> Function | None:
        """What runs instead of ``rope`` for these arguments, as it is at this moment: another patch of it counts."""
        function: Function = getattr(module, name)
        # torch.compile fuses it with what is around it.
        if torch.compiler.is_compiling() or function is not known or "forward" in known.__dict__:
            return function
        no, why = _unfit(rotation, *arguments)
        if why is not None:
            _warn_once(f"{module.__name__}.{name}", why)
        return function if no else None

    function: Any
    if rotation.takes == "gptj":

        def function(tensor: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
            other = stock(tensor, None, cos, sin, 2)
            return _turn(rotation, tensor, None, cos, sin, 2)[0] if other is None else other(tensor, sin, cos)

    elif rotation.takes == "one":

        def function(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
            other = stock(x, None, cos, sin, unsqueeze_dim)
            if other is not None:
                return other(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return _turn(rotation, x, None, cos, sin, unsqueeze_dim)[0]

    elif rotation.takes == "positions":

        def function(
            q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, _: Any = None, unsqueeze_dim: int = 1
        ) -> tuple[Tensor, Any]:
            return pair(q, k, cos, sin, unsqueeze_dim)

    def pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Any]:
        other = stock(q, k, cos, sin, unsqueeze_dim)
        if other is not None:
            turned: tuple[Tensor, Any] = other(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return turned
        return _turn(rotation, q, k, cos, sin, unsqueeze_dim)

    if rotation.takes == "pair":
        function = pair
    function.replaces = known
    return function


def _unfit(
    rotation: Rotation, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> tuple[bool, str | None]:
    """Whether a call runs stock, and why, where that is worth a warning."""
    if choose("rope", q.device).backend == "torch" or makes_a_program() or needs_stock_autograd(q, k, cos, sin):
        return True, None
    given = (q, cos, sin) if k is None else (q, k, cos, sin)
    if any(type(x) is not Tensor for x in given):
        return True, "a tensor is of a subclass of Tensor"
    if unsqueeze_dim not in (1, 2) or q.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return True, f"q is {q.dim()}-D and the tables {cos.dim()}-D"
    if k is not None and (k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]
                          or k.shape[3 - unsqueeze_dim] != q.shape[3 - unsqueeze_dim]):  # fmt: skip
        return True, "q and k differ in batch, length or head size"
    width = cos.shape[2] * (2 if rotation.tables == "half" else 1)
    if width % 2 or width > q.shape[3] or (width < q.shape[3] and not rotation.partial):
        return True, f"tables of {cos.shape[2]} columns for heads of {q.shape[3]} elements"
    if cos.shape[1] != q.shape[3 - unsqueeze_dim] or cos.shape[0] not in (1, q.shape[0]):
        return True, "the tables are not of the batch and length of q"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return True, "the tables need a gradient"
    return _unfit_dtypes(rotation, q, k, cos, sin)


def _unfit_dtypes(
    rotation: Rotation, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[bool, str | None]:
    if q.dtype not in KERNEL_DTYPES or (k is not None and k.dtype != q.dtype) or cos.dtype != sin.dtype:
        return True, f"q is {q.dtype}, the tables {cos.dtype}"
    if cos.dtype == q.dtype or (rotation.back and cos.dtype == torch.float32):
        return False, None
    # Stock gives fp32 here, which attention under autocast rounds to the dtype that q and k had.
    device = q.device.type
    if (
        cos.dtype == torch.float32
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == q.dtype
    ):
        return False, None
    return True, f"q is {q.dtype}, the tables {cos.dtype}"


def _turn(
    rotation: Rotation, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> tuple[Tensor, Tensor | None]:
    width = cos.shape[2] * (2 if rotation.tables == "half" else 1)
    if rotation.tables == "first half":
        cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
    q, k = rope(q, k, cos, sin, rotary_dim=width, interleaved=rotation.interleaved)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
    return q, k


_warned: set[tuple[str, str]] = set()


def _warn_once(what: str, why: str) -> None:
    if (what, why) not in _warned:
        _warned.add((what, why))
        warnings.warn(f"embedkernels: {what} runs as it is: {why}", UserWarning, stacklevel=5)

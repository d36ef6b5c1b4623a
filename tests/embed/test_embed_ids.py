"""Ids out of range and other bad input: named in the error, never used as an address."""

from typing import Any

import pytest
import torch

import embedkernels as ek
from embedkernels.ops.ids import RECORD_FIELDS, ErrorState
from tests.embed.cases import Case, make

# Which ids, the table's name in the message, its rows in the case below, what precedes it in the argument list.
TABLES = [("ids", "token", 11), ("position_ids", "position", 10), ("type_ids", "token type", 3)]


def with_bad_id(case: Case, which: str, value: int, at: tuple[int, int]) -> Case:
    changed = Case(case.ids.clone(), case.parameters, dict(case.options))
    if which != "ids":
        changed.options[which] = changed.options[which].clone()
    target = changed.ids if which == "ids" else changed.options[which]
    target[at] = value
    return changed


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("value", ["rows", -1, 2**31 - 1])
@pytest.mark.parametrize(("which", "table", "rows"), TABLES)
def test_an_id_out_of_range_is_named(
    which: str, table: str, rows: int, value: Any, backend: str, device: torch.device
) -> None:
    value = rows if value == "rows" else value
    case = with_bad_id(make((3, 6), 8, device=device), which, value, (1, 2))
    with pytest.raises(IndexError, match=f"embed: {table} id {value} at position 8 .* table of {rows} rows"):
        run_and_wait(case, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("which", "table", "rows"), TABLES)
def test_compiled_it_names_the_same_table(
    which: str, table: str, rows: int, backend: str, device: torch.device
) -> None:
    torch.compiler.reset()
    case = with_bad_id(make((3, 6), 8, device=device), which, rows, (1, 2))
    compiled = torch.compile(lambda: case.run(backend=backend), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=f"embed: {table} id {rows} at position 8 .* table of {rows} rows"):  # noqa: PT012
        compiled()
        ek.check_errors()


@pytest.mark.parametrize(("which", "table", "rows"), TABLES)
def test_float64_tables_name_the_op_and_the_table_too(
    which: str, table: str, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked up one by one, on a GPU by the lookup's kernel: its record still says embed."""
    kernel = ek.use_backend("triton")
    monkeypatch.setattr("embedkernels.ops.embed._KERNEL_DTYPES", ())
    case = with_bad_id(make((3, 6), 8, device=device), which, rows, (1, 2))
    with kernel, pytest.raises(IndexError, match=f"embed: {table} id {rows} at position 8"):
        run_and_wait(case.to(torch.float64), backend=None)


def test_ids_in_64_bits_are_not_cut_to_32(device: torch.device) -> None:
    case = with_bad_id(make((3, 6), 8, device=device), "ids", 2**32 + 3, (0, 0))
    with pytest.raises(IndexError, match=f"token id {2**32 + 3} at position 0"):
        run_and_wait(case)


def test_padding_idx_out_of_an_id_s_range_is_refused_before_anything_runs() -> None:
    case = make((3, 6), 8)
    for name, rows in (("padding_idx", 11), ("position_padding_idx", 10)):
        changed = Case(case.ids, case.parameters, {**case.options, name: rows})
        with pytest.raises(ValueError, match=f"padding_idx {rows} is out of range for a table of {rows} rows"):
            changed.run(backend="torch")


def run_and_wait(case: Case, **more: Any) -> None:
    case.run(**more)
    ek.check_errors()


def launch(case: Case, errors: ErrorState, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward kernels without the host's check: output and row gradients."""
    from embedkernels.kernels import embed as kernels

    p, o = case.parameters, case.options
    inputs = kernels.Inputs(
        case.ids.flatten(), p["weight"].detach(), 1.0, p["position_weight"].detach(), "none", -1,
        o["position_ids"].flatten(), 0, case.ids.shape[-1], p["type_weight"].detach(), o["type_ids"].flatten(), None,
        None, None, "layer" if norm else "none", 0.0, False, None,
    )  # fmt: skip
    out = torch.full((case.ids.numel(), p["weight"].shape[1]), float("nan"), device=case.ids.device)
    mean, rstd = kernels.embed_forward(inputs, out, None, None, 1e-5, (errors.flag, errors.record))
    rows, _, _ = kernels.embed_backward(inputs, torch.ones_like(out), None, None, mean, rstd, 1.0, True, False)
    return out, rows


@pytest.mark.parametrize("value", ["rows", -1, -(2**40), 2**40])
@pytest.mark.parametrize(("which", "table", "rows"), TABLES)
def test_a_kernel_records_a_bad_id_and_counts_its_row_as_zeros(
    which: str, table: str, rows: int, value: Any, device: torch.device
) -> None:
    value = rows if value == "rows" else value
    good = make((3, 6), 8, device=device, norm="none")
    bad = with_bad_id(with_bad_id(good, which, value, (1, 2)), which, value, (2, 5))
    errors = ErrorState(
        torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(RECORD_FIELDS, dtype=torch.int64, device=device)
    )
    out, row_grads = launch(bad, errors, norm=False)
    index = [name for _, name, _ in TABLES].index(table)
    assert errors.record.tolist() == [1, index, value, 8, rows, 0]
    assert int(errors.flag) == 1
    assert torch.isfinite(row_grads).all()
    expected = good.reference().detach().reshape(18, 8).clone()
    parameter = {"ids": "weight", "position_ids": "position_weight", "type_ids": "type_weight"}[which]
    for place in (8, 17):
        looked_up = (good.ids if which == "ids" else good.options[which]).flatten()[place]
        expected[place] -= good.parameters[parameter].detach()[looked_up]
    torch.testing.assert_close(out, expected)


def test_a_record_is_kept_until_it_is_read(device: torch.device) -> None:
    case = make((3, 6), 8, device=device)
    errors = ErrorState(
        torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(RECORD_FIELDS, dtype=torch.int64, device=device)
    )
    launch(case, errors, norm=True)
    assert errors.record.tolist() == [0] * RECORD_FIELDS
    launch(with_bad_id(case, "ids", 11, (0, 3)), errors, norm=True)
    launch(with_bad_id(case, "ids", 99, (0, 1)), errors, norm=True)
    assert errors.record.tolist() == [1, 0, 11, 3, 11, 0]


@pytest.mark.gpu
@pytest.mark.parametrize(("which", "table", "rows"), TABLES)
def test_on_a_gpu_the_next_call_raises_and_the_context_lives_on(
    which: str, table: str, rows: int, device: torch.device
) -> None:
    good = make((3, 6), 8, device=device)
    with_bad_id(good, which, rows, (1, 2)).run()
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=f"{table} id {rows} at position 8"):
        good.run()
    assert torch.isfinite(good.run()).all()
    ek.check_errors()


@pytest.mark.gpu
def test_on_a_gpu_ids_are_checked_at_once_where_asked(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDKERNELS_CHECK_IDS", "1")
    with pytest.raises(IndexError, match="token id 11 at position 8"):
        with_bad_id(make((3, 6), 8, device=device), "ids", 11, (1, 2)).run()


@pytest.mark.gpu
def test_on_a_gpu_a_bad_id_gets_no_gradient(device: torch.device) -> None:
    case = with_bad_id(make((3, 6), 8, device=device), "ids", 99, (1, 2))
    grads = case.gradients(case.run(), torch.randn(3, 6, 8, device=device))
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    with pytest.raises(IndexError, match="token id 99"):
        ek.check_errors()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("length", "start"), [(11, 0), (3, 8)])
def test_a_sequence_longer_than_the_position_table_is_refused(
    length: int, start: int, backend: str, device: torch.device
) -> None:
    weight = torch.randn(5, 8, device=device)
    positions = torch.randn(10, 8, device=device)
    ids = torch.zeros(2, length, dtype=torch.int64, device=device)
    message = (
        f"embed: {length} positions from position_start {start} reach position {start + length - 1}, but "
        f"there are 10: expected a sequence of at most {10 - start}"
    )
    with pytest.raises(IndexError, match=message):
        ek.embed(ids, weight, position_weight=positions, position_start=start, backend=backend)


IDS = torch.zeros(2, 3, dtype=torch.int64)
WEIGHT = torch.zeros(5, 4)
ROWS = torch.zeros(2, 3, 4)
GIVEN: dict[str, Any] = {"ids": None, "weight": None, "inputs_embeds": ROWS}
ELSEWHERE = torch.device("meta")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_packed_places_are_looked_at_and_named_by_their_place(backend: Any, device: torch.device) -> None:
    ids = torch.tensor([[1, 99], [2, -7]], device=device)
    weight = torch.randn(5, 8, device=device)
    good = torch.tensor([2, 0], device=device)
    y = ek.embed(ids, weight, packed=good, backend=backend)
    ek.check_errors()
    assert torch.equal(y, weight[[2, 1]])

    def bad() -> None:
        ek.embed(ids, weight, packed=torch.tensor([0, 3], device=device), backend=backend)
        ek.check_errors()

    with pytest.raises(IndexError, match="embed: token id -7 at position 3"):
        bad()


@pytest.mark.parametrize("options", [{"packed": [-1]}, {"sinusoids": "halves", "position_ids": [[-5, 3]]}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_places_and_positions_are_checked_too(
    backend: Any, options: dict[str, Any], device: torch.device
) -> None:
    torch._dynamo.reset()
    tensors = {name: torch.tensor(v, device=device) for name, v in options.items() if name != "sinusoids"}
    plain = {name: v for name, v in options.items() if name == "sinusoids"}
    ids, weight = torch.tensor([[1, 2]], device=device), torch.randn(5, 8, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(**tensors: torch.Tensor) -> torch.Tensor:
        return ek.embed(ids, weight, backend=backend, **plain, **tensors)

    def bad() -> None:
        call(**tensors)
        ek.check_errors()

    with pytest.raises(IndexError, match=r"embed: (packed|position) id -"):
        bad()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_lone_id_can_be_packed(backend: Any, device: torch.device) -> None:
    weight, packed = torch.randn(5, 8, device=device), torch.tensor([0, 0], device=device)
    y = ek.embed(torch.tensor(3, device=device), weight, packed=packed, backend=backend)
    assert torch.equal(y, weight[[3, 3]])


def test_a_bad_place_counts_as_zeros_in_the_kernel(device: torch.device) -> None:
    """In every part of its row, the implicit type too, and in the gradients of all of them."""
    from embedkernels.kernels import embed as kernels

    errors = ErrorState(
        torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(RECORD_FIELDS, dtype=torch.int64, device=device)
    )
    table, kind = torch.randn(5, 8, device=device), torch.randn(2, 8, device=device)
    inputs = kernels.Inputs(
        torch.tensor([1, 2, 3], device=device), table, 1.0, None, "none", -1, None, 0, 3, kind, None, None, None,
        torch.tensor([2, 3, -1, 2**40, 0], device=device), "none", 0.0, False, None,
    )  # fmt: skip
    out = torch.full((5, 8), float("nan"), device=device)
    kernels.embed_forward(inputs, out, None, None, 1e-5, (errors.flag, errors.record))
    if device.type == "cuda":
        torch.cuda.synchronize()
    expected = torch.zeros(5, 8, device=device)
    expected[0], expected[4] = table[3] + kind[0], table[1] + kind[0]
    torch.testing.assert_close(out, expected)
    assert errors.record.tolist() == [1, 3, 3, 1, 3, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": IDS.float()}, TypeError, "ids must be int32 or int64, got torch.float32"),
        ({"ids": [[1, 2]]}, TypeError, "ids must be a Tensor, got list"),
        ({"ids": IDS.to(ELSEWHERE)}, ValueError, "ids is on meta, weight is on cpu"),
        ({"weight": [1.0]}, TypeError, "weight must be a Tensor, got list"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be 2-D \(V, D\) with D >= 1, got shape \(4,\)"),
        ({"weight": WEIGHT[:, :0]}, ValueError, r"D >= 1, got shape \(5, 0\)"),
        ({"weight": WEIGHT.int()}, TypeError, "weight must be floating point, got torch.int32"),
        ({"position_weight": WEIGHT[:, :3]}, ValueError, r"position_weight must be .* D = 4 .* got shape \(5, 3\)"),
        ({"position_weight": WEIGHT.half()}, TypeError, "position_weight must be torch.float32 like weight"),
        ({"position_weight": WEIGHT.to(ELSEWHERE)}, ValueError, "position_weight is on meta, weight is on cpu"),
        ({"position_ids": IDS}, ValueError, "position_ids is given, but position_weight is None"),
        ({"position_weight": WEIGHT, "position_ids": IDS.bool()}, TypeError, "position_ids must be int32 or int64"),
        (
            {"position_weight": WEIGHT, "position_ids": IDS[:, :2]},
            ValueError,
            r"position_ids must broadcast to the shape \(2, 3\), got shape \(2, 2\)",
        ),
        ({"position_weight": WEIGHT, "position_ids": IDS[None]}, ValueError, r"got shape \(1, 2, 3\)"),
        (
            {"position_weight": WEIGHT, "position_start": -1},
            ValueError,
            "position_start must not be negative, got -1",
        ),
        (
            {"position_weight": WEIGHT, "position_ids": IDS, "position_start": 2},
            ValueError,
            "position_start must be 0 where position_ids is given, got 2",
        ),
        ({"type_weight": WEIGHT[0]}, ValueError, r"type_weight must be 2-D .* got shape \(4,\)"),
        ({"type_ids": IDS}, ValueError, "type_ids is given, but type_weight is None"),
        ({"type_weight": WEIGHT, "type_ids": IDS.to(ELSEWHERE)}, ValueError, "type_ids is on meta"),
        ({"norm": "group"}, ValueError, "norm must be None, 'layer' or 'rms', got 'group'"),
        ({"norm_weight": WEIGHT[0]}, ValueError, "norm_weight is given, but norm is None"),
        ({"norm": "layer", "norm_bias": WEIGHT}, ValueError, r"norm_bias must be \(D,\) = \(4,\), got \(5, 4\)"),
        ({"norm": "layer", "norm_weight": WEIGHT[0].half()}, TypeError, "norm_weight must be torch.float32"),
        (
            {"weight": WEIGHT.half(), "norm": "layer", "norm_weight": WEIGHT[0], "norm_bias": WEIGHT[0].half()},
            TypeError,
            "norm_weight is torch.float32, norm_bias is torch.float16: expected one dtype",
        ),
        ({"norm": "layer", "norm_eps": -1.0}, ValueError, "norm_eps must be finite and not negative, got -1.0"),
        (
            {"norm": "layer", "norm_eps": float("nan")},
            ValueError,
            "must be finite and not negative, got nan",
        ),
        (
            {"norm": "layer", "norm_eps": float("inf")},
            ValueError,
            "must be finite and not negative, got inf",
        ),
        ({"norm": "layer", "norm_eps": "small"}, TypeError, "norm_eps must be a number, got str"),
        ({"norm": "layer", "norm_weight": 3}, TypeError, "norm_weight must be a Tensor, got int"),
        ({"norm": "layer", "norm_bias": [0.0] * 4}, TypeError, "norm_bias must be a Tensor, got list"),
        ({"position_weight": [[0.0] * 4]}, TypeError, "position_weight must be a Tensor, got list"),
        ({"type_weight": "types"}, TypeError, "type_weight must be a Tensor, got str"),
        (
            {"position_weight": WEIGHT, "position_ids": [0, 1, 2]},
            TypeError,
            "ids must be a Tensor, got list",
        ),
        ({"type_weight": WEIGHT, "type_ids": 0}, TypeError, "type_ids must be a Tensor, got int"),
        ({"position_start": 3}, ValueError, "position_start is 3, but position_weight is None"),
        ({"position_weight": WEIGHT, "position_start": 0.5}, TypeError, "position_start must be an int, got float"),
        ({"padding_idx": 1.5}, TypeError, "padding_idx must be an int, got float"),
        (
            {"position_weight": WEIGHT, "position_padding_idx": 0.0},
            TypeError,
            "embed: position_padding_idx must be an int, got float",
        ),
        ({"dropout_p": None}, TypeError, "dropout_p must be a number, got NoneType"),
        ({"type_weight": WEIGHT[:0]}, IndexError, "type_ids is None, .* but type_weight has 0 rows"),
        ({"type_weight": WEIGHT[:0], "backend": "triton"}, IndexError, "but type_weight has 0 rows"),
        ({"position_weight": WEIGHT[:2], "backend": "triton"}, IndexError, "but there are 2"),
        ({"dropout_p": "0.5"}, TypeError, "dropout_p must be a number, got str"),
        (
            {"sinusoids": "sine"},
            ValueError,
            "sinusoids must be None or one of interleaved, halves, fairseq, got 'sine'",
        ),
        (
            {"sinusoids": "halves", "position_weight": WEIGHT},
            ValueError,
            "position_weight and sinusoids are both given",
        ),
        ({"sinusoids": "fairseq", "weight": WEIGHT[:, :3]}, ValueError, "rows of at least 4 elements, got 3"),
        (
            {"sinusoids": "halves", "position_padding_idx": -1},
            ValueError,
            "must not be negative with sinusoids, got -1",
        ),
        (
            {"sinusoids": "halves", "position_ids": IDS - 1},
            IndexError,
            "position id -1 .* for a table of 16777216 rows",
        ),
        ({"sinusoids": "halves", "position_ids": IDS + 2**24}, IndexError, "position id 16777216 at position 0"),
        ({"sinusoids": "halves", "position_ids": IDS.bool()}, TypeError, "position_ids must be int32 or int64"),
        ({"sinusoids": "halves", "position_start": 2**24}, IndexError, "3 positions from position_start 16777216"),
        ({"scale": torch.tensor(2.0)}, TypeError, "scale must be a number, got Tensor"),
        ({"mask": IDS.to(torch.complex64)}, TypeError, "mask must be bool or real numbers, got torch.complex64"),
        ({"scale": None}, TypeError, "scale must be a number, got NoneType"),
        ({"scale": float("inf")}, ValueError, r"scale must be between 2\*\*-100 and 2\*\*100 in magnitude, got inf"),
        ({"scale": 0.0}, ValueError, "in magnitude, got 0.0"),
        ({"ids": None}, TypeError, "ids must be a Tensor, got NoneType"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
        ({"inputs_embeds": ROWS}, ValueError, "inputs_embeds stands in the place of ids and weight"),
        ({**GIVEN, "inputs_embeds": ROWS.long()}, TypeError, "inputs_embeds must be floating point"),
        ({**GIVEN, "inputs_embeds": ROWS[..., :0]}, ValueError, r"inputs_embeds must be .* got shape \(2, 3, 0\)"),
        ({**GIVEN, "inputs_embeds": [1.0]}, TypeError, "inputs_embeds must be a Tensor, got list"),
        ({**GIVEN, "type_weight": WEIGHT, "type_ids": IDS[:, :2]}, ValueError, r"broadcast to the shape \(2, 3\)"),
        ({"extra": ROWS[..., :1]}, ValueError, r"extra must have D = 4 columns, got shape \(2, 3, 1\)"),
        ({"extra": ROWS[:, :2]}, ValueError, r"extra must broadcast to the shape \(2, 3, 4\), got shape \(2, 2, 4\)"),
        ({"extra": ROWS.half()}, TypeError, "extra must be torch.float32 like the tables, got torch.float16"),
        ({"extra": 1.0}, TypeError, "extra must be a Tensor, got float"),
        ({"extra": ROWS.to(ELSEWHERE)}, ValueError, "extra is on meta, weight is on cpu"),
        ({"mask": IDS[:, :2]}, ValueError, r"mask must broadcast to the shape \(2, 3\), got shape \(2, 2\)"),
        ({"packed": [1]}, TypeError, "packed must be a Tensor, got list"),
        ({"packed": IDS}, ValueError, r"packed must be 1-D, got shape \(2, 3\)"),
        ({"packed": IDS[0].bool()}, TypeError, "packed must be int32 or int64, got torch.bool"),
        ({"packed": IDS[0].to(ELSEWHERE)}, ValueError, "packed is on meta, weight is on cpu"),
        ({"packed": IDS[0], "mask": IDS}, ValueError, "mask and packed are both given"),
        ({"packed": IDS[0] + 6}, IndexError, "packed id 6 at position 0 .* out of range for a table of 6 rows"),
        ({"packed": IDS[0] - 1, "backend": "triton"}, IndexError, "packed id -1 at position 0"),
        ({"mask": [1]}, TypeError, "mask must be a Tensor, got list"),
        ({"mask": torch.ones(2, 3, requires_grad=True)}, ValueError, "mask gets no gradient, but requires one"),
        ({"norm": "layer", "norm_eps": "1e-5"}, TypeError, "norm_eps must be a number, got str"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in"),
        ({"padding_idx": 5}, ValueError, "padding_idx 5 is out of range for a table of 5 rows"),
        ({"backend": "cuda"}, ValueError, "backend must be one of triton, torch or auto, got 'cuda'"),
        ({"backend": "triton", "weight": WEIGHT.double()}, TypeError, "'triton' takes float32, .* got torch.float64"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        ek.embed(**{"ids": IDS, "weight": WEIGHT, **change})
    assert str(raised.value).startswith("embed: ")


def op_arguments(device: torch.device, **changes: Any) -> dict[str, Any]:
    """A sound call of the forward op; the op can be reached without ``embed``, so it guards its own addresses."""
    return {
        "ids": IDS.to(device), "weight": WEIGHT.to(device), "scale": 1.0, "position_weight": None,
        "sinusoids": "none", "position_padding_idx": -1, "position_ids": None, "position_start": 0,
        "type_weight": None, "type_ids": None, "extra": None, "mask": None, "packed": None, "norm": "layer",
        "norm_weight": None,
        "norm_bias": None, "norm_eps": 1e-5, "dropout_p": 0.0, "dropout_first": False, "seed": None,
        "dtype": torch.float32, "padding_idx": -1, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"position_weight": WEIGHT[:, :3]}, ValueError, r"position_weight must be 2-D .* got shape \(5, 3\)"),
        ({"position_weight": WEIGHT, "position_ids": IDS[0, :2]}, ValueError, "must have 6 or 3 elements, got 2"),
        ({"position_weight": WEIGHT, "position_ids": IDS.short()}, TypeError, "must be int32 or int64"),
        ({"position_weight": WEIGHT[:2]}, IndexError, "reach position 2, but there are 2"),
        (
            {"sinusoids": "sine"},
            ValueError,
            "sinusoids must be None or one of interleaved, halves, fairseq, got 'sine'",
        ),
        ({"position_weight": WEIGHT, "position_start": -1}, ValueError, "must not be negative"),
        ({"type_weight": WEIGHT[:0]}, IndexError, "type_weight has 0 rows"),
        ({"norm_weight": WEIGHT[0, :3]}, ValueError, r"norm_weight must be \(D,\) = \(4,\), got \(3,\)"),
        ({"norm_bias": WEIGHT[0].double()}, TypeError, "norm_bias must be torch.float32"),
        ({"norm": "none", "norm_bias": WEIGHT[0]}, ValueError, "norm_bias is given, but norm is None"),
        ({"norm": "group"}, ValueError, "norm must be one of none, layer, rms, got 'group'"),
        ({"extra": WEIGHT}, ValueError, r"extra must be \(6 or 3, 4\), got \(5, 4\)"),
        ({"extra": WEIGHT[:3, :3]}, ValueError, r"extra must be \(6 or 3, 4\), got \(3, 3\)"),
        ({"extra": WEIGHT[:3].double()}, TypeError, "extra must be torch.float32 like the tables"),
        ({"mask": IDS[0, :2]}, ValueError, "mask must have 6 or 3 elements, got 2"),
        ({"packed": IDS}, ValueError, "packed must be 1-D"),
        ({"scale": float("nan")}, ValueError, "scale must be between"),
        ({"ids": None, "weight": WEIGHT.int()}, TypeError, "inputs_embeds must be floating point"),
        ({"ids": None, "weight": WEIGHT, "extra": WEIGHT[:3]}, ValueError, r"extra must be \(5 or 5, 4\)"),
        ({"dropout_p": 0.5}, ValueError, "seed must be int64 with 1 element where dropout_p is positive, got None"),
        ({"dropout_p": 0.5, "seed": IDS.int()}, ValueError, r"got torch.int32 \(2, 3\)"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be 2-D"),
        ({"ids": IDS.float()}, TypeError, "ids must be int32 or int64"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_the_op_itself_refuses_what_would_read_beyond_a_tensor(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    op = torch.ops.embedkernels.embed_forward
    op(**op_arguments(device))
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(error, match=f"embed: .*{message}"):
        op(**op_arguments(device, **moved))


@pytest.mark.parametrize("short", ["grad", "mean", "rstd", "norm_weight"])
def test_the_backward_op_refuses_what_it_would_read_beyond(short: str, device: torch.device) -> None:
    arguments = op_arguments(device, norm_weight=torch.ones(4, device=device))
    y, mean, rstd = torch.ops.embedkernels.embed_forward(**arguments)
    shared = {name: arguments[name] for name in list(arguments)[:16]}
    given = {"grad": y, **shared, "mean": mean, "rstd": rstd, "dropout_p": 0.0, "dropout_first": False, "seed": None}
    given |= {"row_scale": 1.0, "need_rows": True, "need_norm": True}
    torch.ops.embedkernels.embed_backward(**given)
    with pytest.raises(ValueError, match=f"embed: {short} must"):
        torch.ops.embedkernels.embed_backward(**{**given, short: given[short].flatten()[:-1]})

"""``embedkernels finetune`` end to end: every task, what it saves, and the errors a user can make."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from embedkernels.cli import launch, plot, results, training
from embedkernels.cli.errors import CliError
from embedkernels.cli.settings import Settings
from tests.cli import support
from tests.cli.support import command, said

FAST = ("--device", "cpu", "--batch-size", "8", "--lr", "0.004", "--warmup", "0")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return support.write_csv(tmp_path / "rows.csv", support.reviews(96))


def figures(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.usefixtures("here")
def test_classification_learns_and_saves_a_stock_model(bert: Path, rows: Path, tmp_path: Path) -> None:
    held_back = support.write_csv(tmp_path / "eval.csv", support.reviews(32, seed=1))
    output = tmp_path / "out"
    done = command(
        *("finetune", "--model", bert, "--train", rows, "--eval", held_back, "--output", output, "--epochs", 10),
        *FAST,
    )
    assert done.exit_code == 0, done.output
    ours = figures(output)["patched"]
    assert ours["accuracy"] >= 0.9
    assert ours["loss"][-1] < 0.5 * ours["loss"][0]
    assert len(ours["loss"]) == ours["steps"] == 120
    assert "accuracy after" in done.stdout
    assert "BertEmbeddings" in done.stdout

    model = transformers.AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert type(model).__module__.startswith("transformers.")
    assert model.config._attn_implementation == "sdpa"
    assert model.config.id2label == {0: "negative", 1: "positive"}
    classify = transformers.pipeline(
        "text-classification", model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(output / "model")
    )
    truth = support.reviews(32, seed=1)
    right = [said["label"] == label for said, (_, label) in zip(classify([t for t, _ in truth]), truth, strict=True)]
    assert sum(right) / 32 == pytest.approx(ours["accuracy"])


@pytest.mark.usefixtures("here")
def test_token_classification(bert: Path, tmp_path: Path) -> None:
    train = support.write_json_lines(tmp_path / "a.jsonl", support.tagged(64), ("words", "ner"))
    output = tmp_path / "out"
    done = command(
        *("finetune", "--model", bert, "--train", train, "--text", "words", "--label", "ner", "--output", output),
        *("--task", "token-classification", "--epochs", 8, "--eval-fraction", 0.25),
        *FAST,
    )
    assert done.exit_code == 0, done.output
    ours = figures(output)["patched"]
    assert ours["accuracy"] >= 0.95
    assert ours["f1"] >= 0.9 > ours["f1_before"]
    model = transformers.AutoModelForTokenClassification.from_pretrained(output / "model")
    assert set(model.config.label2id) == {"O", "B-PER", "B-LOC"}


@pytest.mark.usefixtures("here")
def test_causal_lm(gpt2: Path, tmp_path: Path) -> None:
    train = tmp_path / "a.txt"
    # Longer than the model's 32 positions: continued in sequences of their own.
    train.write_text("".join(" ".join(["the film was very good and so"] * (1 + i % 6)) + "\n" for i in range(24)))
    output = tmp_path / "out"
    done = command(
        *("finetune", "--model", gpt2, "--train", train, "--task", "causal-lm", "--output", output, "--epochs", 6),
        *FAST,
        *("--batch-size", 4, "--eval-batch-size", 2),
    )
    assert done.exit_code == 0, done.output
    ours = figures(output)["patched"]
    assert ours["perplexity"] < 2 < 15 < ours["perplexity_before"]
    assert "8 of 24 texts are longer than 32 tokens (as many as the model has positions for)" in said(done.stdout)
    model = transformers.AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.config.use_cache
    words = transformers.AutoTokenizer.from_pretrained(output / "model")
    out = model.generate(**words("the film was", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert words.decode(out[0]) == "the film was very good and so"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_models_losses_are_means_over_the_tokens_it_predicts(
    gpt2: Path, tmp_path: Path, family: str
) -> None:
    """The first step's loss, the evaluation's and the perplexity say the same of the same rows."""
    model = gpt2 if family == "gpt2" else support.save_llama(tmp_path / "llama")
    train = tmp_path / "a.txt"
    train.write_text("".join(" ".join(["film", "was", "so"] * (1 + i)) + "\n" for i in range(6)))
    output = tmp_path / "out"
    done = command(
        *("finetune", "--model", model, "--train", train, "--eval", train, "--task", "causal-lm", "--output", output),
        *("--max-steps", 1, "--batch-size", 6, "--eval-batch-size", 4, "--dropout", 0, "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    ours = figures(output)["patched"]
    assert ours["eval_loss_before"] == pytest.approx(math.log(ours["perplexity_before"]), rel=1e-5)
    assert ours["loss"][0] == pytest.approx(math.log(ours["perplexity_before"]), rel=1e-5)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("task", ["classification", "token-classification"])
def test_a_decoder_without_padding_token_classifies(gpt2: Path, tmp_path: Path, task: str) -> None:
    if task == "classification":
        train = support.write_csv(tmp_path / "a.csv", support.reviews(48))
    else:
        train = support.write_json_lines(tmp_path / "a.jsonl", support.tagged(48), ("tokens", "tags"))
    output = tmp_path / "out"
    done = command("finetune", "--model", gpt2, "--train", train, "--task", task, "--output", output, *FAST)
    assert done.exit_code == 0, done.output
    assert figures(output)["patched"]["accuracy"] > 0.6


@pytest.mark.usefixtures("here")
def test_with_dropout_off_patched_and_stock_learn_alike(bert: Path, rows: Path, tmp_path: Path) -> None:
    """Also: gradient accumulation, which makes two batches of four one step of eight."""
    losses = {}
    for name, options in {
        "patched": ("--batch-size", 8),
        "stock": ("--stock", "--batch-size", 8),
        "accumulated": ("--stock", "--batch-size", 4, "--accumulate", 2),
    }.items():
        output = tmp_path / name
        done = command(
            *("finetune", "--model", bert, "--train", rows, "--output", output, "--dropout", 0, "--max-steps", 6),
            *FAST,
            *options,
        )
        assert done.exit_code == 0, done.output
        (run,) = figures(output).keys() & {"stock", "patched"}
        losses[name] = figures(output)[run]["loss"]
        assert figures(output)[run]["step_samples"] == [8] * 6
    assert losses["patched"] == pytest.approx(losses["stock"], rel=1e-4)
    assert losses["accumulated"] == pytest.approx(losses["stock"], rel=1e-4)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("option", ["--gradient-checkpointing", "--precision=bf16"])
def test_options_of_the_machine(bert: Path, rows: Path, tmp_path: Path, option: str) -> None:
    output = tmp_path / "out"
    done = command("finetune", "--model", bert, "--train", rows, "--output", output, "--max-steps", 3, option, *FAST)
    assert done.exit_code == 0, done.output
    assert all(loss > 0 for loss in figures(output)["patched"]["loss"])


@pytest.mark.usefixtures("here")
def test_a_finetuned_model_goes_on_with_its_own_labels(bert: Path, rows: Path, tmp_path: Path) -> None:
    common = ("finetune", "--train", rows, "--output", tmp_path / "first", "--epochs", 10, *FAST)
    assert command(*common, "--model", bert).exit_code == 0
    again = command(
        *("finetune", "--train", rows, "--output", tmp_path / "second", "--max-steps", 1),
        *("--model", tmp_path / "first" / "model"),
        *FAST,
    )
    assert again.exit_code == 0, again.output
    assert "new weights" not in again.stdout
    assert figures(tmp_path / "second")["patched"]["accuracy_before"] >= 0.9


def test_compare_in_processes_of_their_own(bert: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "embedkernels.cli.main", "finetune", "--compare", "--max-steps", "4", *FAST),
            *("--model", str(bert), "--train", str(rows), "--output", str(output), "--dropout", "0"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    content = figures(output)
    assert list(content) == ["stock", "patched", "report", "environment"]
    for run in ("stock", "patched"):
        ours = content[run]
        for key in ("accuracy", "accuracy_before", "samples_per_second"):
            assert isinstance(ours[key], float), key
        assert ours["peak_memory_bytes"] > 10**8
        assert [type(loss) for loss in ours["loss"]] == [float] * 4
    assert content["stock"]["accuracy_before"] == content["patched"]["accuracy_before"], "same new head, same rows"
    # Same rows in the same order, no dropout: the first loss is the same number.
    assert content["stock"]["loss"][0] == pytest.approx(content["patched"]["loss"][0], rel=1e-5)
    faster = content["patched"]["speedup_over_stock"]
    assert 0 < faster["low"] <= faster["median"] <= faster["high"]
    assert content["report"]["active"]
    assert {entry["part"] for entry in content["report"]["entries"]} == {"embeddings", "attention", "padding"}
    environment = content["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    assert environment["threads"] == 1
    assert environment["settings"]["seed"] == 0
    assert (output / "metrics.png").read_bytes().startswith(b"\x89PNG")
    for run in ("stock", "patched"):
        transformers.AutoModelForSequenceClassification.from_pretrained(output / run)
    assert "patched to stock" in done.stdout
    assert "embed on cpu: torch" in done.stdout
    assert not (output / results.UNFINISHED).exists()


ERRORS: dict[str, tuple[list[str], int, str]] = {
    "column": (
        ["--text", "txt"],
        2,
        "--text: no column 'txt' in {rows} | Columns there: text, label. Did you mean 'text'?",
    ),
    "label column": (["--label", "Label"], 2, "--label: no column 'Label' | Did you mean 'label'?"),
    "same column": (["--label", "text"], 2, "--label: is the same column as --text"),
    "missing file": (["--train", "{rows}x"], 2, "--train: there is no file {rows}x | Did you mean 'rows.csv'?"),
    "missing eval": (["--eval", "no.csv"], 2, "--eval: there is no file no.csv"),
    "empty file": (["--eval", "{empty}"], 2, "--eval: {empty} is empty"),
    "format": (["--train", "{odd}"], 2, "--train: {odd}: unknown format '.xlsx'"),
    "broken json": (["--train", "{broken}"], 2, "{broken}, line 2 is not JSON"),
    "missing model": (["--model", "./nothing"], 2, "--model: there is no directory ./nothing"),
    "unknown model": (["--model", "no-such-model"], 2, "--model: 'no-such-model' is neither a directory here nor a"),
    "model is a file": (["--model", "{rows}"], 2, "--model: {rows} is a file"),
    "no model in it": (["--model", "{folder}"], 2, "holds no config.json"),
    "tokenizer": (["--tokenizer", "{folder}/no"], 2, "--tokenizer: there is no directory"),
    "encoder": (["--task", "causal-lm"], 2, "reads in both directions"),
    "label without use": (
        ["--task", "causal-lm", "--label", "x"],
        2,
        "--label: --task causal-lm learns from the text",
    ),
    "task": (["--task", "regression"], 2, "--task: 'regression' is not known Use one of classification, "),
    "precision": (["--precision", "fp8"], 2, "--precision: 'fp8' is not known Use one of fp32, bf16, fp16."),
    "device": (["--device", "tpu"], 2, "--device: 'tpu' is not known"),
    "half on the processor": (["--precision", "fp16", "--device", "cpu"], 2, "--precision: fp16 needs a GPU"),
    "rate": (["--lr", "0"], 2, "--lr: must be a number above 0"),
    "warm-up": (["--warmup", "1.5"], 2, "--warmup: 1.5 is neither"),
    "share": (["--eval-fraction", "1"], 2, "--eval-fraction: must lie between 0 and 1"),
    "dropout": (["--dropout", "1"], 2, "--dropout: must be at least 0"),
    "seed": (["--seed", "-1"], 2, "--seed: must lie between"),
    "both": (["--stock", "--compare"], 2, "--stock: --compare runs the stock model too"),
    "batch": (["--batch-size", "0"], 2, "--batch-size"),
    "option": (["--colour", "red"], 2, "No such option"),
    "output is a file": (["--output", "{rows}"], 2, "--output: {rows} is a file"),
    "output is in use": (["--output", "{folder}"], 2, "--output: {folder} holds other files"),
    "divergence": (
        ["--lr", "1e30", "--max-steps", "4"],
        1,
        "training diverged: the loss of step | No model was",
    ),
    "divergence in the end": (
        ["--lr", "1e30", "--max-steps", "2"],
        1,
        "training diverged: the evaluation loss of",
    ),
    "weights without bounds": (["--lr", "1e38", "--max-steps", "1", "--warmup", "0"], 1, "training diverged: "),
    "no train": (["--train", ""], 2, "--train: is empty"),
    "length": (["--max-length", "2"], 2, "--max-length: 2 leaves no room for text | Use at least 3."),
    "output cannot be written": (["--output", "/dev/null/x"], 2, "--output: /dev/null/x cannot be written | Name a"),
    "name too long": (["--output", "x" * 300], 2, "cannot be written: File name too long"),
    "words without tokens": (
        ["--task", "token-classification", "--train", "{blank}"],
        2,
        "--train: no text has a word that gives a token",
    ),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("arguments", "code", "expected"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument_and_the_remedy(
    bert: Path, rows: Path, tmp_path: Path, arguments: list[str], code: int, expected: str
) -> None:
    places = {name: tmp_path / file for name, file in FILES.items()} | {"rows": rows, "folder": tmp_path}
    places["empty"].touch()
    places["odd"].write_text("x")
    places["broken"].write_text('{"text": "x", "label": 1}\n{"text"\n')
    support.write_json_lines(places["blank"], [([" "], ["O"]), (["\u2003"], ["B"])] * 8, ("tokens", "tags"))
    options = {"--model": str(bert), "--train": str(rows), "--output": str(tmp_path / "new" / "out")}
    words = [word.format(**places) for word in arguments]
    given = [word for pair in options.items() if pair[0] not in words for word in pair]
    done = command("finetune", *given, *words)
    assert done.exit_code == code, done.output
    shown = said(done.stderr)
    for part in expected.format(**places).split(" | "):
        assert part in shown
    assert "Traceback" not in done.output
    assert sum(line.startswith("error ") for line in done.output.splitlines()) <= 1
    if code == 2:
        assert not (tmp_path / "new" / "out").exists(), "nothing is left of a run that could not begin"


FILES = {"blank": "blank.jsonl", "empty": "empty.csv", "odd": "odd.xlsx", "broken": "broken.jsonl"}


@pytest.mark.usefixtures("here")
def test_debug_shows_the_traceback(bert: Path, rows: Path) -> None:
    done = command("finetune", "--model", bert, "--train", rows, "--text", "txt", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "no column 'txt'" in done.stderr


def test_an_earlier_result_stays_until_it_is_replaced(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    output = tmp_path / "out"
    common = ("finetune", "--model", bert, "--train", rows, "--output", output, "--max-steps", 2, *FAST)
    assert command(*common, "--stock").exit_code == 0
    refused = command(*common)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    monkeypatch.setattr(training, "_check_finite", lambda _: 1 / 0)
    failed = command(*common, "--overwrite")
    assert failed.exit_code == 1
    assert "ZeroDivisionError: division by zero" in failed.stderr
    assert "--debug" in failed.stderr
    assert "stock" in figures(output), "a failure costs no earlier result"
    assert (output / "model" / "model.safetensors").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(launch, "run", support.run_here)
    assert command(*common, "--overwrite").exit_code == 0
    assert figures(output).keys() & {"stock", "patched"} == {"patched"}
    assert sorted(one.name for one in output.iterdir()) == ["metrics.json", "metrics.png", "model", "patched.log"]


@pytest.mark.usefixtures("here")
def test_a_picture_that_cannot_be_drawn_costs_no_result(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("finetune", "--model", bert, "--train", rows, "--output", tmp_path / "out", "--max-steps", 1, *FAST)

    def fail(*arguments: object) -> None:
        raise ValueError("no [font] here")

    monkeypatch.setattr(plot, "draw", fail)
    done = command(*common)
    assert done.exit_code == 0, done.output
    assert "no picture, drawing it failed (ValueError: no [font] here)" in said(done.stdout)
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["metrics.json", "model", "patched.log"]
    assert "metrics.png" not in done.stdout


def test_without_matplotlib_nothing_is_begun(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command("finetune", "--model", "m", "--train", rows, "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "matplotlib" in done.stderr
    assert 'pip install "embedkernels[cli]"' in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_divergence_whatever_the_loss() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    training._check_model(model, 0.5)
    with torch.no_grad():
        model[1].weight[0, 1] = math.inf
    with pytest.raises(CliError, match=r"training diverged: 1\.weight of the trained model are not finite"):
        training._check_model(model, 0.5)


@pytest.mark.usefixtures("here")
def test_texts_of_unknown_words_are_noticed(bert: Path, tmp_path: Path) -> None:
    rows = [("ein recht guter Film was good", "a"), ("ein recht dummer Film was bad", "b")] * 8
    train = support.write_csv(tmp_path / "a.csv", rows)
    done = command(
        "finetune", "--model", bert, "--train", train, "--output", tmp_path / "out", "--max-steps", 1, *FAST
    )
    assert done.exit_code == 0, done.output
    assert "67% of the training texts' tokens are unknown to the tokenizer ([UNK])" in said(done.stdout)


@pytest.mark.usefixtures("here")
def test_texts_whose_words_give_no_tokens_are_left_out(bert: Path, tmp_path: Path) -> None:
    train = support.write_json_lines(
        tmp_path / "a.jsonl", [*support.tagged(16), *[([" "], ["O"])] * 8], ("tokens", "tags")
    )
    done = command(
        *("finetune", "--model", bert, "--train", train, "--task", "token-classification"),
        *("--output", tmp_path / "out", "--epochs", 1, *FAST, "--batch-size", 1),
    )
    assert done.exit_code == 0, done.output
    assert "8 texts left out: their words give no tokens" in said(done.stdout)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("family", "heads"), [("FNet", {}), ("IBert", {"num_attention_heads": 1})])
def test_models_of_no_family_are_trained_and_what_is_patched_is_said(
    family: str, heads: dict[str, int], rows: Path, tmp_path: Path
) -> None:
    """FNet takes no attention mask, and has tables that are looked up; I-BERT's are its own."""
    words = support.tokenizer(special=True)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=64,
        **heads,
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    done = command(
        "finetune", "--model", tmp_path / "model", "--train", rows, "--output", output, "--max-steps", 2, *FAST
    )
    if done.exit_code:
        assert "attention_mask" not in done.stderr, done.stderr
    assert done.exit_code == 0, done.output
    patched = family == "FNet"
    assert figures(output)["report"]["active"] == patched
    assert (f"nothing to patch in {family}ForSequenceClassification" in said(done.stdout)) == (not patched)


@pytest.mark.usefixtures("here")
def test_a_tokenizer_of_another_model_is_refused(bert: Path, rows: Path, tmp_path: Path) -> None:
    words = support.tokenizer(special=True)
    words.add_tokens([f"extra{i}" for i in range(5)])
    words.save_pretrained(tmp_path / "words")
    done = command("finetune", "--model", bert, "--train", rows, "--tokenizer", tmp_path / "words", *FAST)
    assert done.exit_code == 2
    assert "--tokenizer: the tokenizer has ids up to" in said(done.stderr)


def test_a_process_that_dies_is_an_error_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for boot, expected in {
        "import os; os.kill(os.getpid(), 9)": "was killed by SIGKILL, as happens when memory runs out",
        "import sys; print('the reason', file=sys.stderr); sys.exit(3)": "ended with exit code 3",
    }.items():
        monkeypatch.setattr(launch, "_BOOT", boot)
        with pytest.raises(launch.WorkerError) as caught:
            launch.run(Settings("m", "t"), tmp_path, patched=True, log=tmp_path / "log", on_event=lambda _: None)
        assert expected in caught.value.message
        assert caught.value.exit_code == 1
    assert "the reason" in caught.value.details
    assert str(tmp_path / "log") in caught.value.remedy


def test_a_process_that_dies_before_it_reads_its_job_is_that_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_BOOT", "import os; os.close(0); os._exit(3)")
    # More than a pipe holds: writing waits for the reader, and meets its end.
    job = Settings("m" * 300_000, "t")
    with pytest.raises(launch.WorkerError, match="ended with exit code 3"):
        launch.run(job, tmp_path, patched=True, log=tmp_path / "log", on_event=lambda _: None)

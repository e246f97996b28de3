"""Packed rows in models of transformers: documents are recognised as attention recognises them, without an argument."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import strategies as make
from support.transformers_trainers import make_dataset, make_settings, make_texts, make_tokenizer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixture_of_experts import ExpertChoiceGating, Routing, TopKGating
from mixture_of_experts.huggingface import aux_loss, from_transformers, replace_ffn
from mixture_of_experts.huggingface.model_arguments import read_token_metadata
from mixture_of_experts.replay import record_routing, replay_routing
from mixture_of_experts.stats import track_routing

LENGTHS = (5, 9, 2)
SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def make_llama(factor: float | None = 0.7) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False))

    def make_gate(dim: int, num_experts: int) -> nn.Module:
        return TopKGating(
            dim, num_experts, k=2, capacity_factor_train=factor, capacity_factor_eval=factor, min_expert_capacity=1
        )

    replace_ffn(model, num_experts=4, gate=make_gate)
    return model.double()


def make_documents() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(1, 64, (n,), generator=gen) for n in LENGTHS]


def make_packed() -> dict[str, Any]:
    collate = DataCollatorWithFlattening(return_position_ids=True)
    return dict(collate([{"input_ids": ids.tolist()} for ids in make_documents()]))


def run_separately(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits of the documents, one after the other, and the mean auxiliary loss of each alone."""
    results = [(model(ids.unsqueeze(0)).logits[0], aux_loss(model)) for ids in make_documents()]
    logits, losses = zip(*results, strict=True)
    return torch.cat(logits), torch.stack(losses).mean()


@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_of_an_upcycled_model(factor, checkpointed):
    model, packed = make_llama(factor).train(), make_packed()
    wanted, loss = run_separately(model)
    wanted_grads = torch.autograd.grad(wanted.square().sum() + loss, list(model.parameters()), allow_unused=True)
    if checkpointed:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    logits = model(packed["input_ids"], position_ids=packed["position_ids"]).logits[0]
    torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(aux_loss(model), loss, atol=1e-9, rtol=1e-9)
    total = logits.square().sum() + aux_loss(model)
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(grads, wanted_grads, atol=1e-9, rtol=1e-9)


def test_packed_rows_of_a_converted_model():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    model, packed = MixtralForCausalLM(config).double(), make_packed()
    from_transformers(model)
    for layer in model.model.layers:
        layer.mlp.moe.gate.capacity_factor_train, layer.mlp.moe.gate.min_expert_capacity = 0.7, 1
    model.train()
    wanted, loss = run_separately(model)
    logits = model(packed["input_ids"], position_ids=packed["position_ids"]).logits[0]
    torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(aux_loss(model), loss, atol=1e-9, rtol=1e-9)


def test_documents_are_found_as_attention_finds_them():
    ids, positions = torch.ones(2, 6, dtype=torch.int64), torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    given = {"input_ids": ids, "position_ids": positions}
    assert read_token_metadata(given).segment_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6]
    assert read_token_metadata({**given, "position_ids": positions[:1]}).segment_ids.shape == (2, 6)
    one = {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 3, 5, 6], dtype=torch.int32)}
    assert read_token_metadata(one).segment_ids.tolist() == [[1, 1, 1, 2, 2, 3]]
    with_grids = torch.cat([positions.unsqueeze(0), torch.zeros(3, 2, 6, dtype=torch.int64)])  # as Qwen3-VL takes them
    assert read_token_metadata({**given, "position_ids": with_grids}).segment_ids.tolist() == [
        [0, 0, 0, 1, 1, 2],
        [0] * 6,
    ]
    by_index = {"input_ids": ids[:1], "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]])}
    assert read_token_metadata(by_index).segment_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    for other in (
        {"position_ids": positions[1:].expand(2, 6)},  # no document ends
        {"position_ids": positions, "attention_mask": torch.ones(2, 6)},
        {"position_ids": positions, "past_key_values": ()},
        {"position_ids": positions.expand(3, 2, 6)},
        {},
    ):
        assert read_token_metadata({"input_ids": ids, **other}).segment_ids is None


def attend_by_lengths(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, cu_seq_lens_q: Tensor, **settings: Any
) -> tuple[Tensor, None]:
    """Attention `(1, heads, n, d)` that separates documents by cumulative lengths, as Flash Attention does."""
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    out = [scaled_dot_product_attention(*part, is_causal=True, scale=settings["scaling"]) for part in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("checkpointed", [False, True])
def test_arguments_of_flash_attention(checkpointed, monkeypatch):
    """Cumulative lengths without positions: rotary positions then count on over the row, which attention ignores."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "by_lengths", attend_by_lengths)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "by_lengths", lambda *args, **kwargs: None)
    model = make_llama().train()
    wanted, loss = run_separately(model)
    wanted_grads = torch.autograd.grad(wanted.square().sum() + loss, list(model.parameters()), allow_unused=True)
    model.set_attn_implementation("by_lengths")
    if checkpointed:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    collate = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    packed = collate([{"input_ids": ids.tolist()} for ids in make_documents()])
    packed.pop("labels")
    assert "cu_seq_lens_q" in packed
    logits = model(**packed).logits[0]
    torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(aux_loss(model), loss, atol=1e-9, rtol=1e-9)
    total = logits.square().sum() + aux_loss(model)
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(grads, wanted_grads, atol=1e-6, rtol=1e-6)  # rotations are float32


def test_layers_that_cannot_pack_keep_a_row_as_one_group():
    model, packed = make_llama(), make_packed()
    plain = model(packed["input_ids"]).logits  # other positions: only the groups are compared
    for layer in model.model.layers:
        layer.mlp.moe.group_size = 16
    with track_routing(model) as stats:
        out = model(packed["input_ids"], position_ids=packed["position_ids"]).logits
    assert out.shape == plain.shape
    assert stats.last(stats.layers[0]).groups == 1


def test_statistics_count_documents_as_groups():
    model, packed = make_llama(), make_packed()
    with track_routing(model) as stats:
        model(packed["input_ids"], position_ids=packed["position_ids"])
    assert [stats.last(layer).groups for layer in stats.layers] == [3, 3]


def train_by_sft(folder: Path, **settings: Any) -> tuple[dict[str, Tensor], list[int]]:
    """The weights after a step of TRL's SFT on eight texts of unequal lengths, and the numbers of documents that the
    first gate was given in training."""
    from trl import SFTConfig, SFTTrainer

    model, documents = make_llama().float(), []
    gate = model.model.layers[0].mlp.moe.gate
    gate.register_forward_hook(lambda module, args, routing: documents.append(count_documents(routing)))
    texts = [" ".join(text.split()[: 2 + i]) for i, text in enumerate(make_texts(False, 8))]
    arguments = {**make_settings(1, folder), "per_device_train_batch_size": 8, "learning_rate": 0.5}
    arguments = SFTConfig(**{**arguments, **settings}, bf16=False, loss_type="nll")
    data = make_dataset([{"text": text} for text in texts])
    SFTTrainer(model, args=arguments, train_dataset=data, processing_class=make_tokenizer()).train()
    return {name: weight.detach() for name, weight in model.named_parameters()}, documents


def train_by_trainer(
    folder: Path, collator: Any, attention: str = "sdpa", **settings: Any
) -> tuple[dict[str, Tensor], list[int]]:
    """The weights after three steps of `Trainer` on twelve documents, and the numbers of documents that the first gate
    was given."""
    model, documents = make_llama(), []
    model.set_attn_implementation(attention)
    gate = model.model.layers[0].mlp.moe.gate
    gate.register_forward_hook(lambda module, args, routing: documents.append(count_documents(routing)))
    gen = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 64, (3 + 5 * i % 13,), generator=gen).tolist() for i in range(12)]
    data = [{"input_ids": each, "labels": each} for each in ids]
    arguments = {**make_settings(1, folder), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.5}
    arguments = TrainingArguments(**{**arguments, **settings})
    Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    return {name: weight.detach() for name, weight in model.named_parameters()}, documents


def pad_documents(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids = pad_sequence([torch.tensor(each["input_ids"]) for each in features], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.where(ids > 0, -100)}


TRAINED = {
    "position_ids": (DataCollatorWithFlattening(), {}),
    "eager attention": (DataCollatorWithFlattening(), dict(attention="eager")),
    "all arguments": (DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True), {}),
    "checkpointed": (DataCollatorWithFlattening(), dict(gradient_checkpointing=True)),
    "compiled": (DataCollatorWithFlattening(), dict(torch_compile=True, torch_compile_backend="aot_eager")),
    "both": (
        DataCollatorWithFlattening(),
        dict(gradient_checkpointing=True, torch_compile=True, torch_compile_backend="aot_eager"),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "compiled")) for name in TRAINED]
)
def test_trainer_trains_packed_as_padded(name, tmp_path: Path):
    """Three steps on four documents in a row, each with its own capacity, are those on four padded rows."""
    padded, counts = train_by_trainer(tmp_path, pad_documents)
    assert counts == [4, 4, 4]
    collator, settings = TRAINED[name]
    torch._dynamo.reset()
    packed, found = train_by_trainer(tmp_path, collator, **settings)
    assert set(found) == {4}
    start = make_llama().state_dict()
    for weight_name, weight in padded.items():
        change, difference = weight - start[weight_name], packed[weight_name] - weight
        assert change.norm() > 0, weight_name
        assert difference.norm() < 1e-5 * change.norm(), weight_name  # the loss is float32


def count_documents(routing: Routing) -> int:
    return routing.mask.shape[0] if routing.segments is None else int(routing.segments.num_documents)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_packed_as_padded(tmp_path: Path):
    """A step on eight documents in a row, by either collator, is the step on eight padded rows."""
    pytest.importorskip("trl")
    padded, counts = train_by_sft(tmp_path)
    start = make_llama().float().state_dict()
    assert any((weight - start[name]).abs().max() > 1e-3 for name, weight in padded.items() if "gate" in name)
    packing = {"packing": True, "max_length": 256, "per_device_train_batch_size": 1}
    for settings in ({"padding_free": True, "max_length": None}, packing):
        packed, found = train_by_sft(tmp_path, **settings)
        assert set(found) == set(counts) == {8}  # TRL checkpoints, so gates run twice
        for name, weight in padded.items():
            make.assert_same(packed[name], weight, name, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_packed_rows_of_a_compiled_model():
    model, packed = make_llama().train(), make_packed()
    wanted, loss = run_separately(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(packed["input_ids"], position_ids=packed["position_ids"]).logits[0]
    torch.testing.assert_close(logits, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(aux_loss(model), loss, atol=1e-9, rtol=1e-9)


class PackedLogits(nn.Module):
    """The logits of packed rows, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids, position_ids=position_ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, 0.7])
def test_packed_rows_of_an_exported_model(factor):
    model = make_llama(factor).eval()
    ids, positions = torch.randint(1, 64, (2, 12)), torch.arange(12).expand(2, 12)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(PackedLogits(model), (ids, positions), dynamic_shapes=(dynamic, dynamic)).module()
        packed, (wanted, _) = make_packed(), run_separately(model)
        found = program(packed["input_ids"], packed["position_ids"])
        torch.testing.assert_close(found[0], wanted, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(program(ids, positions), model(ids).logits, atol=1e-9, rtol=1e-9)


def test_statistics_of_a_stock_router_are_by_document():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    model, packed, name = MixtralForCausalLM(config), make_packed(), "model.layers.1.mlp.gate"
    with track_routing(model) as stats:
        model(packed["input_ids"], position_ids=packed["position_ids"])
    documents, alone = make_documents(), []
    with track_routing(model) as separate:
        for ids in documents:
            model(ids.unsqueeze(0))
            alone.append(separate.last(name))
    found = stats.last(name)
    assert found.groups == len(documents)
    assert found.requested.equal(sum(record.requested for record in alone))
    assert found.imbalance == pytest.approx(sum(record.imbalance for record in alone) / len(alone), rel=1e-5)
    assert found.losses["balance"] == pytest.approx(
        sum(record.losses["balance"] for record in alone) / len(alone), rel=1e-5
    )


def test_records_pass_between_a_stock_model_and_its_layers():
    """Each document is a sequence of both."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    stock, packed = MixtralForCausalLM(config).eval(), make_packed()
    converted: Any = from_transformers(copy.deepcopy(stock)).eval()
    given = {name: packed[name] for name in ("input_ids", "position_ids")}
    for model, other in ((stock, converted), (converted, stock)):
        with record_routing(model) as records, torch.no_grad():
            wanted = model(**given).logits
        assert records.lengths(records.layers[0]) == [*LENGTHS]
        with replay_routing(other, records), torch.no_grad():
            torch.testing.assert_close(other(**given).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*requires_grad.*to a scalar:UserWarning")
def test_padding_of_a_collator_is_no_document():
    """TRL pads the packed row for `pad_to_multiple_of`, and passes no mask."""
    trainers = pytest.importorskip("trl.trainer.sft_trainer")
    model, documents = make_llama(None), [{"input_ids": ids.tolist()} for ids in make_documents()]
    results = []
    for multiple in (None, 32):
        collate = trainers.DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=multiple)
        batch = collate(documents)
        assert batch["input_ids"].shape[1] == (multiple or sum(LENGTHS))
        with track_routing(model.train()) as stats:
            model(**batch)
        record = stats.last(stats.layers[0])
        assert (record.tokens, record.groups) == (sum(LENGTHS), len(LENGTHS))
        results.append(aux_loss(model))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_onnxruntime_computes_padded_packed_rows(tmp_path):
    """The padding is found in the graph."""
    onnxruntime = pytest.importorskip("onnxruntime")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_llama(None).float().eval()

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits

    module, ids = Logits().eval(), torch.randint(1, 64, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]])
    ids[0, -3:] = 0
    program: Any = torch.onnx.export(module, (ids, positions), dynamo=True)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), (ids, positions), strict=True)}
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), module(ids, positions), atol=1e-5, rtol=1e-5)


def test_padding_of_packed_rows_is_not_passed_to_layers_without_packing():
    """Each of their rows is one group. With a mask, a caller's own checkpointing would be rejected."""
    model = make_llama(None)
    for layer in model.model.layers:
        layer.mlp.moe.gate = ExpertChoiceGating(SIZES["hidden_size"], 4).double()
    batch = make_packed()
    padded = {name: torch.cat([value, torch.zeros_like(value[:, :3])], dim=1) for name, value in batch.items()}
    padded.pop("labels", None)
    with track_routing(model) as stats:
        model(**padded)
    assert stats.last(stats.layers[0]).tokens == padded["input_ids"].shape[1]

"""Fine-tune an upcycled `transformers` model in the Trainer, with statistics and with LoRA on attention and experts.

    python examples/finetune_trainer.py             # about a minute on two CPU cores
    python examples/finetune_trainer.py --no-lora   # train all weights

This program needs the extra `hf`: `pip install "path/to/clone[hf]"`. To avoid downloads, it uses a small Llama with
random weights, which reads the standard library's source code as bytes. LoRA gains little on random weights; the
example only shows the procedure. To fine-tune your own model, replace `small_llama()` with
`LlamaForCausalLM.from_pretrained(...)`.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mixture_of_experts.huggingface import from_pretrained, log_routing, upcycle

CONTEXT = 64
LOGGED = ("loss", "routing/balance", "routing/max_load", "routing/dead_experts", "routing/entropy", "routing/dropped")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    *files, last = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    data, held_out = make_windows(files, 4 * 8 * arguments.steps), make_windows([last], 64)

    model = small_llama()
    print("experts in", ", ".join(upcycle(model, num_experts=8, k=2)))
    if arguments.lora:
        experts = ["experts.w1", "experts.w3", "experts.w2"]
        attention = ["q_proj", "v_proj"]
        lora = LoraConfig(r=8, target_modules=attention, target_parameters=experts, modules_to_save=["gate"])
        model = get_peft_model(model, lora)
        model.print_trainable_parameters()

    settings = TrainingArguments(
        arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,  # the auxiliary loss is accumulated like the task's loss
        learning_rate=arguments.learning_rate,
        logging_steps=max(1, arguments.steps // 8),
        save_strategy="no",
        report_to=[],  # "tensorboard" and "wandb" also receive the router statistics
        use_cpu=True,
        disable_tqdm=True,
        seed=arguments.seed,
    )
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=held_out)
    callback = log_routing(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    print("step", *(f"{name:>7}" for name in LOGGED))
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"{entry['step']:4}", *(f"{entry[name]:{max(7, len(name))}.3f}" for name in LOGGED))
    assert callback.stats is not None
    print(callback.stats.summary())
    print(f"held-out loss: {before:.3f} before, {after:.3f} after")

    if arguments.lora:
        model = model.merge_and_unload()
    model.save_pretrained(arguments.out / "model")
    again, probe = from_pretrained(arguments.out / "model").eval(), torch.stack([held_out[0]["input_ids"]])
    assert torch.equal(again(probe).logits, model.eval()(probe).logits)
    print(f"saved in {arguments.out / 'model'}, and loaded again by mixture_of_experts.huggingface.from_pretrained")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of four micro-batches")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True, help="train LoRA and gates only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_trainer"))
    return parser.parse_args(argv)


def make_windows(files: Sequence[Path], count: int) -> list[dict[str, Tensor]]:
    """Cut `count` evenly spaced windows from the bytes of the files."""
    text = torch.tensor(list(b"".join(map(Path.read_bytes, files))))
    cut = text.unfold(0, CONTEXT, (len(text) - CONTEXT) // (count - 1))[:count]
    return [{"input_ids": window, "labels": window} for window in cut]


def small_llama() -> LlamaForCausalLM:
    sizes = dict(vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, max_position_embeddings=CONTEXT))


if __name__ == "__main__":
    main()

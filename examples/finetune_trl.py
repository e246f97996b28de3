"""Train an upcycled `transformers` model in TRL: supervised fine-tuning (SFT), then reinforcement learning (GRPO).

    python examples/finetune_trl.py               # less than a minute on one CPU core
    python examples/finetune_trl.py --coef 0      # without the load-balancing loss

This program needs the extra `hf` and TRL: `pip install "path/to/clone[hf]" trl`. To avoid downloads, it uses a small
Llama with random weights and a character tokenizer. The model learns to sort digits, first from solutions and then from
rewards for its own answers. TRL's trainers request `aux_loss` from models with routers, and upcycled models return it.
To train your own model, replace `small_llama()` with `AutoModelForCausalLM.from_pretrained(...)`, and load its
tokenizer.
"""

import argparse
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise SystemExit(f'{error}: this example needs the extra hf and TRL, pip install "path/to/clone[hf]" trl') from None

from mixture_of_experts.huggingface import from_pretrained, log_routing, upcycle

DIGITS = 5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-steps", type=int, default=60)
    parser.add_argument("--grpo-steps", type=int, default=150)
    parser.add_argument("--coef", type=float, default=0.01, help="load-balancing loss coefficient; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_trl"))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    disable_progress_bars()
    solved, new = puzzles(4000, args.seed), puzzles(200, args.seed + 1)
    tokenizer = tokenizer_of_characters()

    model = small_llama(len(tokenizer))
    print("experts in", ", ".join(upcycle(model, num_experts=8, k=2)))
    common: dict[str, Any] = dict(output_dir=str(args.out), router_aux_loss_coef=args.coef, seed=args.seed)
    common |= dict(per_device_train_batch_size=128, use_cpu=True, bf16=False)  # remove both to train on a GPU
    common |= dict(save_strategy="no", report_to=[], disable_tqdm=True)

    every = max(1, args.sft_steps // 5)
    config = SFTConfig(max_steps=args.sft_steps, learning_rate=5e-3, logging_steps=every, **common)
    sft = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(solved), processing_class=tokenizer)
    log_routing(sft)
    run(sft, "mean_token_accuracy", "aux_loss", "routing/balance", "routing/max_load")
    print(f"sorted after SFT: {share_sorted(model, tokenizer, new):.0%}")

    every = max(1, args.grpo_steps // 5)
    common |= dict(num_generations=8, max_completion_length=DIGITS + 1)
    config = GRPOConfig(max_steps=args.grpo_steps, learning_rate=3e-4, logging_steps=every, **common)
    data = Dataset.from_list([{"prompt": row["prompt"], "right": row["completion"]} for row in solved])
    grpo = GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer)
    run(grpo, "reward", "aux_loss")  # without `log_routing`, which would also count each sampled token
    print(f"sorted after GRPO: {share_sorted(model, tokenizer, new):.0%}")

    model.save_pretrained(args.out / "model")
    again, probe = from_pretrained(args.out / "model").eval(), torch.arange(len(tokenizer))[None]
    assert torch.equal(again(probe).logits, model.eval()(probe).logits)
    print(f"saved in {args.out / 'model'}, and loaded again by mixture_of_experts.huggingface.from_pretrained")


def run(trainer: Trainer, *logged: str) -> None:
    """Train, and print the loss and the `logged` metrics."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(
                f"step {entry['step']:4}",
                *(f" {name} {entry[name]:.3f}" for name in ("loss", *logged) if name in entry),
                flush=True,
            )


def puzzles(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    rows = ["".join(draw.choices(string.digits, k=DIGITS)) for _ in range(count)]
    return [{"prompt": f"{row}=", "completion": "".join(sorted(row))} for row in rows]


def reward(completions: list[str], right: list[str], **_: object) -> list[float]:
    return [float(told == digits) for told, digits in zip(completions, right, strict=True)]


def share_sorted(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    asked = tokenizer([row["prompt"] for row in rows], return_tensors="pt", return_token_type_ids=False)
    told = model.eval().generate(**asked, max_new_tokens=DIGITS + 1, do_sample=False)[:, DIGITS + 1 :]
    texts = tokenizer.batch_decode(told, skip_special_tokens=True)
    return sum(text == row["completion"] for text, row in zip(texts, rows, strict=True)) / len(rows)


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "=", *string.digits]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def small_llama(vocabulary: int) -> LlamaForCausalLM:
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    special = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **special))


if __name__ == "__main__":
    main()

"""Upcycle any causal `transformers` model to a mixture, train and save it, and draw which expert computes which token.

    python examples/upcycle_pretrained.py FOLDER_OR_NAME    # ten minutes on two CPU cores with 135 million parameters

This program needs the extras `examples` and `hf`. Each of the last layers gets eight copies of its feed-forward
network, and each token uses two of them. The copies and routers are trained on the source code of Python's standard
library, and the rest of the model is frozen. The page `routing.html` shows the experts' loads over the steps. In the
picture `routing.png`, each token of a text has its expert's color. If you do not have a model, run `python -m
tests.support.pretrained` in a clone, which downloads SmolLM2-135M-Instruct and prints its folder.
"""

import argparse
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixture_of_experts.huggingface
from mixture_of_experts.stats import routing_of, track_routing
from routed_text import draw_text

CONTEXT, BATCH, PROMPT = 128, 4, "def fibonacci(n):"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    *files, last = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    (text, _), (held_out, num_bytes) = make_windows(tokenizer, files, 2000), make_windows(tokenizer, [last], 16)
    dense = bits_per_byte(model, held_out, num_bytes)

    blocks = model.config.get_text_config().num_hidden_layers
    layers = range(blocks - min(args.layers, blocks), blocks)
    names = mixture_of_experts.huggingface.upcycle(model, args.experts, k=2, layers=layers)
    print(f"experts in {', '.join(names)}", flush=True)
    before = bits_per_byte(model, held_out, num_bytes)
    assert math.isclose(before, dense, rel_tol=1e-3), "upcycling changed the model"
    print(f"before: {before:.4f} bits a byte held out, same as dense; {complete(model, tokenizer)!r}", flush=True)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{layer}." for layer in names)))
    with track_routing(model, keep=args.steps) as stats:
        train(model, text, args.steps, args.rate)
    after = bits_per_byte(model, held_out, num_bytes)
    print(f"after:  {after:.4f} bits a byte held out; {complete(model, tokenizer)!r}\n{stats.summary()}")

    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    again = AutoModelForCausalLM.from_pretrained(args.out / "model", trust_remote_code=False)  # like any other model
    probe = held_out[:1]
    assert torch.equal(again(probe).logits, model(probe).logits)
    print(f"saved in {args.out / 'model'}, and loaded again")

    shown = tokenizer(last.read_text()[: args.characters], return_tensors="pt")["input_ids"]
    tokens, routing = [tokenizer.decode(token) for token in shown[0]], routing_of(model, shown)
    stats.report(args.out / "routing.html", name=f"{args.model}, upcycled")
    figure = draw_text(tokens, list(routing.values())[-1])
    figure.savefig(args.out / "routing.png", dpi=110, bbox_inches="tight")
    print(f"wrote {args.out / 'routing.html'} and routing.png, which show the expert of each token")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a causal model", metavar="FOLDER_OR_NAME")
    parser.add_argument("--layers", type=int, default=8, help="number of layers, from the last, that get experts")
    parser.add_argument("--experts", type=int, default=8, help="experts per layer")
    parser.add_argument("--steps", type=int, default=60, help=f"training steps of {BATCH} x {CONTEXT} tokens")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--characters", type=int, default=1200, help="length of the text in the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle_pretrained"))
    return parser.parse_args(argv)


def make_windows(tokenizer: Any, files: Sequence[Path], max_windows: int) -> tuple[Tensor, int]:
    """Return the first windows of the files' tokens, at most `max_windows`, and their size in bytes."""
    text = "".join(file.read_text(encoding="utf-8") for file in files)[: 6 * max_windows * CONTEXT]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    cut = ids[: min(max_windows, len(ids) // CONTEXT) * CONTEXT]
    return cut.view(-1, CONTEXT), len(tokenizer.decode(cut).encode())


def train(model: Any, text: Tensor, steps: int, rate: float) -> None:
    """Train with AdamW, a warm-up of a tenth and a cosine to zero. The model's loss includes the auxiliary loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        tokens = text[torch.randint(len(text), (BATCH,))]
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 6) == 0:
            print(f"  step {step}: loss {loss:.3f}", flush=True)


@torch.no_grad()
def bits_per_byte(model: Any, held_out: Tensor, num_bytes: int) -> float:
    nats = sum(model.eval()(part, labels=part).loss.item() * part.numel() for part in held_out.split(BATCH))
    return nats / math.log(2) / num_bytes


def complete(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.decode(model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)[0])


if __name__ == "__main__":
    main()

"""Runs a saved model in an inference engine and writes its log-probabilities and greedy tokens as JSON.

    ENGINE_PYTHON tests/support/inference_clients.py ENGINE MODEL REQUEST ANSWER

The Python is that of the engine's own environment, so nothing else of this repository is imported. MODEL is a folder
that `save_pretrained` wrote, or a GGUF file for llama.cpp. REQUEST holds `prompts`, lists of token ids, and
`new_tokens`. ANSWER gets, for each prompt, `prefill`: the TOP most likely tokens after each position with their
log-probabilities; and `greedy`: the new tokens.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOP = 20  # the most that vLLM returns by default

Answer = dict[str, Any]


def find_top(logits: Any) -> dict[int, float]:
    """The most likely tokens of one position with their log-probabilities, from its logits as a NumPy array."""
    logits = logits.astype("float64")
    if not math.isfinite(logits.sum()):
        raise ValueError(f"the engine returned {logits}")
    highest = logits.max()
    normalizer = highest + math.log(sum(map(math.exp, (logits - highest).tolist())))
    return {int(token): float(logits[token] - normalizer) for token in logits.argsort()[: -TOP - 1 : -1]}


def run_vllm(model: str, prompts: Sequence[list[int]], new_tokens: int) -> list[Answer]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine: Any = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True)
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, logprobs=TOP, prompt_logprobs=TOP, ignore_eos=True, detokenize=False
    )
    answers = []
    for result in engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling):
        (output,) = result.outputs
        positions = [*result.prompt_logprobs[1:], output.logprobs[0]]  # nothing precedes the first token
        prefill = [{token: entry.logprob for token, entry in position.items()} for position in positions]
        answers.append({"prefill": prefill, "greedy": list(output.token_ids)})
    return answers


def run_mlx(model: str, prompts: Sequence[list[int]], new_tokens: int) -> list[Answer]:
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    loaded, _ = load_model(Path(model))
    answers = []
    for prompt in prompts:
        cache = make_prompt_cache(loaded)
        rows = np.array(loaded(mx.array([prompt]), cache=cache)[0].astype(mx.float32))
        prefill, greedy = [find_top(row) for row in rows], [int(rows[-1].argmax())]
        while len(greedy) < new_tokens:
            greedy.append(int(loaded(mx.array([greedy[-1:]]), cache=cache)[0, -1].argmax()))
        answers.append({"prefill": prefill, "greedy": greedy})
    return answers


def run_llama_cpp(model: str, prompts: Sequence[list[int]], new_tokens: int, cache_type: int = 0) -> list[Answer]:
    """`cache_type` is that of keys and values: 0 for float32, 1 for llama.cpp's default, float16."""
    import numpy as np
    from cyllama.llama.llama_cpp import LlamaBatch, LlamaContext, LlamaContextParams, LlamaModel  # pyright: ignore[reportMissingImports]

    params = LlamaContextParams()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1  # idle threads of its pool spin
    params.type_k = params.type_v = cache_type
    params.flash_attn_type = 0  # its kernels round keys and values to float16

    class Model(LlamaModel):
        """With an attribute that `get_logits_ith` reads and the class lacks."""

        @property
        def n_vocab(self) -> int:
            return self.get_vocab().n_vocab

    loaded = Model(model)
    answers = []
    for prompt in prompts:
        context, batch = LlamaContext(loaded, params), LlamaBatch(n_tokens=256, embd=0, n_seq_max=1)

        def decode(tokens: list[int], position: int, context: Any = context, batch: Any = batch) -> Any:
            batch.reset()
            for i, token in enumerate(tokens):
                batch.add(token, position + i, [0], True)
            context.decode(batch)
            return np.array([context.get_logits_ith(i) for i in range(len(tokens))])

        rows = decode(prompt, 0)
        prefill, greedy = [find_top(row) for row in rows], [int(rows[-1].argmax())]
        while len(greedy) < new_tokens:
            greedy.append(int(decode(greedy[-1:], len(prompt) + len(greedy) - 1)[-1].argmax()))
        answers.append({"prefill": prefill, "greedy": greedy})
    return answers


def run_llama_cpp_by_default(model: str, prompts: Sequence[list[int]], new_tokens: int) -> list[Answer]:
    """With keys and values in float16."""
    return run_llama_cpp(model, prompts, new_tokens, cache_type=1)


ENGINES: Mapping[str, Callable[[str, Sequence[list[int]], int], list[Answer]]] = {
    "vLLM": run_vllm,
    "mlx-lm": run_mlx,
    "llama.cpp": run_llama_cpp,
    "llama.cpp, float16 cache": run_llama_cpp_by_default,
}


def main(engine: str, model: str, request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    answers = ENGINES[engine](model, asked["prompts"], asked["new_tokens"])
    Path(answer).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])

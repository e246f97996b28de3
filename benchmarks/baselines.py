"""Yardsticks: what the layer's arithmetic costs without the layer. They compute no routed output, so none is compared.

e experts, s rows of each, d model dim, h hidden dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.contestants import Contestant, make_function_contestant
from benchmarks.problem import Inputs, Weights, feed_forward, generator, route


def make_leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors if t is not None]


def apply_activation(first: Tensor, gate: Tensor | None) -> Tensor:
    return F.gelu(first) if gate is None else F.silu(first) * gate


def expert_products(slots: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
    """bmm, activation, bmm on slots (e, s, d)."""
    gate = None if w3 is None else torch.bmm(slots, w3)
    return torch.bmm(apply_activation(torch.bmm(slots, w1), gate), w2)


def slots_like(case: Case) -> tuple[Inputs, tuple[int, int, int]]:
    """Filled slots and a gradient for what comes out of them."""
    shape = (case.all_experts, case.rows_per_expert, case.d)
    dtype = getattr(torch, case.dtype)
    slots, grad = (torch.randn(shape, generator=generator(i)).to(dtype) for i in (6, 7))
    return Inputs(slots, grad, 0.0), shape


def products(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The experts' products alone."""
    filled, (e, s, d) = slots_like(case)
    parameters = make_leaves(*(w.view(e, *w.shape[-2:]) for w in (weights.w1, weights.w2, weights.w3) if w is not None))
    note = f"bmm, activation, bmm through autograd on {e} x {s} x {d} slots filled beforehand; all gradients"
    return make_function_contestant(
        "products", case, filled, lambda x: (expert_products(x, *parameters), None), parameters, note=note
    )


def router_and_products(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The gate's product and softmax, and the experts' products."""
    made = products(case, weights, inputs)
    slots, grad = made.inputs[0], slots_like(case)[0].grad
    x, w_gating = make_leaves(inputs.x, weights.w_gating)
    probs_grad = torch.randn(case.b, case.n, case.e, generator=generator(8))

    def step() -> None:
        probs = (x @ w_gating).float().softmax(-1)
        torch.autograd.backward((probs, expert_products(slots, *made.parameters)), (probs_grad, grad))

    note = made.note + "; x · w_gating and its softmax, forward and backward (no top-k)"
    parameters = [*made.parameters, w_gating]
    return Contestant("router + products", step, case, None, [slots, x], parameters, note)


@torch.no_grad()
def roofline(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The least that a layer on `torch.bmm` does in a training step, in memory that is there already.

    t tokens. The router's product and softmax, tokens to slots and back, six products (nine if gated), the
    activation, and all gradients. No choice of experts (where tokens go is drawn beforehand, equally many to each), no
    queues, no losses. New are only the output and the gradients that a step leaves.
    """
    filled, (e, s, d) = slots_like(case)
    experts = [w for w in (weights.w1, weights.w2, weights.w3, weights.w_gating[None]) if w is not None]
    w1, w2, *w3, w_gating = (nn.Parameter(w.flatten(0, -3)) for w in experts)
    x, grad = inputs.x.reshape(-1, d).requires_grad_(), inputs.grad.reshape(-1, d)
    t = len(x)
    token = torch.randint(t, (e * s,), generator=generator(9))
    slot, gate = torch.randint(e * s, (t, case.k), generator=generator(10)), torch.full((t, case.k), 1 / case.k)
    slots, grad_slots, out = filled.x, torch.empty_like(filled.x), torch.empty_like(filled.x)
    pre, up, hidden, grad_hidden, grad_up = (slots.new_empty(e, s, case.h) for _ in range(5))
    probs, grad_probs, product = torch.empty(t, e), torch.randn(t, e, generator=generator(8)), torch.empty(t, e)

    def collect(rows: Tensor) -> Tensor:
        return F.embedding_bag(slot, rows.flatten(0, 1), per_sample_weights=gate, mode="sum")

    def activate() -> None:
        torch.bmm(slots, w1, out=pre)
        if case.gated:
            torch.bmm(slots, w3[0], out=up)
            torch.ops.aten.silu.out(pre, out=hidden).mul_(up)
        else:
            torch.ops.aten.gelu.out(pre, out=hidden)

    def activate_backward() -> None:
        if not case.gated:
            torch.ops.aten.gelu_backward.grad_input(grad_hidden, pre, grad_input=grad_hidden)
            return
        torch.ops.aten.silu.out(pre, out=grad_up).mul_(grad_hidden)
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), pre, grad_input=grad_hidden)
        w3[0].grad = torch.bmm(slots.mT, grad_up)

    @torch.no_grad()
    def step() -> None:
        torch.softmax(torch.mm(x, w_gating[0], out=product), dim=-1, out=probs)
        torch.index_select(x, 0, token, out=slots.view(-1, d))
        activate()
        collect(torch.bmm(hidden, w2, out=out))
        torch.index_select(grad, 0, token, out=out.view(-1, d))
        torch.bmm(out, w2.mT, out=grad_hidden)
        w2.grad = torch.bmm(hidden.mT, out)
        activate_backward()
        w1.grad = torch.bmm(slots.mT, grad_hidden)
        torch.bmm(grad_hidden, w1.mT, out=grad_slots)
        if case.gated:
            grad_slots.baddbmm_(grad_up, w3[0].mT)
        x.grad = collect(grad_slots)
        torch.mul(grad_probs, probs, out=product)
        product.addcmul_(probs, product.sum(-1, keepdim=True), value=-1)
        w_gating.grad = torch.mm(x.T, product)[None]
        x.grad.addmm_(product, w_gating[0].T)

    note = f"router, gathers, {9 if w3 else 6} bmm on {e} x {s} x {d} slots, activation and all gradients, into buffers"
    return Contestant("roofline", step, case, inputs=[x], parameters=[w1, w2, *w3, w_gating], note=note)


def dense(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """One FFN of the same width over the same number of rows."""
    filled, (e, s, d) = slots_like(case)
    flat = Inputs(filled.x.view(e * s, d), filled.grad.view(e * s, d), 0.0)
    first = [w.reshape(e, *w.shape[-2:])[0].T.clone() for w in (weights.w1, weights.w2, weights.w3) if w is not None]
    w1, w2, *w3 = parameters = [nn.Parameter(w) for w in first]

    def forward(x: Tensor) -> tuple[Tensor, None]:
        gate = F.linear(x, w3[0]) if w3 else None
        return F.linear(apply_activation(F.linear(x, w1), gate), w2), None

    note = f"one dense FFN of {e * s} rows through autograd"
    return make_function_contestant("dense", case, flat, forward, parameters, note=note)


def decode_by_hand(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """Decode: the chosen experts of each token, known beforehand, and their weighted sum."""
    choices = route(case, inputs.x.float() @ weights.w_gating.float(), inputs.threshold)
    chosen = choices.expert[:, 0].tolist(), choices.weight[:, 0].tolist()
    w1, w2 = weights.w1.unbind(0), weights.w2.unbind(0)
    w3 = weights.w3.unbind(0) if weights.w3 is not None else [None] * case.e
    tokens = inputs.x.view(case.b, 1, case.d).unbind(0)

    @torch.no_grad()
    def output() -> Tensor:
        return torch.stack(
            [
                sum(g * feed_forward(token, w1[i], w2[i], w3[i]) for i, g in zip(experts, gates, strict=True))
                for token, experts, gates in zip(tokens, *chosen, strict=True)
            ]
        )

    note = "the chosen experts' products and weighted sum; which experts and weights is known beforehand, no router"
    return Contestant("by hand", lambda: (output(), None)[1], case, output, note=note)

"""Yardsticks: what the layer's arithmetic costs without the layer. They compute no routed output, so none is compared.
The last is the layer by hand for two configurations, top-2 with capacity and dropless SwiGLU: it computes the layer,
all rows at once, and is compared.

e experts, s rows of each, d model dim, h hidden dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.contest import Contestant, loaded, of_forward
from benchmarks.problem import Inputs, Weights, feed_forward, generator, route
from mixture_of_experts.dispatch.decision import decision_of, plan_slots_of
from mixture_of_experts.dispatch.routing import Routing
from mixture_of_experts.ops.cpu.batches import Batch
from mixture_of_experts.ops.cpu.fused import plan_chunks


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors if t is not None]


def activated(first: Tensor, gate: Tensor | None) -> Tensor:
    return F.gelu(first) if gate is None else F.silu(first) * gate


def expert_products(slots: Tensor, w1: Tensor, w2: Tensor, w3: Tensor | None = None) -> Tensor:
    """bmm, activation, bmm on slots (e, s, d)."""
    gate = None if w3 is None else torch.bmm(slots, w3)
    return torch.bmm(activated(torch.bmm(slots, w1), gate), w2)


def slots_like(case: Case) -> tuple[Inputs, tuple[int, int, int]]:
    """Filled slots and a gradient for what comes out of them."""
    shape = (case.all_experts, case.rows_per_expert, case.d)
    dtype = getattr(torch, case.dtype)
    slots, grad = (torch.randn(shape, generator=generator(i)).to(dtype) for i in (6, 7))
    return Inputs(slots, grad, 0.0), shape


def products(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The experts' products alone."""
    filled, (e, s, d) = slots_like(case)
    parameters = leaves(*(w.view(e, *w.shape[-2:]) for w in (weights.w1, weights.w2, weights.w3) if w is not None))
    note = f"bmm, activation, bmm through autograd on {e} x {s} x {d} slots filled beforehand; all gradients"
    return of_forward(
        "products", case, filled, lambda x: (expert_products(x, *parameters), None), parameters, note=note
    )


def router_and_products(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
    """The gate's product and softmax, and the experts' products."""
    made = products(case, weights, inputs)
    slots, grad = made.inputs[0], slots_like(case)[0].grad
    x, w_gating = leaves(inputs.x, weights.w_gating)
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
        return F.linear(activated(F.linear(x, w1), gate), w2), None

    note = f"one dense FFN of {e * s} rows through autograd"
    return of_forward("dense", case, flat, forward, parameters, note=note)


def by_hand(case: Case, weights: Weights, inputs: Inputs) -> Contestant:
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


aten = torch.ops.aten


class Where(NamedTuple):
    """Where rows are and what they are of."""

    batches: list[Batch]
    table: Tensor  # (t, k) row of each choice, r where it has none
    token: Tensor  # (r,)
    weight: Tensor  # (r, 1)
    choice_weight: Tensor  # (t, k)
    unused: Tensor  # experts without rows

    def by_weights(self, x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> Tensor:
        for batch in self.batches:
            rows, results, matrices = part_of(x, batch), part_of(out, batch), weight[batch.experts]
            results.baddbmm_(rows, matrices) if add else torch.bmm(rows, matrices, out=results)
        return out

    def by_rows(self, x: Tensor, y: Tensor, like: Tensor) -> Tensor:
        out = torch.empty_like(like)
        for batch in self.batches:
            torch.bmm(part_of(x, batch).mT, part_of(y, batch), out=out[batch.experts])
        return out.index_fill_(0, self.unused, 0)

    def collect(self, rows: Tensor) -> Tensor:
        return F.embedding_bag(self.table, rows, per_sample_weights=self.choice_weight, mode="sum")


def part_of(rows: Tensor, batch: Batch) -> Tensor:
    """A batch's part `(number, width, p)` of all rows."""
    return rows[batch.start : batch.stop].view(batch.number, batch.width, -1)


@torch.no_grad()
def where_of(case: Case, routing: Routing, weight: Tensor) -> Where:
    """With capacity all slots, as one batch; dropless the layer's batches of experts, whose weight is `weight`."""
    if case.capacity is not None:
        where = plan_slots_of(routing)
        rows, unused = case.rows_per_expert, where.row.new_empty(0)
        batches = [Batch(slice(0, case.e), case.e, rows, 0, case.e * rows)]
    else:
        row_bytes = (case.d + (2 if case.gated else 1) * case.h) * weight.element_size()
        where, chunks = plan_chunks(decision_of(routing), case.d * case.h, row_bytes)
        assert where.rows_per_expert is not None
        batches = [batch for chunk in chunks for batch in chunk]
        unused = (where.rows_per_expert == 0).nonzero().flatten()
    table, weights = where.row.view(-1, case.k), where.weight.detach().view(-1, case.k)
    token, row_weight = where.token.clamp(max=where.num_tokens - 1), where.row_weight().unsqueeze(-1)
    return Where(batches, table, token, row_weight, weights, unused)


class Memory(NamedTuple):
    """What a step works in."""

    slots: Tensor  # (r, d)
    out: Tensor  # (r + 1, d); its last row is of the choices that were dropped
    hidden: Tensor  # (r, h)
    grad_hidden: Tensor
    grad_up: Tensor

    @classmethod
    def of(cls, like: Tensor, r: int, d: int, h: int) -> Memory:
        hidden, grad_hidden, grad_up = (like.new_empty(r, h) for _ in range(3))
        out = like.new_empty(r + 1, d)
        out[-1] = 0
        return cls(like.new_empty(r, d), out, hidden, grad_hidden, grad_up)


def whole_batch(case: Case, weights: Weights, inputs: Inputs, ready: bool = True) -> Contestant:
    """The roofline, and all that it leaves out and a layer cannot.

    The gate is this package's, and where dropless the choice of which experts are one product. New memory are the
    output, the gradients and the products that are kept for the backward; a layer of a model cannot have the latter
    before, as every layer keeps its own until its backward. All that a step works in stands ready, which a layer has
    only if it holds that much memory between its steps, or else is new too, once a step.
    """
    module = loaded(case, weights, inputs).train()
    w1, w2, *w3 = (getattr(module.experts, name) for name in ("w1", "w2", "w3")[: 3 if case.gated else 2])
    first, d, h = [w1, *w3], case.d, case.h
    x, grad = inputs.x.detach().requires_grad_(), inputs.grad.reshape(-1, d)
    tokens, one = x.detach().view(-1, d), torch.ones(())
    r = len(where_of(case, module.gate(x), w1).token)
    standing = Memory.of(tokens, r, d, h) if ready else None
    activate, activate_grad = aten.gelu.out, aten.gelu_backward.grad_input
    if case.gated:
        activate, activate_grad = aten.silu.out, aten.silu_backward.grad_input

    def forward(memory: Memory) -> tuple[Routing, Where, list[Tensor], Tensor]:
        slots, out, hidden, *_ = memory
        routing = module.gate(x)
        rows = where_of(case, routing, w1)
        with torch.no_grad():
            torch.index_select(tokens, 0, rows.token, out=slots)
            pre = [rows.by_weights(slots, weight, tokens.new_empty(r, h)) for weight in first]
            activate(pre[0], out=hidden)
            if case.gated:
                hidden.mul_(pre[1])
            rows.by_weights(hidden, w2, out)
            return routing, rows, pre, rows.collect(out).view_as(x)

    @torch.no_grad()
    def backward(memory: Memory, rows: Where, pre: list[Tensor]) -> Tensor:
        """Gradients of all but the gate; returns that of the choices' weights."""
        slots, out, hidden, grad_hidden, grad_up = memory
        grad_slots = out[:r]  # read before the gradients of the slots are written over them
        torch.index_select(grad, 0, rows.token, out=grad_slots)
        rows.by_weights(grad_slots, w2.mT, grad_hidden)
        activate(pre[0], out=hidden)
        if case.gated:
            torch.mul(hidden, grad_hidden, out=grad_up)
            hidden.mul_(pre[1])
        w2.grad = rows.by_rows(hidden, grad_slots.mul_(rows.weight), w2)
        grad_weight = F.pad(hidden.mul_(grad_hidden).sum(dim=-1), (0, 1))[rows.table]
        if case.gated:
            grad_hidden.mul_(pre[1])
        activate_grad(grad_hidden, pre[0], grad_input=grad_hidden)
        slots.mul_(rows.weight)
        for weight, part in zip(first, (grad_hidden, grad_up), strict=False):
            weight.grad = rows.by_rows(slots, part, weight)
            rows.by_weights(part, weight.mT, out, add=weight is not w1)
        x.grad = rows.collect(out).view_as(x)
        return grad_weight

    def step() -> None:
        memory = standing or Memory.of(tokens, r, d, h)
        routing, rows, pre, _ = forward(memory)
        grad_weight = backward(memory, rows, pre)
        aux = module.aux_loss([routing])
        torch.autograd.backward((routing.weight, aux), (grad_weight.view_as(routing.weight), one))

    def output() -> Tensor:
        return forward(standing or Memory.of(tokens, r, d, h))[-1]

    name, place = "whole batch", "buffers that stand ready"
    if not ready:
        name, place = "whole batch in new memory", "buffers that are new in every step"
    note = f"the layer by hand on {r} rows of {d}, working in {place}; this package's gate"
    return Contestant(name, step, case, output, [x], list(module.parameters()), note)

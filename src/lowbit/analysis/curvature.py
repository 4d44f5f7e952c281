"""How much a change of each weight costs: the diagonal of the Fisher matrix, block by block.

For a small change ``d`` of a weight ``W`` the divergence of next-token distributions is, to second order,

    KL(d) = 1/2 E[(sum_ij g_ij d_ij)^2],    g = gradient of log p(tokens drawn from the model) by W

(Amari, Natural Gradient Works Efficiently in Learning, 1998). Rounding errors of different weights are nearly
independent, so the expectation over them leaves the diagonal: ``1/2 sum_ij E[g_ij^2] d_ij^2``. ``g`` is of a whole
sequence: gradients at its tokens add up before they are squared, since all earlier tokens change a later
distribution.

One pass forward keeps every block's input; the pass backward runs each block again and needs the memory of one block,
its gradients and its squares. Rejected: squares of gradients at single tokens, which miss what tokens do together,
and whole gradients of every sequence, which would need the memory of the model for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.finite import is_finite
from lowbit.models.block import Block
from lowbit.models.forward import run
from lowbit.progress import track
from lowbit.runs.streamed_model import StreamedModel


@dataclass(frozen=True)
class Curved:
    """A weight with its curvature.

    Attributes:
        module: full name; of a tied embedding that of the embedding.
        weight: ``(out, in)`` float32.
        curvature: ``E[g^2]`` per token ``(out, in)``, in nats per squared weight.
    """

    module: str
    weight: Tensor
    curvature: Tensor


def curvatures(model: StreamedModel, ids: Tensor, seed: int = 0) -> Iterator[Curved]:
    """Every linear of the blocks, the head and the embedding, from the head back to the embedding.

    Args:
        model: the float model.
        ids: ``(sequences, length)``; a sequence's last position is left out.
        seed: draws the tokens at which gradients are taken.

    Raises:
        LowbitError: gradients are NaN or infinite.
    """
    inputs = _inputs(model, ids)
    tokens = ids[:, 1:].numel()
    head, gradients = _head(model, ids, inputs.pop(), seed)
    if not model.skeleton.tied:
        yield _curved(model.skeleton.architecture.head, _head_weight(model), head, tokens)
    for index in track(range(model.blocks - 1, -1, -1), "gradients of blocks"):
        block = model.block(index)
        squares, gradients = _backward(block, inputs.pop(), gradients)
        for linear, square in squares.items():
            yield _curved(block.full_name(linear), block.weight(linear), square, tokens)
    embedding = _embedding(model, ids, gradients)
    if model.skeleton.tied:
        embedding += head
    weight = model.skeleton.model.get_input_embeddings().weight
    yield _curved(model.skeleton.architecture.embed, weight, embedding, tokens)


def _curved(module: str, weight: Tensor, squares: Tensor, tokens: int) -> Curved:
    if not is_finite(squares):
        raise LowbitError(f"the gradient at {module} is NaN or infinite: give other --data, or --dtype float32")
    return Curved(module, weight.detach().float(), squares / tokens)


def _inputs(model: StreamedModel, ids: Tensor) -> list[Tensor]:
    """The input of every block, and the last one's output, ``(sequences, length, width)`` each."""
    with torch.no_grad():
        out = [model.enter(ids)]
        for index in track(range(model.blocks), "blocks"):
            out += model.through(index, [out[-1]])
    return out


def _head_weight(model: StreamedModel) -> Tensor:
    weight: Tensor = model.skeleton.model.get_submodule(model.skeleton.architecture.head).weight
    return weight


def _head(model: StreamedModel, ids: Tensor, hidden: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Squared gradients of the head ``(vocabulary, in)``, and gradients at the last block's output."""
    head = model.skeleton.model.get_submodule(model.skeleton.architecture.head)
    draw = torch.Generator().manual_seed(seed)
    squares, gradients = torch.zeros_like(_head_weight(model), dtype=torch.float32), torch.empty_like(hidden)
    for row in range(len(ids)):
        seen: list[Tensor] = []
        handle = head.register_forward_hook(lambda module, args, out, seen=seen: seen.extend((args[0], out)))
        x = hidden[row : row + 1].detach().requires_grad_()
        try:
            with torch.enable_grad():
                logits = model.skeleton.logits(ids[row : row + 1].to(x.device), x)[0, :-1].float().log_softmax(-1)
                drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=draw).to(x.device)
                score = logits.gather(-1, drawn).sum()
        finally:
            handle.remove()
        # The last call is the one with the logits; a model may call its head for nothing before.
        inside, out = seen[-2], seen[-1]
        at_hidden, at_out = torch.autograd.grad(score, [x, out])
        gradients[row] = at_hidden[0]
        squares += (at_out[0].float().T @ inside[0].detach().float()).square()
    return squares, gradients


def _backward(block: Block, x: Tensor, gradients: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Squared gradients of the block's linears, summed over sequences, and gradients at its input."""
    names = block.linears()
    squares = {name: torch.zeros_like(block.weight(name), dtype=torch.float32) for name in names}
    before = torch.empty_like(x)
    for row in range(len(x)):
        start = x[row : row + 1].detach().requires_grad_()
        leaves = {f"{name}.weight": block.weight(name).detach().requires_grad_() for name in names}
        with torch.enable_grad():
            out = run(block, start, {**block.params, **leaves})
        found = torch.autograd.grad(out, [start, *leaves.values()], gradients[row : row + 1], allow_unused=True)
        before[row] = 0 if found[0] is None else found[0][0]
        for name, gradient in zip(names, found[1:], strict=True):
            if gradient is not None:  # an expert that no token of this sequence reaches has none
                squares[name] += gradient.float().square()
    return squares, before


def _embedding(model: StreamedModel, ids: Tensor, gradients: Tensor) -> Tensor:
    """Squared gradients of the embedding ``(vocabulary, hidden)``; rows of tokens that do not occur are 0."""
    weight = model.skeleton.model.get_input_embeddings().weight
    squares = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    factor = _embedding_factor(model, ids[:1])
    for row, at_input in zip(ids.to(weight.device), gradients, strict=True):
        tokens, place = row.unique(return_inverse=True)
        sums = torch.zeros(len(tokens), weight.shape[1], device=weight.device)
        sums.index_add_(0, place, factor * at_input[:, : weight.shape[1]].float())
        squares[tokens] += sums.square()
    return squares


def _embedding_factor(model: StreamedModel, ids: Tensor) -> float:
    """By what the model multiplies rows of its embedding on their way to the first block: 1 for most."""
    embedding = model.skeleton.model.get_input_embeddings()
    once = model.enter(ids)
    handle = embedding.register_forward_hook(lambda module, args, out: 2 * out)
    try:
        twice = model.enter(ids)
    finally:
        handle.remove()
    rows = embedding.weight[ids.to(embedding.weight.device)].double()
    change = (twice - once)[..., : rows.shape[-1]].double()
    return float((change * rows).sum() / rows.square().sum().clamp(min=1e-300))

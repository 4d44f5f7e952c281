"""More than scales across a proven edge: a gate beside it, channels that are gathered, constants that are moved.

Each is tried on the layer in float64: channels permuted, mixed behind a norm, or shifted where they are written, and
put back where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.models.architecture import DeclaredEdge, Part, Ref, module_of
from lowbit.models.discovery.capture import output_of
from lowbit.models.discovery.experts import all_experts
from lowbit.models.discovery.fold import axis_of, columns_of, rows_of
from lowbit.models.discovery.proof import SAME, LayerProof, relative
from lowbit.models.discovery.readers import Owners, writing
from lowbit.models.discovery.response import Response
from lowbit.models.discovery.sites import Role, Sites

Change = Callable[[Tensor], Tensor]


def with_properties(edge: DeclaredEdge, proof: LayerProof, responses: Mapping[str, Response]) -> DeclaredEdge:
    """The edge with its ``partner``, ``gathers`` and ``shift``; between queries and keys there is none of them."""
    if edge.kind == "channels":
        edge = replace(edge, partner=partner_of(edge, proof.owners, responses))
    found = properties(edge, proof)
    if found.partner is not None and isinstance(found.src, Part):
        return replace(found, src=replace(found.src, name="up"))
    return found


def properties(edge: DeclaredEdge, proof: LayerProof) -> DeclaredEdge:
    """The edge with ``gathers`` and ``shift`` as the layer shows them, and without a partner that is none."""
    if edge.kind == "qk" or edge.limit == "rotation":
        return edge
    gathers = {"norm": mixes, "channels": permutes}.get(edge.kind, lambda edge, proof: False)(edge, proof)
    shift = edge.power == 1 and not proof.owners[module_of(edge.src)].experts and shifts(edge, proof)
    return replace(edge, partner=edge.partner if gathers else None, gathers=gathers, shift=shift)


def partner_of(edge: DeclaredEdge, owners: Owners, responses: Mapping[str, Response]) -> Ref | None:
    """The rows that change, each, one column that the edge's rows are read by, and that alone: a gate.

    Of experts the first shows it; the permutation of all of them proves it.
    """
    reader = module_of(edge.dst[0])
    columns = columns_of(edge.dst[0], owners[reader])
    for name, response in responses.items():
        strange = response.strange.get(reader)
        if strange is None or owners[name].kind == "norm":
            continue
        found: dict[int, list[int]] = {}
        for row in (strange.sum(1) == 1).nonzero().flatten().tolist():
            if response.refuted[row] == f"the input of {reader}" and row < owners[name].rows:
                found.setdefault(int(strange[row].nonzero()[0]), []).append(row)
        if all(len(found.get(column, [])) == 1 for column in columns):
            return writing(owners[name], [found[column][0] for column in columns], "gate")
    return None


def permutes(edge: DeclaredEdge, proof: LayerProof) -> bool:
    """Whether rows of the source, and of its partner, may be reordered if the readers' columns follow."""
    width = len(rows_of(edge.src, proof.owners[module_of(edge.src)]))
    order = torch.randperm(width, generator=torch.Generator().manual_seed(8))
    params = dict(proof.params)
    for end in (edge.src, *([edge.partner] if edge.partner else [])):
        owner = proof.owners[module_of(end)]
        places = [(owner.weight, axis_of(owner, "rows")), *([(owner.bias, -1)] if owner.bias else [])]
        for name, axis in places:
            params[name] = _reordered(params[name], axis, rows_of(end, owner), order)
    for end in edge.dst:
        owner = proof.owners[module_of(end)]
        columns = columns_of(end, owner)
        params[owner.weight] = _reordered(params[owner.weight], axis_of(owner, "columns"), columns, order)
    return relative(proof.output(params), proof.wanted) < SAME


def _reordered(parameter: Tensor, axis: int, index: list[int], order: Tensor) -> Tensor:
    own = torch.tensor(index)
    return parameter.index_copy(axis, own, parameter.index_select(axis, own[order]))


def mixes(edge: DeclaredEdge, proof: LayerProof) -> bool:
    """Whether any matrix may stand behind the norm if its readers take it back."""
    width = proof.owners[module_of(edge.src)].rows
    if any(not isinstance(end, str) or proof.owners[end].columns != width for end in edge.dst):
        return False
    generator = torch.Generator().manual_seed(9)
    matrix = torch.eye(width, dtype=torch.float64) + torch.randn(width, width, generator=generator).double() / width
    back = torch.linalg.inv(matrix)

    def by(map: Tensor) -> Change:
        return lambda value: (value.unflatten(-1, (-1, width)) @ map.mT).flatten(-2)

    return _unseen(edge, proof, by(matrix), {module_of(end): by(back) for end in edge.dst})


def shifts(edge: DeclaredEdge, proof: LayerProof) -> bool:
    """Whether a constant may be added to the channels if the readers subtract it."""
    owner = proof.owners[module_of(edge.src)]
    rows = rows_of(edge.src, owner)
    constant = torch.randn(len(rows), generator=torch.Generator().manual_seed(10)).double()
    readers: dict[str, Tensor] = {}
    for end in edge.dst:
        name = module_of(end)
        columns = columns_of(end, proof.owners[name])
        spread = constant.view(edge.heads.kv, -1) if edge.heads and edge.kind == "heads" else constant.view(1, -1)
        repeated = spread.repeat_interleave(len(columns) // len(rows), 0).flatten()
        readers.setdefault(name, torch.zeros(proof.owners[name].columns).double())[columns] = -repeated
    added = torch.zeros(owner.rows).double()
    added[rows] = constant

    def by(offset: Tensor) -> Change:
        return lambda value: (value.unflatten(-1, (-1, len(offset))) + offset).flatten(-2)

    return _unseen(edge, proof, by(added), {name: by(offset) for name, offset in readers.items()})


@dataclass
class _Changed:
    """Changes what one owner writes and what others read."""

    writer: str = ""
    write_change: Change = lambda value: value
    reads: Mapping[str, Change] = field(default_factory=dict)

    def write(self, name: str, value: Tensor) -> Tensor:
        return self.write_change(value) if name == self.writer else value

    def read(self, name: str, value: Tensor) -> Tensor:
        return self.reads[name](value) if name in self.reads else value

    def attend(self, module: str, role: Role, value: Tensor) -> None:
        """Nothing to change."""


def _unseen(edge: DeclaredEdge, proof: LayerProof, write: Change, reads: Mapping[str, Change]) -> bool:
    """Whether the layer's output stays."""
    sites = Sites(proof.layer)
    outputs = []
    for listener in (_Changed(), _Changed(module_of(edge.src), write, reads)):
        args, kwargs = proof.call.arguments(1)
        with all_experts(proof.layer):
            outputs.append(output_of(sites.run(listener, args, kwargs)))
    return relative(outputs[1], outputs[0]) < SAME

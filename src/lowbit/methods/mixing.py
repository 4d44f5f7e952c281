"""Where the inputs of linears can be mixed: behind a norm, for all that read it, or on the input of a linear.

Mixing the channels of what a linear reads leaves its function alone whatever they come from, if its weight holds the
inverse: ``x W^T = (x P) (W P^-T)^T``. So every linear is of some site. Behind a norm whose output goes to known
linears alone, one op serves all of them; elsewhere each quantized linear has an op of its own on its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from lowbit.methods.sites import site_name
from lowbit.models.block import Block
from lowbit.models.edges import Edge, Projection
from lowbit.models.equivalence import Params
from lowbit.models.runtime_ops import Clip, RuntimeOp, at_input

MIXED = ("qkv", "heads", "mlp", "channels")


@dataclass(frozen=True)
class MixSite:
    """What reads one tensor whose channels can be mixed.

    Attributes:
        name: ``qkv``: what reads the hidden states before the attention; ``heads``: the attention's output
            projection; ``mlp``: what reads the hidden states before the MLP; ``channels``: the projection behind it.
        places: the names under which runtime ops stand: a norm's, or one for the input of each linear.
        readers: the linears, or of a norm the matrices that read its channels.
        width: the channels.
    """

    name: str
    places: tuple[str, ...]
    readers: tuple[Projection, ...]
    width: int

    @property
    def layer(self) -> int:
        """The index of its layer in the model."""
        return int(self.places[0].partition(".")[0])

    def fold(self, params: Params, by: Callable[[Tensor], Tensor]) -> None:
        """Replace each reader's weight by ``by`` of it, ``(out, width) -> (out, width)``, in its own dtype."""
        for reader in self.readers:
            reader.change_weight(params, lambda weight: by(weight).to(weight.dtype))

    def ops(self, op: RuntimeOp) -> dict[str, RuntimeOp]:
        """The op at every place of the site."""
        return dict.fromkeys(self.places, op)

    def group(self, block: Block) -> int | None:
        """The width of the groups that share a scale in the readers' weights, the smallest; ``None`` without any.

        Groups that do not divide the width, or that are not smaller, are none.
        """
        formats = [block.weight_format(reader.module) for reader in self.readers if reader.module in block.formats]
        found = min((format.group for format in formats if format.group is not None), default=self.width)
        return found if found < self.width and self.width % found == 0 else None


def without_choices(block: Block, sites: Iterable[MixSite]) -> Block:
    """The block without what was chosen for columns that the sites mix.

    Those are the weights' clipping ratios, static ranges of inputs, and ratios and rounding offsets of inputs.
    """
    mixed = {reader.module for site in sites for reader in site.readers}
    clips = {name: pair for name, pair in block.clips.items() if name not in mixed}
    ranges = {name: own for name, own in block.input_qparams.items() if name not in mixed}
    ops = {name: op for name, op in block.ops.items() if name not in mixed or not isinstance(op, Clip)}
    return replace(block, clips=clips, input_qparams=ranges, ops=ops)


def mix_sites(block: Block) -> list[MixSite]:
    """The sites of a block that a quantized linear reads from and that no runtime op mixes yet."""
    sites = list(_behind_norms(block))
    shared = {reader.module for site in sites for reader in site.readers}
    for group in block.linear_groups():
        alone = [name for name in group if name in block.formats and name not in shared]
        alone = [name for name in alone if at_input(name) not in block.ops]
        if alone:
            readers = tuple(Projection(name, range(block.weight(name).shape[0])) for name in alone)
            places, width = tuple(map(at_input, alone)), block.weight(alone[0]).shape[1]
            sites.append(MixSite(_name_of(block, group), places, readers, width))
    return sites


def _behind_norms(block: Block) -> Iterator[MixSite]:
    """Norms without an op behind them whose output is read by linears alone."""
    seen: set[str] = set()
    for edge in block.edges():
        if edge.src.module not in seen and _mixes(block, edge):
            seen.add(edge.src.module)
            yield MixSite(site_name(block, edge), (edge.src.module,), edge.readers, edge.width)


def _mixes(block: Block, edge: Edge) -> bool:
    if edge.kind != "norm" or not edge.gathers or edge.heads is not None or edge.src.module in block.ops:
        return False
    return any(reader.module in block.formats for reader in edge.readers)


def _name_of(block: Block, group: tuple[str, ...]) -> str:
    """The site of linears that share an input: by the edge that ends there, or by where they are in their layer.

    A linear that no edge leads to is before a residual connection if it has as many rows as the layer's last linear,
    and in front of others if it has not; the first that is before one ends the attention.
    """
    ends = {reader.module: edge for edge in block.edges() if edge.kind != "qk" for reader in edge.readers}
    if (edge := next((ends[name] for name in group if name in ends), None)) is not None:
        return site_name(block, edge)
    own = [other for other in block.linear_groups() if other[0].partition(".")[0] == group[0].partition(".")[0]]
    hidden = block.weight(own[-1][-1]).shape[0]
    writes = [other for other in own if len(other) == 1 and block.weight(other[0]).shape[0] == hidden]
    in_front = own.index(group) <= own.index(writes[0]) if writes else True
    if group in writes:
        return "heads" if in_front else "channels"
    return "qkv" if in_front else "mlp"

"""One kind of layer: what it calls, which linears share an input, and the candidates for edges."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lowbit.models.architecture import DeclaredEdge, module_of
from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.heads import heads_edges
from lowbit.models.discovery.qk import qk_edges
from lowbit.models.discovery.readers import channels_edges, norm_edge
from lowbit.models.discovery.response import Response, Trace, respond, stays, trace
from lowbit.models.discovery.sites import Owner, Sites

_KINDS = ("norm", "heads", "channels", "qk")


@dataclass(frozen=True)
class Analysis:
    """What a layer showed.

    Attributes:
        owners: its linears, norms and experts, by name.
        groups, attention, flat, transposed, experts, unseen: as of ``LayerKind``.
        direct: linears whose weight other code reads; they stay float.
        responses: by owner.
        candidates: edges that responses suggest: norms, heads, channels, qk, each in their sources' execution order.
        refuted: other pairs, and why they are none.
    """

    owners: Mapping[str, Owner]
    groups: tuple[tuple[str, ...], ...]
    attention: str | None
    flat: frozenset[str]
    transposed: frozenset[str]
    experts: tuple[str, ...]
    unseen: tuple[str, ...]
    direct: tuple[str, ...]
    responses: Mapping[str, Response]
    candidates: tuple[DeclaredEdge, ...]
    refuted: tuple[tuple[str, str], ...]


def analyse(layer: nn.Module, call: Call, direct: frozenset[str] = frozenset()) -> Analysis:
    """Ask a layer for its structure; it stays as it is.

    Args:
        layer: the layer.
        call: what the model calls it with.
        direct: linears that are not to be quantized, see ``direct_reads``.
    """
    sites = Sites(layer)
    found = trace(sites, call)
    order = list(dict.fromkeys(key[0] for key in found.order if key[1] == "out"))
    responses = {name: respond(sites, call, found, name) for name in order}
    results = list(_candidates(sites, call, found, order, responses))
    read = [key[0] for key in found.order if key[1] == "in"]
    experts = tuple(dict.fromkeys(name for name in read if sites.owners[name].experts))
    groups = _without(_groups(found, sites.owners, experts), direct)
    grouped = {name for group in groups for name in group}
    edges = [_ordered(one, grouped, experts) for one in results if isinstance(one, DeclaredEdge)]
    edges = [edge for edge in edges if not direct.intersection(map(module_of, edge.dst[:1]))]
    return Analysis(
        owners=sites.owners,
        groups=groups,
        attention=_attention(layer, found),
        flat=frozenset(name for name in found.flat & grouped if sites.owners[name].kind == "linear"),
        transposed=frozenset(name for name in grouped if sites.owners[name].transposed),
        experts=experts,
        unseen=tuple(
            name for name, one in sites.owners.items() if one.kind in ("linear", "conv1d") and name not in read
        ),
        direct=tuple(name for name in sites.owners if name in direct),
        responses=responses,
        candidates=tuple(sorted(edges, key=lambda edge: _KINDS.index(edge.kind))),
        refuted=tuple(one for one in results if isinstance(one, tuple)),
    )


def _without(groups: tuple[tuple[str, ...], ...], names: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """The groups without some linears.

    >>> _without((("q", "k"), ("o",)), frozenset({"o", "k"}))
    (('q',),)
    """
    kept = (tuple(name for name in group if name not in names) for group in groups)
    return tuple(group for group in kept if group)


def _ordered(edge: DeclaredEdge, grouped: set[str], experts: tuple[str, ...]) -> DeclaredEdge:
    """The edge with the linears to quantize first among its readers, then experts, then routers."""
    if edge.kind == "qk":
        return edge
    rank = {**dict.fromkeys(experts, 1), **dict.fromkeys(grouped, 0)}
    return replace(edge, dst=tuple(sorted(edge.dst, key=lambda end: rank.get(module_of(end), 2))))


def _candidates(
    sites: Sites, call: Call, found: Trace, order: list[str], responses: Mapping[str, Response]
) -> Iterator[DeclaredEdge | tuple[str, str]]:
    owners = sites.owners
    for name in order:
        owner, response = owners[name], responses[name]
        if owner.kind == "norm":
            edge = norm_edge(owner, response, owners)
            yield edge if isinstance(edge, DeclaredEdge) else (f"norm {name}", edge)
            continue
        values = heads_edges(owner, response, owners)
        yield from values
        own = channels_edges(owner, response, owners, values_too=not values)
        yield from own
        if not values and not own:
            places = dict.fromkeys(where for where in response.refuted if where)
            yield (
                f"channels {name}",
                f"a scale of a channel does not come back at {', '.join(places) or 'any reader'}",
            )
    for attention, (_, shapes) in enumerate(found.attention):
        heads = shapes["q"][:-2].numel()

        def test(factors: Mapping[str, Tensor]) -> Tensor:
            return stays(sites, call, found, factors)

        for edge_or_why in qk_edges(responses, order, owners, attention, heads, test):
            yield (
                edge_or_why
                if isinstance(edge_or_why, DeclaredEdge)
                else (f"qk of attention {attention}", edge_or_why)
            )


def _groups(found: Trace, owners: Mapping[str, Owner], experts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Linears by equal input, compared by value: a view makes a new tensor of the same numbers.

    A router is left out: a linear that reads what experts read and has an output for each.
    """
    groups: list[tuple[Tensor, list[str]]] = []
    for name, value in found.inputs.items():
        flat = value.reshape(-1, value.shape[-1])
        same = next((own for first, own in groups if first.shape == flat.shape and bool((first == flat).all())), None)
        if same is None:
            groups.append((flat, [name]))
        else:
            same.append(name)
    sizes = {owners[name].experts for name in experts}
    kept = []
    for _, names in groups:
        linears = [name for name in names if owners[name].kind in ("linear", "conv1d")]
        linears = [name for name in linears if not (experts and owners[name].rows in sizes)]
        kept.append(tuple(linears))
    return tuple(group for group in kept if group)


def _attention(layer: nn.Module, found: Trace) -> str | None:
    """The module whose attention function comes from transformers' registry."""
    for name, _ in found.attention:
        module = layer.get_submodule(name)
        code = sys.modules[type(module).__module__]
        if hasattr(module, "config") and hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
            return name
    return None

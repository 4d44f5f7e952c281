"""One kind of layer: what it calls, which linears share an input, and the candidates for edges."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lowbit.models.architecture import DeclaredEdge, module_of
from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.heads import heads_edges
from lowbit.models.discovery.listed import listed_in
from lowbit.models.discovery.mixture import Mixture, mixture_in, routers_of, same_values, touches
from lowbit.models.discovery.own_code import OwnCode
from lowbit.models.discovery.qk import qk_edges
from lowbit.models.discovery.readers import channels_edges, norm_edge
from lowbit.models.discovery.response import Response, Trace, respond, stays, trace
from lowbit.models.discovery.result import label
from lowbit.models.discovery.shrink import TOKENS
from lowbit.models.discovery.sites import Owner, Sites
from lowbit.models.listed_experts import ListedExperts

_KINDS = ("norm", "heads", "channels", "qk")


@dataclass(frozen=True)
class Analysis:
    """What a layer showed.

    Attributes:
        owners: its linears, norms and experts, by name.
        groups, attention, flat, transposed, routers: as of ``LayerKind``, but the experts of a mixture are a group
            of one name: ``mixture``, or the list.
        mixture: the module whose experts are run one after the other; ``None``: there is none.
        own_code: how code of the model's own uses their parameters, if it does.
        listed: experts that are modules of their own.
        experts: the parameters of ``mixture``, the input side first.
        kept: parameters of three dimensions that hold experts and stay as they are.
        unseen: linears that no pass calls as such.
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
    routers: frozenset[str]
    mixture: str | None
    own_code: OwnCode | None
    listed: ListedExperts | None
    experts: tuple[str, ...]
    kept: tuple[str, ...]
    unseen: tuple[str, ...]
    direct: tuple[str, ...]
    responses: Mapping[str, Response]
    candidates: tuple[DeclaredEdge, ...]
    refuted: tuple[tuple[str, str], ...]

    @property
    def transposed_stacks(self) -> tuple[str, ...]:
        """Parameters of experts that code of the model's own reads as ``(in, out)``."""
        return self.own_code.parameters if self.own_code is not None and self.own_code.transposed else ()


def analyse(layer: nn.Module, call: Call, direct: frozenset[str] = frozenset()) -> Analysis:
    """Ask a layer for its structure; it stays as it is.

    Args:
        layer: the layer.
        call: what the model calls it with.
        direct: linears that are not to be quantized, see ``direct_reads``.
    """
    mixture = mixture_in(layer, call)
    sites = Sites(layer, mixture.transposed, mixture.routed)
    whole = trace(sites, call)
    listed = listed_in(layer, whole.inputs, TOKENS)
    found = whole if listed is None else whole.without([n for n in sites.owners if n.startswith(f"{listed.module}.")])
    order = list(dict.fromkeys(key[0] for key in found.order if key[1] == "out"))
    responses = {name: respond(sites, call, found, name) for name in order}
    results = list(_candidates(sites, call, found, order, responses))
    read = [key[0] for key in whole.order if key[1] == "in"]
    experts = tuple(dict.fromkeys(name for name in read if name in mixture.parameters))
    routers = routers_of(found.inputs, sites.owners, _counts(sites.owners, (*experts, *mixture.kept), listed))
    inside = {name for name in found.inputs if name in experts or (listed and name.startswith(f"{listed.module}."))}
    own = mixture.module if listed is None else listed.module
    groups = _without(_groups(found, sites.owners, own, inside, routers), direct)
    grouped = {name for group in groups for name in group if name in sites.owners}
    results = [_without_kept(one, mixture) for one in results]
    edges = [_ordered(one, grouped, experts) for one in results if isinstance(one, DeclaredEdge)]
    edges = [edge for edge in edges if not direct.intersection(map(module_of, edge.dst[:1]))]
    return Analysis(
        owners=sites.owners,
        groups=groups,
        attention=_attention(layer, found),
        flat=frozenset(name for name in found.flat & grouped if sites.owners[name].kind == "linear"),
        transposed=frozenset(name for name in grouped if sites.owners[name].transposed),
        routers=routers,
        mixture=mixture.module,
        own_code=mixture.own_code,
        listed=listed,
        experts=experts,
        kept=mixture.kept,
        unseen=tuple(
            name for name, one in sites.owners.items() if one.kind in ("linear", "conv1d") and name not in read
        ),
        direct=tuple(name for name in sites.owners if name in direct),
        responses=responses,
        candidates=tuple(sorted(edges, key=lambda edge: _KINDS.index(edge.kind))),
        refuted=(*(one for one in results if isinstance(one, tuple)), *mixture.why.items()),
    )


def _counts(owners: Mapping[str, Owner], stacks: tuple[str, ...], listed: ListedExperts | None) -> dict[str, int]:
    """Number of experts by what holds them, a parameter or a list; 0: it is not known."""
    found = {name: owners[name].experts if name in owners else 0 for name in stacks}
    return found if listed is None else found | {f"{listed.module}.": listed.count}


def _without_kept(one: DeclaredEdge | tuple[str, str], mixture: Mixture) -> DeclaredEdge | tuple[str, str]:
    """A candidate, or why it is none if one of its ends is a parameter that stays as it is."""
    if isinstance(one, DeclaredEdge) and (end := touches(one, mixture.kept)):
        return label(one), f"{end} stays float"
    return one


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


def _groups(
    found: Trace, owners: Mapping[str, Owner], experts: str | None, inside: set[str], routers: frozenset[str]
) -> tuple[tuple[str, ...], ...]:
    """Linears by equal input, compared by value: a view makes a new tensor of the same numbers.

    A router is alone, and what is ``inside`` the experts of a mixture has its name, ``experts``.
    """
    place = {name: at for at, name in enumerate(found.inputs)}
    groups: list[tuple[Tensor, list[str]]] = []
    for name, value in found.inputs.items():
        if owners[name].kind not in ("linear", "conv1d") or name in routers or name in inside:
            continue
        same = next((own for first, own in groups if same_values(first, value)), None)
        if same is None:
            groups.append((value, [name]))
        else:
            same.append(name)
    alone = [name for name in found.inputs if name in routers]
    first = next((place[name] for name in found.inputs if name in inside), None)
    placed = [(place[names[0]], tuple(names)) for _, names in groups] + [(place[name], (name,)) for name in alone]
    placed += [] if first is None or experts is None else [(first, (experts,))]
    return tuple(group for _, group in sorted(placed))


def _attention(layer: nn.Module, found: Trace) -> str | None:
    """The module whose attention function comes from transformers' registry."""
    for name, _ in found.attention:
        module = layer.get_submodule(name)
        code = sys.modules[type(module).__module__]
        if hasattr(module, "config") and hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
            return name
    return None

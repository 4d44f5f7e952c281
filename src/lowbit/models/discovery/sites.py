"""The places in a layer's forward pass where parameters write channels and read them.

One ``TorchFunctionMode`` around the layer's own code sees every product with a parameter, recognized by identity:
linears, routers that hold a bare matrix, GPT-2's transposed linears and batched products with experts. Norms and
linears with a forward of their own are seen by hooks, experts behind transformers' registry by ``experts``. What
happens at a site is up to a ``Listener``: it may look, and it may return another tensor.

Attention is seen as a product of ``(tokens, width)`` with ``(width, tokens)`` and one of ``(tokens, tokens)`` with
values behind it: models are built with attention written out, and many have code of their own for it.

Computations that a model casts to float32 run in float64, so that what is left of a change is not taken for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from lowbit.models.discovery.shrink import TOKENS
from lowbit.models.expert_views import Product, Views

Kind = Literal["linear", "router", "conv1d", "norm", "experts"]
Role = Literal["q", "k", "v"]
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_BADDBMM = (torch.baddbmm, Tensor.baddbmm)
_SORTS = (torch.sort, Tensor.sort, torch.argsort, Tensor.argsort)


@dataclass(frozen=True)
class Owner:
    """What holds a parameter that writes or reads channels.

    Attributes:
        name: the module; for experts the parameter.
        weight, bias: parameters by name; a bias may be missing.
        transposed: the weight is stored ``(in, out)``.
        experts: number of experts in a 3-D parameter; 0 for others.
        rows, columns: output and input channels (of one expert); a norm's are equal.
    """

    name: str
    kind: Kind
    weight: str
    bias: str | None
    transposed: bool
    experts: int
    rows: int
    columns: int


class Listener(Protocol):
    """What a pass does at the sites."""

    def write(self, name: str, value: Tensor) -> Tensor:
        """Called with the output ``(..., rows)`` of an owner; the result takes its place."""

    def read(self, name: str, value: Tensor) -> Tensor:
        """Called with the input ``(..., columns)`` of an owner; the result takes its place."""

    def attend(self, module: str, role: Role, value: Tensor) -> None:
        """Called with queries and keys, then values: ``(..., tokens, width)``."""


def owners_of(layer: nn.Module, transposed: Collection[str] = ()) -> dict[str, Owner]:
    """Every owner in a layer, by name.

    Args:
        layer: the layer.
        transposed: parameters of experts that code of the model's own reads as ``(in, out)``.
    """
    found: dict[str, Owner] = {}
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if module.__class__.__name__ == "Conv1d":
            continue
        for key, parameter in own.items():
            turned = f"{name}.{key}".lstrip(".") in transposed
            owner = _owner(name, module, key, parameter, own, turned)
            if owner is not None:
                found[owner.name] = owner
    return found


def _owner(
    name: str, module: nn.Module, key: str, parameter: Tensor, own: Mapping[str, Tensor], turned: bool
) -> Owner | None:
    full, bias = f"{name}.{key}".lstrip("."), "bias" if key == "weight" else f"{key}_bias"
    bias_name = (
        f"{name}.{bias}".lstrip(".")
        if bias in own and own[bias].ndim == parameter.ndim - (parameter.ndim > 1)
        else None
    )
    if parameter.ndim == 3:
        transposed = bool(getattr(module, "is_transposed", False)) or turned
        rows, columns = parameter.shape[1:] if not transposed else (parameter.shape[2], parameter.shape[1])
        return Owner(full, "experts", full, bias_name, transposed, parameter.shape[0], rows, columns)
    if key != "weight":
        return None
    if parameter.ndim == 2:
        transposed = isinstance(module, Conv1D)
        kind: Kind = "conv1d" if transposed else "linear" if isinstance(module, nn.Linear) else "router"
        rows, columns = parameter.shape if not transposed else (parameter.shape[1], parameter.shape[0])
        return Owner(name, kind, full, bias_name, transposed, 0, rows, columns)
    if parameter.ndim == 1:
        return Owner(name, "norm", full, bias_name, False, 0, len(parameter), len(parameter))
    return None


class Sites:
    """A layer with its sites, ready to be run under a listener.

    Attributes:
        layer: the decoder layer, which stays as it is.
        owners: by name.
        routed: parameters of experts of which code of the model's own multiplies one expert's matrix with the tokens
            that reach it. Products with others are seen if they are with all experts at once.
    """

    def __init__(self, layer: nn.Module, transposed: Collection[str] = (), routed: Collection[str] = ()) -> None:
        """``transposed``: as for ``owners_of``."""
        self.layer, self.routed = layer, routed
        self.owners = owners_of(layer, transposed)
        self.names = {id(module): name for name, module in layer.named_modules()}

    def run(self, listener: Listener, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the layer returns; nothing stays behind on it."""
        parameters = dict(self.layer.named_parameters())
        by_id = {id(parameters[one.weight]): one for one in self.owners.values() if one.kind != "norm"}
        hooked = {name for name, module in self.layer.named_modules() if _has_forward_of_its_own(module)}
        stack: list[str] = []
        with ExitStack() as exits:
            for name, module in self.layer.named_modules():
                for handle in self._hooks(name, module, listener, stack):
                    exits.callback(handle.remove)
            exits.enter_context(_listening(listener, self.names))
            stacks = {one.weight: parameters[one.weight] for one in self.owners.values() if one.kind == "experts"}
            exits.enter_context(_Mode(listener, self.owners, by_id, Views(stacks), self.routed, hooked, stack))
            with torch.no_grad():
                return self.layer(*args, **kwargs)

    def _hooks(self, name: str, module: nn.Module, listener: Listener, stack: list[str]) -> Iterator[Any]:
        yield module.register_forward_pre_hook(lambda m, args: stack.append(name))
        owner = self.owners.get(name)
        if owner is not None and _has_forward_of_its_own(module):
            yield module.register_forward_pre_hook(lambda m, args: (listener.read(name, args[0]), *args[1:]))
            yield module.register_forward_hook(  # a router may return its scores and what it chose
                lambda m, args, out: listener.write(name, out) if isinstance(out, Tensor) else None
            )
        if owner is not None and owner.kind == "norm":

            def written(m: nn.Module, args: Any, out: Any) -> Any:
                fits = isinstance(out, Tensor) and out.ndim and out.shape[-1] == owner.rows
                return listener.write(name, out) if fits else None

            yield module.register_forward_hook(written)
        yield module.register_forward_hook(lambda m, args, out: _pop(stack))


def _has_forward_of_its_own(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _pop(stack: list[str]) -> None:
    stack.pop()


_CURRENT: list[tuple[Listener, Mapping[int, str]]] = []


@contextmanager
def _listening(listener: Listener, names: Mapping[int, str]) -> Iterator[None]:
    _CURRENT.append((listener, names))
    try:
        yield
    finally:
        _CURRENT.pop()


def current(module: nn.Module) -> tuple[Listener, str]:
    """The listener of the pass that runs, and the name of one of the layer's modules."""
    listener, names = _CURRENT[-1]
    return listener, names[id(module)]


class InFloat64(TorchFunctionMode):
    """Runs in float64 what code casts to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args, kwargs = in_float64(func, args, kwargs)
        return func(*args, **kwargs)


def in_float64(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a function of torch with float64 for each float32 among them."""
    wide = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
    named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
    if (
        func is torch.full and len(args) > 1 and isinstance(args[1], float)
    ):  # float64's least number is none in float32
        named.setdefault("dtype", torch.float64)
    return wide, named


class _Mode(TorchFunctionMode):
    """Sees every call of torch within a layer."""

    def __init__(
        self,
        listener: Listener,
        named: Mapping[str, Owner],
        owners: Mapping[int, Owner],
        views: Views,
        routed: Collection[str],
        hooked: set[str],
        stack: list[str],
    ) -> None:
        super().__init__()
        self.listener, self.owners, self.hooked, self.stack = listener, owners, hooked, stack
        self.named, self.views, self.routed = named, views, routed
        self.scores: tuple[str, Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = in_float64(func, args, kwargs)
        if func is Tensor.float:
            return args[0].double()
        if func in _SORTS:  # tokens that code of the model's own sorts by expert stay in the order of the samples
            return _stably(func, *args, **kwargs)
        product = self.views.product(func, args, kwargs)
        if product is not None and (product.view.batched or product.view.parameter in self.routed):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return self._experts(product, weight)
        if func is F.linear:
            return self._linear(func, args, kwargs)
        if func is torch.addmm and id(args[2]) in self.owners:
            return self._product(self.owners[id(args[2])], args[1], lambda x: func(args[0], x, args[2], **kwargs))
        if func in _MATMULS and isinstance(args[1], Tensor):
            return self._matmul(func, args, kwargs)
        if func in _BADDBMM:
            self._scores(*(args[1:3] if len(args) > 2 else (kwargs["batch1"], kwargs["batch2"])))
        if func is F.scaled_dot_product_attention:
            self._attend(self.stack[-1], args[0], args[1], args[2])
        return func(*args, **kwargs)

    def _linear(self, func: Any, args: Any, kwargs: Any) -> Any:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        owner = self.owners.get(id(weight))
        if owner is None or owner.name in self.hooked:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.pop("input")
        return self._product(owner, x, lambda value: func(value, *args[1:], **kwargs))

    def _product(self, owner: Owner, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        return self.listener.write(owner.name, call(self.listener.read(owner.name, x)))

    def _matmul(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, weight = args[0], args[1]
        if x.ndim >= 3 and weight.ndim >= 3:
            if x.shape[-2:] == (TOKENS, TOKENS) and self.scores and weight.shape[-2] == TOKENS:
                self._attend(*self.scores, weight)
                self.scores = None
            else:
                self._scores(x, weight)
        return func(*args, **kwargs)

    def _experts(self, product: Product, weight: Tensor) -> Tensor:
        """A product with experts: with all of them for all tokens, or with one for those that reach it."""
        owner = self.named[product.view.parameter]
        call = partial(_swapped, product.multiply, weight)
        if product.view.batched:
            return self._batched(owner, product.x, call)
        return self._product(owner, product.x, call)

    def _batched(self, owner: Owner, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Experts ``(experts, tokens, width)`` as tokens of ``experts * width`` channels."""
        experts = x.shape[0]
        # Every expert reads the same tokens: an input channel is that of all experts.
        flat = self.listener.read(owner.name, x.transpose(0, 1).flatten(1))
        out = call(flat.unflatten(1, (experts, -1)).transpose(0, 1))
        written = self.listener.write(owner.name, out.transpose(0, 1).flatten(1))
        return written.unflatten(1, (experts, -1)).transpose(0, 1).contiguous()  # as the product is: code views it

    def _scores(self, x: Tensor, y: Tensor) -> None:
        if x.shape[-2] == TOKENS and y.shape[-1] == TOKENS and x.shape[-1] != TOKENS:
            self.scores = (self.stack[-1], x, y.transpose(-1, -2))

    def _attend(self, module: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.listener.attend(module, "q", query)
        self.listener.attend(module, "k", key)
        self.listener.attend(module, "v", value)


def _stably(func: Any, x: Tensor, dim: int = -1, descending: bool = False, **named: Any) -> Any:
    return func(x, **{"dim": dim, "descending": descending, **named, "stable": True})


def _swapped(multiply: Callable[[Tensor, Tensor], Tensor], weight: Tensor, x: Tensor) -> Tensor:
    return multiply(x, weight)

"""A small random model of a config's class, in float64, and where its decoder layers are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError, one_line
from lowbit.models.build import from_config, is_composite
from lowbit.models.discovery.empty import empty_model
from lowbit.models.discovery.shrink import TOKENS
from lowbit.models.discovery.sites import InFloat64

SPREAD = 1.4  # of a redrawn matrix, times the inverse root of its inputs: activations neither die nor explode


class SmallModel:
    """A model in eval mode whose parameters are all random.

    Attributes:
        model: the library's class.
        blocks: module path of the decoder layers.
        layers: the decoder layers.
        outputs: how many values a layer returns in a tuple; 0: the hidden states as they are.
        embed: module path of the token embedding.
        head: module path of the output head; empty if there is none.
    """

    def __init__(self, config: Any, real: nn.Module, trust_remote_code: bool = False, seed: int = 0) -> None:
        """Build the model of a small config and run it once.

        Args:
            config: small.
            real: the model that it stands for, possibly without memory: its decoder layers are the list that is
                called and has most parameters.
            trust_remote_code: run the model's own code.
            seed: of its parameters.

        Raises:
            LowbitError: the class cannot be built or run at these sizes, or calls no list of layers.
        """
        with with_seed(seed):
            self.model: Any = _built(config, trust_remote_code, seed)
        self.model.eval().double().requires_grad_(False)
        run_eager_experts(self.model)
        redraw(self.model, seed)
        called = self._called_lists(real)
        if not called:
            raise LowbitError(f"{type(self.model).__name__} calls no list of decoder layers")
        self.blocks = called[0]
        self.layers: list[nn.Module] = list(self.model.get_submodule(self.blocks))
        self.embed = self._path(self.model.get_input_embeddings())
        self.head = self._path(self.model.get_output_embeddings())

    @torch.no_grad()
    def logits(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Logits ``(1, TOKENS, vocabulary)``, with some parameters of the model replaced by name."""
        inputs = {"input_ids": token_ids(1), "use_cache": False}
        with InFloat64():
            return torch.func.functional_call(self.model, parameters or {}, args=(), kwargs=inputs).logits

    def _path(self, module: nn.Module | None) -> str:
        return next((name for name, one in self.model.named_modules() if one is module), "")

    @torch.no_grad()
    def _called_lists(self, real: nn.Module) -> list[str]:
        """Module lists with called members, the largest of the real model first; a list within a member is none."""
        calls: dict[str, int] = {}
        tuples: dict[str, int] = {}
        found: list[str] = []
        handles = []
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if not isinstance(module, nn.ModuleList) or inside or not any(True for _ in module.parameters()):
                continue
            found.append(name)
            for layer in module:
                handles.append(layer.register_forward_hook(_counter(calls, tuples, name)))
        try:
            self.logits()
        except Exception as error:  # the model's own code, at sizes of ours
            raise LowbitError(f"the small {type(self.model).__name__} does not run: {one_line(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
        names = sorted(calls, key=lambda name: -sum(p.numel() for p in real.get_submodule(name).parameters()))
        self.outputs = tuples[names[0]] if names else 0
        return names


def _built(config: Any, trust_remote_code: bool, seed: int) -> Any:
    """A model with memory; of one with other parts the text model, since those may have their real sizes."""
    if is_composite(config):
        model = empty_model(config, trust_remote_code)
        materialize(model, seed)
        return model
    try:
        return from_config(config, trust_remote_code, attn_implementation="eager")
    except Exception as error:  # a model's own code
        raise LowbitError(f"no small model of {type(config).__name__}: {one_line(error)}") from error


def token_ids(sequences: int) -> Tensor:
    """Random token ids ``(sequences, TOKENS)``, the same ones in each sequence."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 100, (1, TOKENS), generator=generator).repeat(sequences, 1)


def run_eager_experts(module: nn.Module) -> None:
    """Choose the implementation of experts that takes float64."""
    for one in module.modules():
        if hasattr(one, "is_transposed") and hasattr(one, "config"):
            config: Any = one.config
            config._experts_implementation = "eager"


def _counter(calls: dict[str, int], tuples: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, args: Any, out: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        tuples[name] = len(out) if isinstance(out, tuple | list) else 0

    return count


@contextmanager
def with_seed(seed: int) -> Iterator[None]:
    """Within the context, random numbers start from ``seed``; the global random state is as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def materialize(module: nn.Module, seed: int) -> None:
    """Give a module without memory random parameters in float64; buffers keep their values."""
    for own in module.modules():
        for name, parameter in list(own.named_parameters(recurse=False)):
            if parameter.is_meta:
                start = torch.ones if parameter.ndim < 2 and "norm" in type(own).__name__.lower() else torch.zeros
                own._parameters[name] = nn.Parameter(start(parameter.shape, dtype=torch.float64), requires_grad=False)
    module.double()
    redraw(module, seed)


@torch.no_grad()
def redraw(module: nn.Module, seed: int) -> None:
    """Give every parameter random values: a bias of 0 or a gain of 1 could hide a term that breaks a map.

    Matrices are normal with deviation ``SPREAD / sqrt(inputs)``; vectors keep their values and get 0.3 of noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if parameter.ndim < 2:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise * SPREAD / parameter.shape[-1] ** 0.5)

"""Schemes: the formats of weights, activations, and keys and values, with overrides by module name.

Their names are read in ``scheme_names.py``.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from lowbit.errors import LowbitError, canonical
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.layout import Layout, Stored
from lowbit.quant.layouts import layout_of
from lowbit.quant.runtimes import RUNTIMES, RuntimeInput
from lowbit.quant.static_activations import StaticActs


@dataclass(frozen=True)
class Scheme:
    """The formats of a run.

    Attributes:
        name: the name from which it is parsed.
        weight: format of the blocks' linear weights.
        act: format of those linears' inputs: dynamic, its ranges depend on one token, or static; ``None``: float.
        kv: format of Q, K and V inside the attention, dynamic per token and head; ``None``: float.
        overrides: ``(glob, format)`` pairs over module names such as ``model.layers.3.mlp.down_proj`` or
            ``lm_head``; the first match wins; ``None`` leaves the module in float.
        target: the runtime whose arithmetic is simulated, a name of ``RUNTIMES``; ``None``: the scheme's own. Set
            by ``for_runtime``.
    """

    name: str
    weight: Format
    act: ActFormat | None = None
    kv: IntTokens | None = None
    overrides: tuple[tuple[str, Format | None], ...] = ()
    target: str | None = None

    def override(self, module: str) -> tuple[str, Format | None] | None:
        """The first override that matches a module's full name, or ``None``."""
        names, globs = self._places
        found = [at for at in (names.get(module), self._first(globs, module)) if at is not None]
        return self.overrides[min(found)] if found else None

    @staticmethod
    def _first(globs: Mapping[int, str], module: str) -> int | None:
        return next((at for at, glob in globs.items() if fnmatch.fnmatchcase(module, glob)), None)

    @cached_property
    def _places(self) -> tuple[dict[str, int], dict[int, str]]:
        """Positions of overrides by plain name, the first of each, and the others' globs by position.

        A mixture may have an override for each of tens of thousands of experts' linears.
        """
        names, globs = dict[str, int](), dict[int, str]()
        for at, (glob, _) in enumerate(self.overrides):
            if any(character in glob for character in "*?["):
                globs[at] = glob
            else:
                names.setdefault(glob, at)
        return names, globs

    def module(self, name: str) -> ModuleFormats | None:
        """The formats of a linear inside a block, by its full name; ``None``: it stays float.

        Its input has the scheme's format or, if the scheme has none, that of the target runtime.
        """
        override = self.override(name)
        weight = override[1] if override else self.weight
        if weight is None:
            return None
        if self._has_block_floats:
            weight = stored_as(weight, torch.bfloat16)
        return ModuleFormats(weight, self._input(weight))

    def outside(self, name: str) -> ModuleFormats | None:
        """The formats of a module outside the blocks (embedding, head): float unless an override matches it.

        The head's input is never static: its range would be known only behind the last block, and the head is
        written before the first.
        """
        formats = self.module(name) if self.override(name) else None
        if formats is None:
            return None
        inputs = None if isinstance(formats.input, StaticActs) else formats.input
        return replace(formats, input=inputs, outside=True)

    @cached_property
    def _has_block_floats(self) -> bool:
        """MX or NVFP4 weights: stock decoders of these need a bfloat16 model, which rounds float16 scales."""
        given = (self.weight, *(spec for _, spec in self.overrides))
        return any(isinstance(spec, FloatFormat) and spec.in_blocks for spec in given)

    def _input(self, weight: Format) -> ActFormat | None:
        if self.act is not None:
            return self.act
        quantizes = self.target is not None and RUNTIMES[self.target].round is not None
        return RuntimeInput(str(self.target), weight) if quantizes else None


@dataclass(frozen=True)
class ModuleFormats:
    """The formats of one module.

    Attributes:
        weight: the weight's.
        input: the input's; ``None``: float.
        outside: the module is an embedding or the head.
        expert: it belongs to an expert of a mixture.
        dense: stock ``transformers`` makes the weight dense when it loads it, see ``runs/stock.py``.
    """

    weight: Format
    input: ActFormat | None = None
    outside: bool = False
    expert: bool = False
    dense: bool = False

    @property
    def stated_input(self) -> ActFormat | None:
        """The input's format as a checkpoint states it; a runtime's own quantization of inputs is not stated."""
        return None if isinstance(self.input, RuntimeInput) else self.input

    @property
    def layout(self) -> Layout:
        """How the weight is stored in a run folder."""
        dense = self.dense or self.expert
        return layout_of(self.weight, self.stated_input, outside=self.outside, dense=dense)

    @property
    def input_tensors(self) -> Mapping[str, Stored]:
        """The stored tensors of a static input by their names within the module; none for others."""
        return self.input.tensors if isinstance(self.input, StaticActs) else {}


@dataclass(frozen=True)
class ModelFormats:
    """The formats of a model's modules, resolved from a scheme once, by the plan.

    Attributes:
        modules: formats of the quantized modules by full name.
        kv: format of queries, keys and values inside the attention; ``None``: float.
    """

    modules: Mapping[str, ModuleFormats] = field(default_factory=dict)
    kv: ActFormat | None = None

    def weight(self, module: str) -> Format | None:
        """A module's weight format; ``None``: float."""
        formats = self.modules.get(module)
        return formats.weight if formats else None

    def input(self, module: str) -> ActFormat | None:
        """The format of a module's input; ``None``: float."""
        formats = self.modules.get(module)
        return formats.input if formats else None

    @property
    def layouts(self) -> list[str]:
        """Names of the layouts in which weights are stored, the most common one first."""
        count = Counter(formats.layout.name for formats in self.modules.values())
        return [name for name, _ in count.most_common()]

    @property
    def dense(self) -> bool:
        """Whether stock ``transformers`` makes the weights dense when it loads them."""
        return any(formats.dense for formats in self.modules.values())

    @property
    def weights(self) -> dict[str, Format]:
        """Weight formats by full name."""
        return {name: formats.weight for name, formats in self.modules.items()}


def for_runtime(scheme: Scheme, name: str | None) -> Scheme:
    """``scheme`` for a target runtime: its input quantization and scale dtype; ``None``: unchanged."""
    if name is None:
        return scheme
    name = canonical("runtime", name, RUNTIMES)
    dtype = RUNTIMES[name].scale_dtype
    pairs = tuple((glob, spec and stored_as(spec, dtype)) for glob, spec in scheme.overrides)
    return replace(scheme, weight=stored_as(scheme.weight, dtype), overrides=pairs, target=name)


def stored_as(format: Format, dtype: torch.dtype) -> Format:
    """Integers with scales in a runtime's dtype; other formats say themselves how scales are stored."""
    return replace(format, scale_dtype=dtype) if isinstance(format, IntFormat) else format


def simulated_on(scheme: Scheme | None, name: str | None) -> Scheme | None:
    """A finished run's scheme with the inputs of another runtime, or ``float`` ones; ``None``: unchanged.

    Raises:
        LowbitError: the model is float, or the scheme has its own input format.
    """
    if name is None:
        return scheme
    if scheme is None or scheme.act is not None:
        what = "a float model" if scheme is None else f"scheme {scheme.name}, which has its own input format"
        raise LowbitError(f"--target {name} given: it sets the inputs of a weight-only run, and this is {what}")
    name = canonical("runtime", name, [*RUNTIMES, "float"])
    return replace(scheme, target=None if name == "float" else name)

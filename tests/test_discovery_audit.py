"""Nothing was missed: the scales that a layer's output does not see are those of the edges found, and no more.

Every output channel of every linear and norm gets a factor ``exp(s)``, and so does every input channel of every
linear. The derivative of the layer's output by all ``s`` has a null space: combinations of scales that change
nothing. Each proven edge accounts for as many dimensions as it has scales, each linear without a bias for one more:
its rows times a factor and its columns divided by it are the same matrix.

Example, a layer of a Llama of the small size: two norms of 64 channels, 48 between up and down, 2 x 16 between v and
o, 2 x 8 pairs between q and k, and 7 linears: 231.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from lowbit.models.architecture import DeclaredEdge, module_of
from lowbit.models.discovery.capture import Call, capture, output_of
from lowbit.models.discovery.experts import all_experts
from lowbit.models.discovery.fold import rows_of
from lowbit.models.discovery.prove import Kind, found_in, prove
from lowbit.models.discovery.readers import Owners
from lowbit.models.discovery.response import Trace, by_sample, trace
from lowbit.models.discovery.sites import InFloat64, Role, Sites
from lowbit.models.discovery.small import small_of

STEP = 1e-5  # of the central differences
SAMPLES = 256  # scales in a pass
# A large eps: behind a norm a common scale is invisible but for it, and 1e-6 is near what differences leave.
TYPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8},
    "gemma3_text": {"rms_norm_eps": 0.1},
    "falcon": {},
    "mixtral": {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "norm_eps": 0.1},
}


class Factors:
    """A listener that multiplies one channel of one site in each sample."""

    def __init__(self, found: Trace, factors: dict[tuple[str, str], Tensor]) -> None:
        self.found, self.factors, self.calls = found, factors, dict[tuple[str, str], int]()
        self.samples = len(next(iter(factors.values())))

    def write(self, name: str, value: Tensor) -> Tensor:
        return self._scaled(name, "out", value)

    def read(self, name: str, value: Tensor) -> Tensor:
        return self._scaled(name, "in", value)

    def attend(self, module: str, role: Role, value: Tensor) -> None:
        """Nothing to do."""

    def _scaled(self, name: str, side: str, value: Tensor) -> Tensor:
        call = self.calls.get((name, side), 0)
        self.calls[name, side] = call + 1
        axis = self.found.axes[name, side, call]
        assert axis is not None
        rows, restore = by_sample(value, axis, self.samples)
        factor = self.factors[name, side]
        return restore(rows * factor.view(len(factor), *[1] * (rows.ndim - 2), -1))


def derivative(sites: Sites, call: Call, found: Trace) -> Tensor:
    """The layer's output by all scales: ``(outputs, scales)``."""
    widths = {(name, side): found.shapes[name, side, 0][-1] for name, side, _ in found.order}
    total = sum(widths.values())
    columns = []
    for part in torch.eye(total, dtype=torch.float64).split(SAMPLES):
        outputs = []
        for step in (STEP, -STEP):
            factors = dict(zip(widths, torch.exp(step * part).split(list(widths.values()), 1), strict=True))
            args, kwargs = call.arguments(len(part))
            with all_experts(sites.layer):
                out = output_of(sites.run(Factors(found, factors), args, kwargs))
            assert found.output_axis is not None
            outputs.append(by_sample(out, found.output_axis, len(part))[0].flatten(1))
        columns.append((outputs[0] - outputs[1]) / (2 * STEP))
    return torch.cat(columns).T


def scales_of(edge: DeclaredEdge, owners: Owners) -> int:
    """How many scales an edge moves."""
    owner = owners[module_of(edge.src)]
    width = len(rows_of(edge.src, owner))
    if edge.kind != "qk":
        return width * (owner.experts if owner.experts and edge.kind == "channels" else 1)
    assert edge.heads is not None
    key = len(rows_of(edge.dst[0], owners[module_of(edge.dst[0])]))
    return key // edge.heads.dim * (len(edge.pairs) + len(edge.free))


def trivial(owners: Owners, found: Trace) -> int:
    """One for each matrix without a bias whose rows and columns both have scales; experts read what all share."""
    both = {name for name, side, _ in found.order if side == "in" and (name, "out", 0) in found.order}
    return sum(owners[name].bias is None for name in both if owners[name].kind != "norm")


def audited(kind: Kind, layer: Any, call: Call) -> tuple[int, Tensor]:
    """The dimensions that edges and trivial scales account for, and the singular values of the derivative."""
    sites = Sites(layer)
    found = trace(sites, call)
    # Tokens outnumber channels: with fewer, combinations of scales that change nothing there are no edges.
    whole = torch.cat([derivative(sites, call.redrawn(seed), found) for seed in range(6)])
    peak = whole.abs().amax(0)
    assert bool((peak > 1e-6).all())  # no scale is without any effect
    values = torch.linalg.svdvals(torch.linalg.qr(whole / peak, mode="r").R)
    owners = kind.analysis.owners
    return sum(scales_of(edge, owners) for edge in kind.edges.values()) + trivial(owners, found), values


@pytest.mark.parametrize(
    "type", ["llama", *(pytest.param(name, marks=pytest.mark.heavy) for name in TYPES if name != "llama")]
)
def test_the_null_space_of_all_scales_is_that_of_the_edges(type):
    small = small_of(CONFIG_MAPPING[type](**TYPES[type])).model
    kinds = found_in(small)
    prove(small, kinds)
    with InFloat64():
        calls = capture(small)
    for kind in kinds:
        index = kind.layers[0]
        dimensions, values = audited(kind, small.layers[index], calls[index])
        null, rest = values[-dimensions:], values[:-dimensions]
        assert null.max() < 1e-7 * rest.max()
        assert rest.min() > 1e3 * null.max()
        if type == "llama":
            assert dimensions == 231

"""The interface of a method: ``Block -> Block``, with declarations that the pipeline relies on.

A method is a frozen dataclass of its options. Its class declares six properties; a missing one raises a ``TypeError``
when the class is created:

================== ==============================================================================================
``rounds``         whether it chooses codes for the linears and so is the last of a recipe's block steps
``keeps_function`` whether the block's unquantized function is unchanged
``needs``          the hidden states that it reads: ``none``, ``x_fp``, ``x_q`` or ``both``
``closed_form``    whether it fits weights or codes to the data in closed form; the pipeline then withholds the
                   validation split of a later trained step from it
``moves_norms``    whether it folds maps into norms; then no earlier step may leave a runtime op after a norm, or on
                   the input of a linear
``schedule``       epochs and validation split of a method that trains by gradient descent, else ``None``
================== ==============================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

from lowbit.methods.training import Schedule
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format

Needs = Literal["none", "x_fp", "x_q", "both"]
DECLARED = ("rounds", "keeps_function", "needs", "closed_form", "moves_norms", "schedule")


class Method(ABC):
    """Base class of methods; the module docstring lists the declarations.

    The contract, which tests check for every method: the input block is not modified, exactly the linears with a
    format get codes, equal input gives equal bytes under any global seed, and the output error does not exceed that
    of rounding to nearest.
    """

    rounds: ClassVar[bool]
    keeps_function: ClassVar[bool]
    needs: ClassVar[Needs]
    closed_form: ClassVar[bool]
    moves_norms: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass field without a default is an annotation only.
        missing = [name for name in DECLARED if name not in cls.__dict__]
        if missing:
            raise TypeError(f"{cls.__name__} declares no {', '.join(missing)}: see lowbit.methods.method")

    @property
    @abstractmethod
    def schedule(self) -> Schedule | None:
        """The training schedule, ``None`` for a method without training; a field or a class variable."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Cost in forward passes of a block over the calibration tokens; a backward pass counts as two."""

    def reads_quantized(self, inputs: ActFormat | None) -> bool:
        """Whether it reads the quantized model's hidden states, with its options and this format of inputs.

        Where no step of a recipe does, blocks do not depend on each other.
        """
        return self.needs in ("x_q", "both")

    @abstractmethod
    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """The kinds of runtime ops that it may leave with its options, for linears with this input format."""

    def folded(self) -> Self | None:
        """The step without what stays at run time; ``None`` if nothing else is left of it.

        A method that leaves runtime ops by some of its options turns those off here; one that always leaves them
        stays as it is.
        """
        return self

    def refusal(self, format: Format, columns: int) -> str | None:
        """Why the step quantizes no weight with so many inputs to a format; ``None``: it does, or does not round.

        What is refused here is refused before any work.
        """
        return None

    @abstractmethod
    def __call__(self, block: Block, calib: Calib) -> Block:
        """A transformed, clipped, quantized or corrected copy of ``block``; the argument is not modified."""


NO_OPS: frozenset[type[RuntimeOp]] = frozenset()

"""What a method is: ``Block -> Block``, with everything declared that the pipeline has to know about it.

A method is a frozen dataclass of its options. Six facts are declared in its class, and one that is missing is a
``TypeError`` when the class is made:

================== ==============================================================================================
``rounds``         it chooses codes for the linears, so it ends a recipe's steps on blocks
``keeps_function`` without rounding, the block computes what it computed before
``needs``          the hidden states that it looks at: ``none``, ``x_fp``, ``x_q`` or ``both``
``closed_form``    it fits weights or codes to the data at once; the pipeline keeps the sequences from it that
                   validate a learned step behind it
``moves_norms``    it moves maps over norms, so no step before it may leave a runtime op behind a norm
``schedule``       epochs and validation split of a method that learns by gradient descent, else ``None``
================== ==============================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from lowbit.methods.training import Schedule
from lowbit.models.block import Block, Calib
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

Needs = Literal["none", "x_fp", "x_q", "both"]
DECLARED = ("rounds", "keeps_function", "needs", "closed_form", "moves_norms", "schedule")


class Method(ABC):
    """The contract of a method; see the module for the declared facts.

    The contract tests hold every method to it: the block that is given stays as it is, codes come for exactly the
    linears with a format, the same input gives the same bytes under any global seed, and the output error is not
    above that of rounding to nearest.
    """

    rounds: ClassVar[bool]
    keeps_function: ClassVar[bool]
    needs: ClassVar[Needs]
    closed_form: ClassVar[bool]
    moves_norms: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass's field without a default is an annotation only.
        missing = [name for name in DECLARED if name not in cls.__dict__]
        if missing:
            raise TypeError(f"{cls.__name__} declares no {', '.join(missing)}: see lowbit.methods.method")

    @property
    @abstractmethod
    def schedule(self) -> Schedule | None:
        """How long it learns; ``None`` for a method that does not. A field, or a class variable."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Forward passes of a block over the calibration tokens that it costs, a backward pass counted as two."""

    @abstractmethod
    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """The kinds of runtime ops that it may leave, as its options are, where linears' inputs have this format."""

    @abstractmethod
    def __call__(self, block: Block, calib: Calib) -> Block:
        """``block`` transformed, clipped, rounded or corrected; what was given stays as it is."""


NO_OPS: frozenset[type[RuntimeOp]] = frozenset()

"""Token ids that configs name: which ids end a text, and which one fills a batch."""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError, shown

LARGEST = 1 << 63  # ids are int64


def token_ids(value: Any, field: str) -> list[int]:
    """The ids that a field such as ``eos_token_id`` names: one, several, or none.

    Negative ids, with which some configs say "none", are left out.

    Args:
        value: the field's content, as JSON has it.
        field: its name, for the message.

    Raises:
        LowbitError: it holds anything else than ids.

    >>> token_ids(None, "eos_token_id"), token_ids(2, "eos_token_id"), token_ids([2, -1], "eos_token_id")
    ([], [2], [2])
    """
    given = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or one >= LARGEST for one in given):
        raise LowbitError(
            f"the model's configs have {field} = {shown(value)}: allowed are a token id and a list of them; correct "
            "generation_config.json, or config.json if there is none"
        )
    return [one for one in given if one >= 0]

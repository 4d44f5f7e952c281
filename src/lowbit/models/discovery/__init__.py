"""Structure of a decoder found by its response, and proven: no hand-written family is needed."""

from lowbit.models.discovery.discover import discover
from lowbit.models.discovery.result import Discovery, Finding, Record

__all__ = ["Discovery", "Finding", "Record", "discover"]

"""Structure of a decoder found by its response, and proven: no hand-written family is needed."""

from lowbit.models.discovery.discover import discover

__all__ = ["discover"]

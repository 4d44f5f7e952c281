"""Architectures, decoder blocks as values, and the equivalent transforms between their layers."""

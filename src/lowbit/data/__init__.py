"""Calibration and evaluation text, and the documents of zero-shot tasks."""

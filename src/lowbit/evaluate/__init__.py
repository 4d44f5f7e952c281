"""Measuring a model: functions here take a model and tokens and know nothing of how it was quantized."""

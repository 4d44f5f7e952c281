"""Evaluation of models: perplexity, comparison with the float model, zero-shot tasks, text generation."""

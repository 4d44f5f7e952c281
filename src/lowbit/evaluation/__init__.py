"""Measuring finished models: perplexity, comparison with the float model, zero-shot tasks, generated text."""

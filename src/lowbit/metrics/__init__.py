"""Perplexity, KL divergence, log-likelihoods and lm-eval tasks, computed from logits."""

"""Perplexity, KL divergence, log-likelihoods and lm-eval's tasks, as functions of logits."""

"""Measurements of a checkpoint: perplexity, n-gram baselines, preference, diversity."""

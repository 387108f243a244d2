"""Perplexity by named protocols, recall in synthetic tasks, and diagnostics."""

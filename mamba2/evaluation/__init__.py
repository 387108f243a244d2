"""Perplexity by named protocols."""

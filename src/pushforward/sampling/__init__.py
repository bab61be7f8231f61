"""Samples of posteriors, and whether they are samples of them."""

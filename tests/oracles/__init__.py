"""Oracles: slow and obviously right computations that the fast paths are tested against."""

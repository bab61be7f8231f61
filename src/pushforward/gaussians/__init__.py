"""Gaussian variables through nonlinearities: coefficients, joint laws of pairs, tails."""

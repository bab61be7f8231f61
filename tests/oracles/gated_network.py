"""The gated linear network by enumeration: every pattern of gates, and linear maps of moments."""

from __future__ import annotations

import itertools

import torch


def enumerated_distance(old, new, mean, covariance, gates):
    """``E|dz|^2 / 2`` over independent gates and inputs of a given mean and covariance.

    `old` and `new` are lists of ``(weight, bias)``; `gates` lists of probabilities, one list for
    each hidden layer. For each pattern of gates both networks are affine in the input, and so is
    the difference ``da = gate * (D a + db + W1 da)``.
    """
    sizes = [len(layer) for layer in gates]
    total = torch.zeros((), dtype=torch.float64)
    eye = torch.eye(len(mean), dtype=torch.float64)
    second = covariance + torch.outer(mean, mean)
    moments = torch.zeros(len(mean) + 1, len(mean) + 1, dtype=torch.float64)
    moments[:-1, :-1], moments[:-1, -1], moments[-1, :-1], moments[-1, -1] = second, mean, mean, 1.0
    for pattern in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        parts = torch.tensor(pattern, dtype=torch.float64).split(sizes)
        weight = 1.0
        value = torch.cat([eye, torch.zeros(len(mean), 1, dtype=torch.float64)], 1)  # of [x; 1]
        change = torch.zeros_like(value)
        for layer, ((w0, b0), (w1, b1)) in enumerate(zip(old, new, strict=True)):
            constant = torch.zeros(len(b0), len(mean) + 1, dtype=torch.float64)
            db, own = constant.clone(), constant.clone()
            db[:, -1], own[:, -1] = b1 - b0, b0
            change = (w1 - w0) @ value + db + w1 @ change
            value = w0 @ value + own
            if layer < len(parts):
                gate = parts[layer]
                for open_, p in zip(gate.tolist(), gates[layer], strict=True):
                    weight *= p if open_ else 1 - p
                value, change = gate[:, None] * value, gate[:, None] * change
        total += weight * torch.trace(change @ moments @ change.mT) / 2
    return total


def published_distance(old, new, mean, covariance, gates):
    """The ``determ`` recursion of arXiv 2302.03519's code, written out (without its jitter)."""
    e, d = mean, torch.zeros_like(mean)
    c, v = covariance, torch.zeros_like(covariance)
    for layer, ((w0, b0), (w1, b1)) in enumerate(zip(old, new, strict=True)):
        by = w1 - w0
        d, e = by @ e + (b1 - b0) + w1 @ d, w0 @ e + b0
        v, c = by @ c @ by.mT + w1 @ v @ w1.mT, w0 @ c @ w0.mT
        if layer < len(gates):
            mu = torch.tensor(gates[layer], dtype=torch.float64)
            e, d = mu * e, mu * d
            c, v = torch.outer(mu, mu) * c, torch.outer(mu, mu) * v
    return (d.square().sum() + torch.trace(v)) / 2

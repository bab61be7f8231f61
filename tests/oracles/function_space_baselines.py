"""Quadratics of tiny networks from dense Jacobians, with every sum written out."""

import math

import torch
from torch.func import functional_call, jacrev


def discrepancy(old, new, metric):
    """Of a single row."""
    p, q = torch.softmax(old, 0), torch.softmax(new, 0)
    if metric == "euclidean":
        return sum((b - a) ** 2 for a, b in zip(old, new, strict=True)) / 2
    if metric == "softmax":
        return sum((b - a) ** 2 for a, b in zip(p, q, strict=True)) / 2
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def row_curvature(row, metric):
    """Second derivative of the discrepancy where the rows agree."""
    name = "kl" if metric == "fisher" else metric
    return jacrev(jacrev(lambda new: discrepancy(row, new, name)))(row)


def jacobians(net, x, outputs=None):
    """Outputs ``(N, k)`` and their Jacobians ``(N, k, P)`` in the order of the parameters."""
    tensors = {name: p.detach() for name, p in net.named_parameters()}
    rows, slopes = [], []
    for example in x:

        def row(p, example=example):
            z = functional_call(net, p, (example.unsqueeze(0),)).flatten()
            return z if outputs is None else z[outputs]

        rows.append(row(tensors).detach())
        found = jacrev(row)(tensors)
        slopes.append(torch.cat([found[name].flatten(1) for name in tensors], 1))
    return torch.stack(rows), torch.stack(slopes)


def dense_curvature(net, x, metric, outputs=None):
    """The Gauss-Newton matrix ``(P, P)``: the mean of ``J^T H J``."""
    rows, slopes = jacobians(net, x, outputs)
    terms = [j.T @ row_curvature(z, metric) @ j for z, j in zip(rows, slopes, strict=True)]
    return sum(terms) / len(terms)


def displacement(net, other):
    """All parameters of one network less those of another, in a row."""
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for a, b in pairs])


def exact_distance(net, other, x, metric, outputs=None):
    """The mean over examples, one at a time."""
    total = 0.0
    for example in x:
        old, new = net(example.unsqueeze(0))[0].detach(), other(example.unsqueeze(0))[0].detach()
        if outputs is not None:
            old, new = old[outputs], new[outputs]
        if metric == "fisher":
            total += float((new - old) @ row_curvature(old, metric) @ (new - old)) / 2
        else:
            total += float(discrepancy(old, new, metric))
    return total / len(x)


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def layer_arrays(net, position, x, metric):
    """Of layer ``net[position]`` in a chain: per example ``a_t``, a row a position, and
    ``g_kt = d (H^{1/2} z)_k / d s_t``.
    """
    layer, tail = net[position], net[position + 1 :]
    entering = net[:position](x).detach() if position else x
    inputs, gradients = [], []
    for example in entering:
        s = layer(example.unsqueeze(0)).detach()
        slope = jacrev(lambda s: tail(s.clone()).flatten())(s)[:, 0].detach()  # (K, out, ...)
        root = square_root(row_curvature(tail(s.clone()).flatten().detach(), metric))
        weighted = torch.tensordot(root, slope, dims=1)
        gradients.append(weighted.flatten(2).transpose(1, 2) if s.dim() > 2 else weighted[:, None])
        inputs.append(_patches(layer, example) if s.dim() > 2 else _with_one(example).unsqueeze(0))
    return torch.stack(inputs), torch.stack(gradients)  # (N, T, in), (N, K, T, out)


def _with_one(row):
    return torch.cat([row, torch.ones(1, dtype=row.dtype)])


def _patches(layer, image):
    """What a convolution multiplies its weights with, one row for every output position."""
    (high, wide), (down, right) = layer.kernel_size, layer.stride
    top, left = layer.padding
    channels, height, width = image.shape
    rows = []
    for i in range(math.floor((height + 2 * top - high) / down) + 1):
        for j in range(math.floor((width + 2 * left - wide) / right) + 1):
            row = []
            for c in range(channels):
                for u in range(high):
                    for v in range(wide):
                        y, x = i * down + u - top, j * right + v - left
                        inside = 0 <= y < height and 0 <= x < width
                        row.append(image[c, y, x] if inside else torch.zeros_like(image[0, 0, 0]))
            rows.append(_with_one(torch.stack(row)))
    return torch.stack(rows)


def kronecker_factors(inputs, gradients):
    """``A`` averaged over examples and positions, ``B`` summed over positions."""
    count, positions = inputs.shape[:2]
    a = sum(torch.outer(r, r) for example in inputs for r in example) / (count * positions)
    b = sum(torch.outer(r, r) for example in gradients for row in example for r in row) / count
    return a, b


def corrected_quadratic(inputs, gradients, a, b, matrix):
    """``sum lambda (U_B^T D U_A)^2 / 2`` with lambda the mean square of rotated gradients."""
    u_a, u_b = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
    total = torch.zeros_like(matrix)
    for example, pulled in zip(inputs, gradients, strict=True):
        for row in pulled:
            gradient = sum(torch.outer(g, a_t) for g, a_t in zip(row, example, strict=True))
            total += (u_b.T @ gradient @ u_a) ** 2
    return float((total / len(inputs) * (u_b.T @ matrix @ u_a) ** 2).sum() / 2)

"""Influence the slow way: explicit Jacobians, explicit matrices, explicit minimisation.

One hidden layer of tanh, written out by hand: ``z = W2 tanh(W1 x + b1) + b2``.
"""

import numpy as np
from scipy.optimize import minimize

__all__ = ["TanhNetwork", "gauss_newton", "influence", "retrained"]


class TanhNetwork:
    """Weights ``(W1, b1, W2, b2)`` as one vector, in that order."""

    def __init__(self, inputs, hidden, outputs):
        self.sizes = (inputs, hidden, outputs)

    def parts(self, vector):
        d, h, k = self.sizes
        ends = np.cumsum([h * d, h, k * h, k])
        w1, b1, w2, b2 = np.split(vector, ends[:-1])
        return w1.reshape(h, d), b1, w2.reshape(k, h), b2

    def outputs(self, vector, x):
        w1, b1, w2, b2 = self.parts(vector)
        return w2 @ np.tanh(w1 @ x + b1) + b2

    def jacobian(self, vector, x):
        """``(K, P)``, entry by entry from the formula."""
        _, h, k = self.sizes
        w1, b1, w2, _ = self.parts(vector)
        a = np.tanh(w1 @ x + b1)
        rows = []
        for o in range(k):
            to_hidden = w2[o] * (1 - a**2)
            first = np.concatenate([np.outer(to_hidden, x).ravel(), to_hidden])
            second = np.zeros((k, h))
            second[o] = a
            bias = np.zeros(k)
            bias[o] = 1.0
            rows.append(np.concatenate([first, second.ravel(), bias]))
        return np.array(rows)


def probabilities(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def loss_and_slope(z, y, loss):
    """A loss of one example and its gradient in the outputs."""
    if loss == "squared":
        return 0.5 * ((z - y) ** 2).sum(), z - y
    p = probabilities(z)
    return -np.log(p[y]), p - np.eye(len(z))[y]


def gauss_newton(net, vector, xs, loss):
    """``(P, P)``: the mean of ``J^T H J``."""
    total = 0.0
    for x in xs:
        jacobian, z = net.jacobian(vector, x), net.outputs(vector, x)
        p = probabilities(z)
        middle = np.eye(len(z)) if loss == "squared" else np.diag(p) - np.outer(p, p)
        total = total + jacobian.T @ middle @ jacobian
    return total / len(xs)


def influence(net, vector, xs, queries, examples, loss, damping):
    """``(Q, M)``: the formula with an explicit inverse; ``N`` is ``len(xs)``."""
    matrix = gauss_newton(net, vector, xs, loss) + damping * np.eye(len(vector))
    inverse = np.linalg.inv(matrix)

    def gradient(x, y):
        slope = loss_and_slope(net.outputs(vector, x), y, loss)[1]
        return net.jacobian(vector, x).T @ slope

    asked = np.array([gradient(x, y) for x, y in queries])
    removed = np.array([gradient(x, y) for x, y in examples])
    return asked @ inverse @ removed.T / len(xs)


def retrained(net, start, xs, example, loss, damping):
    """Minimise the proximal objective with the exact distance, all terms written out."""
    x_m, y_m = example
    push = loss_and_slope(net.outputs(start, x_m), y_m, loss)[1]
    before = [net.outputs(start, x) for x in xs]

    def objective(vector):
        value = damping / 2 * ((vector - start) ** 2).sum()
        slope = damping * (vector - start)
        for x, old in zip(xs, before, strict=True):
            new = net.outputs(vector, x)
            if loss == "squared":
                gap, cotangent = 0.5 * ((new - old) ** 2).sum(), new - old
            else:
                p, q = probabilities(old), probabilities(new)
                gap, cotangent = (p * np.log(p / q)).sum(), q - p
            value += gap / len(xs)
            slope = slope + net.jacobian(vector, x).T @ cotangent / len(xs)
        value -= push @ net.outputs(vector, x_m) / len(xs)
        slope = slope - net.jacobian(vector, x_m).T @ push / len(xs)
        return value, slope

    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"gtol": 1e-12, "ftol": 0.0, "maxiter": 20000, "maxfun": 40000},
    )
    return found.x

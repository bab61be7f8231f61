"""The linear model of a network written out: dense Jacobian, dense Hessians, dense everything.

Nothing here knows of the library: Jacobians row by row from `torch.autograd.grad`, curvatures by
differentiating twice, log-densities from `torch.distributions`. Only small problems.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import log, pi

import torch
from scipy.optimize import minimize

LARGEST_EXCESS = 60  # halvings of a Newton step


def gaussian(noise_variance):
    """Log-density of targets ``(N, C)`` summed over everything, for outputs ``(N, C)``."""
    scale = torch.as_tensor(noise_variance, dtype=torch.float64).sqrt()
    return lambda f, y: torch.distributions.Normal(f, scale).log_prob(y).sum()


def categorical(f, y):
    return torch.distributions.Categorical(logits=f).log_prob(y).sum()


def bernoulli(f, y):
    return torch.distributions.Bernoulli(logits=f).log_prob(y).sum()


def poisson(f, y):
    return torch.distributions.Poisson(f.exp()).log_prob(y).sum()


def dense_jacobian(net, inputs, names=None):
    """Outputs ``(N, *event)``, Jacobian ``(N, C, P)`` and trained weights ``(P,)``."""
    everything = dict(net.named_parameters())
    chosen = [everything[name] for name in names or everything]
    outputs = net(inputs)
    rows = []
    for entry in outputs.flatten():
        gradients = torch.autograd.grad(entry, chosen, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradients, chosen, strict=True)
                ]
            )
        )
    jacobian = torch.stack(rows).reshape(len(outputs), -1, len(rows[0]))
    weights = torch.cat([p.detach().flatten() for p in chosen])
    return outputs.detach(), jacobian, weights


@dataclass(frozen=True)
class DenseModel:
    """``h(w) = f + J (s w - trained)`` (affine) or ``J s w``, with ``w ~ N(0, 1 / precision)``."""

    outputs: torch.Tensor  # (N, *event)
    jacobian: torch.Tensor  # (N, C, P)
    trained: torch.Tensor  # (P,)
    targets: torch.Tensor
    log_prob: object  # (outputs (N, *event), targets) -> number
    affine: bool = True
    scale: torch.Tensor | float = 1.0

    @classmethod
    def of(cls, net, inputs, targets, log_prob, *, affine=True, names=None):
        return cls(*dense_jacobian(net, inputs, names), targets, log_prob, affine)

    def g_prior(self):
        """In units of the inverse root of the curvature's diagonal."""
        return replace(self, scale=self.gauss_newton.diagonal().rsqrt())

    @property
    def features(self):
        """``(N C, P)``"""
        return (self.jacobian * self.scale).flatten(0, 1)

    def curvature_at(self, outputs):
        """Negative Hessians of the log-densities in the outputs, ``(N, C, C)``."""
        point = outputs.clone().requires_grad_()
        value = self.log_prob(point, self.targets)
        (score,) = torch.autograd.grad(value, point, create_graph=True)
        # Examples are independent: the gradient of a sum over them holds a row of each Hessian.
        rows = [
            torch.autograd.grad(column.sum(), point, retain_graph=True, allow_unused=True)[0]
            if column.requires_grad
            else torch.zeros_like(point)
            for column in score.flatten(1).T
        ]
        return -torch.stack([row.flatten(1) for row in rows], 1)

    @cached_property
    def gauss_newton(self):
        return self._pulled_back(self.outputs)

    def _pulled_back(self, outputs):
        rows = self.jacobian * self.scale
        return torch.einsum("ncp,ncd,ndq->pq", rows, self.curvature_at(outputs), rows)

    def linear_outputs(self, w):
        start = self.outputs.flatten() - self.jacobian.flatten(0, 1) @ self.trained
        moved = self.features @ w + (start if self.affine else 0.0)
        return moved.reshape(self.outputs.shape)

    def precision_of(self, alpha):
        return torch.as_tensor(alpha, dtype=torch.float64).expand(len(self.trained))

    def log_joint(self, w, alpha):
        penalty = 0.5 * (self.precision_of(alpha) * w * w).sum()
        return self.log_prob(self.linear_outputs(w), self.targets) - penalty

    def mode(self, alpha):
        """Newton's method with the full Hessian and step halving."""
        precision = self.precision_of(alpha)
        w = torch.zeros_like(self.trained)
        for _ in range(100):
            point = w.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_joint(point, alpha), point)
            hessian = self._pulled_back(self.linear_outputs(w)) + torch.diag(precision)
            direction = torch.linalg.solve(hessian, gradient)
            if float(direction @ gradient) < 1e-22:
                break
            step, here = 1.0, self.log_joint(w, alpha)
            for _ in range(LARGEST_EXCESS):
                if self.log_joint(w + step * direction, alpha) >= here:
                    break
                step /= 2
            w = w + step * direction
        return w

    def posterior_precision(self, alpha):
        return self.gauss_newton + torch.diag(self.precision_of(alpha))

    def covariance(self, alpha):
        return torch.linalg.inv(self.posterior_precision(alpha))

    def effective_dimensions(self, alpha):
        """``(H^{-1} M)_pp``, one for each parameter."""
        return (self.covariance(alpha) @ self.gauss_newton).diagonal()

    def spectrum(self, alpha):
        """Eigenvalues of ``H^{-1} M``: each draw's effective dimension is their weighted sum."""
        root = self.precision_of(alpha).rsqrt()
        values = torch.linalg.eigvalsh(root[:, None] * self.gauss_newton * root)
        return values / (values + 1)

    def log_evidence(self, alpha):
        half = self.posterior_precision(alpha).logdet() - self.precision_of(alpha).log().sum()
        return self.log_joint(self.mode(alpha), alpha) - 0.5 * half

    def variance(self, alpha, jacobian):
        """``diag(J H^{-1} J^T)`` for other Jacobians ``(B, C, P)`` in weight space."""
        rows = jacobian * self.scale
        return torch.einsum("bcp,pq,bcq->bc", rows, self.covariance(alpha), rows)


def mackay(model, groups, alpha, *, noise=None, learn_prior=True, rounds=3000):
    """MacKay's fixed point by plain iteration: precisions of the groups and the noise variance.

    `groups` ``(P,)`` numbers the parameters; with `noise` the likelihood is Gaussian.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float64).expand(int(groups.max()) + 1).clone()
    for _ in range(rounds):
        here = model if noise is None else replace(model, log_prob=gaussian(noise))
        w, gamma = here.mode(alpha[groups]), here.effective_dimensions(alpha[groups])
        before = (alpha.clone(), noise)
        if learn_prior:
            zeros = torch.zeros_like(alpha)
            alpha = zeros.index_add(0, groups, gamma) / zeros.index_add(0, groups, w * w)
        if noise is not None:
            residual = (here.targets - here.linear_outputs(w)).square().sum()
            noise = float(residual / (here.targets.numel() - gamma.sum()))
        moved = float((alpha / before[0]).log().abs().max())
        if noise is not None:
            moved = max(moved, abs(log(noise / before[1])))
        if moved < 1e-12:
            break
    return alpha, noise


def gaussian_log_evidence(model, alpha, noise):
    """Log-density of the targets of a regression with the weights integrated out at once."""
    rows, precision = model.features, model.precision_of(alpha)
    covariance = (rows / precision) @ rows.T + noise * torch.eye(len(rows), dtype=torch.float64)
    residual = (model.targets - model.linear_outputs(torch.zeros_like(model.trained))).flatten()
    fit = residual @ torch.linalg.solve(covariance, residual)
    return -0.5 * (fit + covariance.logdet() + len(rows) * log(2 * pi))


def type_two_maximum(model, alpha, noise):
    """One precision and one noise variance at which that is largest, by a general optimiser."""

    def loss(logarithms):
        x = torch.tensor(logarithms, dtype=torch.float64, requires_grad=True)
        value = -gaussian_log_evidence(model, x[0].exp(), x[1].exp())
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.numpy()

    start = torch.tensor([alpha, noise], dtype=torch.float64).log().numpy()
    found = minimize(loss, start, jac=True, method="L-BFGS-B", tol=1e-15, options={"gtol": 1e-10})
    return torch.tensor(found.x).exp()

"""Learning coefficients that are known exactly.

The learning coefficient ``lambda`` of a potential ``K >= 0`` at one of its zeros, and its
multiplicity ``m``, say how fast the volume of small loss shrinks: ``vol(K < t) ~ c t^lambda
(-log t)^(m-1)``. Equivalently ``-lambda`` is the largest pole, of order ``m``, of ``int K(w)^z
dw`` (Watanabe, "Algebraic geometry and statistical learning theory", 2009). A sampler at inverse
temperature ``nbeta`` meets ``lambda - (m - 1) / log(nbeta)`` to leading order, see
`KnownCoefficient.at`; exact values at finite temperature are in ``quadrature.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pushforward.errors import OptionError

__all__ = [
    "KnownCoefficient",
    "cusp",
    "deep_linear",
    "normal_crossing",
    "product_of",
    "reduced_rank_regression",
    "regular",
    "sum_of",
    "sum_of_powers",
    "tanh_network",
    "two_component",
    "two_layer_local",
]


@dataclass(frozen=True)
class KnownCoefficient:
    """A learning coefficient and the order of its pole.

    Parameters
    ----------
    value
        ``lambda``, exact where it is a `Fraction`.
    multiplicity
        ``m``, at least 1.
    """

    value: Fraction | float
    multiplicity: int = 1

    def __post_init__(self) -> None:
        if not (self.value >= 0 and self.multiplicity >= 1):
            raise OptionError(
                f"learning coefficient {self.value} of multiplicity {self.multiplicity}",
                where="KnownCoefficient",
                advice="Neither the coefficient nor the multiplicity less 1 can be negative.",
            )

    def __float__(self) -> float:
        return float(self.value)

    def at(self, nbeta: float) -> float:
        """Its leading finite-temperature value.

        Parameters
        ----------
        nbeta
            Inverse temperature times the number of examples, above 1.

        Returns
        -------
        float
            ``lambda - (m - 1) / log(nbeta)``, from ``Z(b) ~ b^-lambda (log b)^(m-1)``. What comes
            after it is of order ``1 / log(nbeta)^2`` if ``m > 1``, which fades slowly.

        Raises
        ------
        OptionError
            For ``nbeta`` of 1 or less, where the expansion means nothing.
        """
        if not nbeta > 1:
            raise OptionError(
                f"nbeta {nbeta:g}",
                where="KnownCoefficient.at",
                advice="The expansion is for large nbeta; use finite_temperature below.",
            )
        return float(self.value) - (self.multiplicity - 1) / math.log(nbeta)


def regular(num_parameters: int) -> KnownCoefficient:
    """Of a nondegenerate minimum, or of ``d`` directions normal to a manifold of minima.

    Parameters
    ----------
    num_parameters
        ``d``, the rank of the Hessian.

    Returns
    -------
    KnownCoefficient
        ``d / 2``, multiplicity 1.

    Raises
    ------
    OptionError
        For a negative number.
    """
    _check_counts("regular(num_parameters)", (num_parameters,), least=0)
    return KnownCoefficient(Fraction(num_parameters, 2))


def normal_crossing(
    exponents: Sequence[int], prior_exponents: Sequence[int] | None = None
) -> KnownCoefficient:
    """Of ``K = prod w_i^{2 k_i}`` under a prior ``prod |w_i|^{h_i}``, at the origin.

    Parameters
    ----------
    exponents
        ``k_i``, not negative and not all 0.
    prior_exponents
        ``h_i``, not negative; default 0.

    Returns
    -------
    KnownCoefficient
        ``min (h_i + 1) / (2 k_i)`` and the number of variables that attain it.

    Raises
    ------
    OptionError
        For exponents that are negative, all 0, or of two lengths.
    """
    priors = [0] * len(exponents) if prior_exponents is None else list(prior_exponents)
    _check_counts("normal_crossing(exponents)", exponents, least=0)
    _check_counts("normal_crossing(prior_exponents)", priors, least=0)
    if len(priors) != len(exponents) or not any(exponents):
        raise OptionError(
            f"exponents {list(exponents)}, prior exponents {priors}",
            where="normal_crossing",
            advice="Give one of each for every variable, and one positive exponent at least.",
        )
    ratios = [Fraction(h + 1, 2 * k) for k, h in zip(exponents, priors, strict=True) if k > 0]
    return KnownCoefficient(min(ratios), ratios.count(min(ratios)))


def sum_of(*coefficients: KnownCoefficient) -> KnownCoefficient:
    """Of a sum of potentials in disjoint variables.

    Parameters
    ----------
    *coefficients
        Those of the terms.

    Returns
    -------
    KnownCoefficient
        Coefficients add, and so do multiplicities less 1; of nothing: 0, multiplicity 1.
    """
    value = sum((c.value for c in coefficients), start=Fraction(0))
    return KnownCoefficient(value, 1 + sum(c.multiplicity - 1 for c in coefficients))


def product_of(*coefficients: KnownCoefficient) -> KnownCoefficient:
    """Of a product of potentials in disjoint variables.

    Parameters
    ----------
    *coefficients
        Those of the factors, one at least.

    Returns
    -------
    KnownCoefficient
        The least coefficient; multiplicities of those that tie add.

    Raises
    ------
    OptionError
        For an empty product, which has no zero.
    """
    if not coefficients:
        raise OptionError("no factors", where="product_of", advice="Give one at least.")
    least = min(c.value for c in coefficients)
    return KnownCoefficient(least, sum(c.multiplicity for c in coefficients if c.value == least))


def sum_of_powers(exponents: Sequence[int]) -> KnownCoefficient:
    """Of ``K = sum w_i^{2 k_i}`` at the origin.

    Parameters
    ----------
    exponents
        ``k_i``, positive.

    Returns
    -------
    KnownCoefficient
        ``sum 1 / (2 k_i)``, multiplicity 1. The value at finite temperature is the same.

    Raises
    ------
    OptionError
        For exponents below 1.
    """
    _check_counts("sum_of_powers(exponents)", exponents, least=1)
    return sum_of(*(normal_crossing([k]) for k in exponents))


def cusp(first: int = 2, second: int = 3) -> KnownCoefficient:
    """Of ``K = (x^p - y^q)^2`` at the origin.

    Parameters
    ----------
    first, second
        ``p`` and ``q``, positive.

    Returns
    -------
    KnownCoefficient
        ``min(1, 1/p + 1/q) / 2``: half the log canonical threshold of the plane curve.
        Multiplicity 2 for the crossing ``p = q = 2``, otherwise 1.

    Raises
    ------
    OptionError
        For exponents below 1.
    """
    _check_counts("cusp", (first, second), least=1)
    threshold = min(Fraction(1), Fraction(1, first) + Fraction(1, second))
    return KnownCoefficient(threshold / 2, 2 if first == second == 2 else 1)


def two_component(first: int, second: int, *, at_origin: bool) -> KnownCoefficient:
    """Of ``K = (w1 - 1)^{2 k1} (w1^2 + w2^2)^{2 k2}``, zero on a line and at a point.

    Parameters
    ----------
    first, second
        ``k1`` and ``k2``, positive.
    at_origin
        Whether at the origin or on the line ``w1 = 1``.

    Returns
    -------
    KnownCoefficient
        ``1 / (2 k2)`` at the origin, ``1 / (2 k1)`` on the line; multiplicity 1.

    Raises
    ------
    OptionError
        For exponents below 1.
    """
    _check_counts("two_component", (first, second), least=1)
    return KnownCoefficient(Fraction(1, 2 * (second if at_origin else first)))


def tanh_network(hidden: int) -> KnownCoefficient:
    """Of ``sum_h a_h tanh(b_h x)``, one input and one output, where the truth is zero.

    Parameters
    ----------
    hidden
        ``H``, the number of hidden units, positive.

    Returns
    -------
    KnownCoefficient
        ``(H + i^2 + i) / (4 i + 2)`` with ``i = floor(sqrt(H))``; multiplicity 2 where ``H`` is a
        square, otherwise 1 (Aoyagi and Watanabe, 2005). The global coefficient, that of all
        weights zero.

    Raises
    ------
    OptionError
        For no hidden units.
    """
    _check_counts("tanh_network(hidden)", (hidden,), least=1)
    i = math.isqrt(hidden)
    return KnownCoefficient(Fraction(hidden + i * i + i, 4 * i + 2), 2 if i * i == hidden else 1)


def reduced_rank_regression(inputs: int, hidden: int, outputs: int, rank: int) -> KnownCoefficient:
    """Of ``|B A - T|^2``, two linear layers, at the worst point of ``B A = T``.

    Parameters
    ----------
    inputs, hidden, outputs
        ``m``, ``h`` and ``n``: ``A`` is ``(h, m)`` and ``B`` is ``(n, h)``.
    rank
        Rank of ``T``.

    Returns
    -------
    KnownCoefficient
        Aoyagi and Watanabe, "Stochastic complexities of reduced rank regression in Bayesian
        estimation" (2005). Global: see `two_layer_local` for any other point.

    Raises
    ------
    OptionError
        For widths below 1 or a rank that does not pass through them.
    """
    _check_widths("reduced_rank_regression", (inputs, hidden, outputs), rank)
    m, h, n, r = inputs, hidden, outputs, rank
    if m + h < n + r:
        return KnownCoefficient(Fraction(h * m - h * r + n * r, 2))
    if n + h < m + r:
        return KnownCoefficient(Fraction(h * n - h * r + m * r, 2))
    if m + n < h + r:
        return KnownCoefficient(Fraction(m * n, 2))
    odd = (m + h + n + r) % 2
    numerator = 2 * (h + r) * (m + n) + 2 * m * n - (h + r) ** 2 - m * m - n * n
    return KnownCoefficient(Fraction(numerator + odd, 8), 1 + odd)


def deep_linear(widths: Sequence[int], rank: int) -> KnownCoefficient:
    """Of ``|W_L ... W_1 - T|^2`` at the worst point of the fibre over ``T``.

    The *global* learning coefficient of a deep linear network; at a given point of the fibre the
    local one can be larger, see ``deep_linear_local``. The law of the inputs and the noise do not
    matter as long as the covariance of the inputs has full rank.

    Parameters
    ----------
    widths
        ``H_1, ..., H_{L+1}`` from the inputs to the outputs.
    rank
        ``r``, the rank of ``T``.

    Returns
    -------
    KnownCoefficient
        Aoyagi, "Consideration on the learning efficiency of multiple-layered neural networks with
        linear units" (2023). In terms of the ``l + 1`` smallest of ``M_s = H_s - r``, ``S`` their
        sum, ``M = ceil(S / l)`` and ``a = S - (M - 1) l``:
        ``[r (H_1 + H_{L+1}) - r^2]/2 + a (l - a)/(4 l) - (l - 1) S^2/(4 l) + sum_{i<j} M_i M_j/2``,
        multiplicity ``a (l - a) + 1``.

    Raises
    ------
    OptionError
        For fewer than two widths, widths below 1, or a rank that does not pass through them.
    """
    _check_widths("deep_linear", widths, rank)
    return _deep_linear(widths, rank)


def two_layer_local(
    widths: tuple[int, int, int], rank_first: int, rank_second: int, rank_product: int
) -> KnownCoefficient:
    """Of ``|B A - B0 A0|^2`` at ``(A0, B0)``, two linear layers.

    Coordinates in which ``A0`` and ``B0`` are diagonal split off the directions that enter
    linearly; the zero point of a smaller reduced rank regression remains.

    Parameters
    ----------
    widths
        Inputs ``m``, hidden ``h`` and outputs ``n``.
    rank_first, rank_second, rank_product
        Ranks ``a`` of ``A0``, ``b`` of ``B0`` and ``r`` of ``B0 A0``.

    Returns
    -------
    KnownCoefficient
        ``(n a + b (m - a))/2`` plus that of reduced rank regression with widths ``m - a``,
        ``h - a - b + r``, ``n - b`` and rank 0, which is 0 if one of them is.

    Raises
    ------
    OptionError
        For widths below 1 or ranks that no two matrices have.
    """
    _check_widths("two_layer_local", widths, rank_product)
    m, h, n = widths
    a, b, r = rank_first, rank_second, rank_product
    if not (r <= a <= min(m, h) and r <= b <= min(h, n) and a + b - h <= r):
        raise OptionError(
            f"ranks {a}, {b} and {r} of the product with widths {tuple(widths)}",
            where="two_layer_local",
            advice="The rank of a product is at least a + b - h and at most a and b.",
        )
    rest = (m - a, h - a - b + r, n - b)
    return sum_of(regular(n * a + b * (m - a)), _deep_linear(rest, 0))


def _deep_linear(widths: Sequence[int], rank: int) -> KnownCoefficient:
    """Aoyagi's formula; widths may be zero here, the coefficient then belongs to no weights."""
    excess = sorted(width - rank for width in widths)
    # The conditions on S hold for exactly one number of widths: sum - l max decreases with l.
    depth = max(l for l in range(1, len(excess)) if sum(excess[: l + 1]) >= l * excess[l] or l == 1)
    chosen = excess[: depth + 1]
    total = sum(chosen)
    ceiling = -(-total // depth)
    a = total - (ceiling - 1) * depth
    pairs = Fraction(total**2 - sum(x * x for x in chosen), 4)
    corner = Fraction(a * (depth - a) - (depth - 1) * total**2, 4 * depth)
    value = Fraction(rank * (widths[0] + widths[-1] - rank), 2) + corner + pairs
    return KnownCoefficient(value, a * (depth - a) + 1)


def _check_counts(where: str, counts: Sequence[int], least: int) -> None:
    if any(count != int(count) or count < least for count in counts):
        raise OptionError(
            f"{list(counts)}", where=where, advice=f"Use whole numbers of {least} at least."
        )


def _check_widths(where: str, widths: Sequence[int], rank: int) -> None:
    """Two widths at least, positive, and a rank that fits through the narrowest."""
    _check_counts(f"{where}(widths)", widths, least=1)
    if len(widths) < 2 or not 0 <= rank <= min(widths):
        raise OptionError(
            f"widths {list(widths)} with rank {rank}",
            where=where,
            advice="Give two widths at least, and a rank from 0 to the smallest of them.",
        )

"""How much of a coefficient is the spring's, against formulas for a quadratic loss."""

import pytest
import torch

import pushforward as pf
from pushforward.degeneracy.evidence import quadratic_answer
from pushforward.degeneracy.settings import Settings

F64 = torch.float64
SCALES = torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=F64)


def squared_error(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(-1)


def problem():
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(50, 4, dtype=F64))[0] * 50**0.5 * SCALES
    line = torch.nn.Linear(4, 1, bias=False).double().eval()
    return line, (x, line(x).detach())


def exact(localization, nbeta):
    """Derivative by ln gamma of 1/2 sum nb h / (nb h + gamma)."""
    curvatures = nbeta * SCALES.square()
    return float(-0.5 * (curvatures * localization / (curvatures + localization) ** 2).sum())


@pytest.mark.statistical
@pytest.mark.parametrize("localization", [0.5, 1000.0])
def test_fluctuations_and_curvatures_give_the_derivative(localization):
    net, data = problem()
    found = pf.learning_coefficient(
        net, data, squared_error, localization=localization, num_draws=400, seed=1
    )
    effect, truth = found.localization_effect, exact(localization, found.nbeta)
    assert abs(effect.value - truth) < 4 * effect.standard_error + 1e-3
    settings = Settings(localization=localization)
    around = settings.neighbourhood(net, data, squared_error, subset=None, realisable=False, seed=0)
    value, slope = quadratic_answer(around, 0)
    assert slope.value == pytest.approx(truth, abs=4 * slope.standard_error + 1e-9)
    assert value.value == pytest.approx(float(found), rel=0.3)
    (check,) = [check for check in found.checks if check.name == "localization"]
    assert check.status == ("warn" if localization == 1000.0 else "pass")

"""Known answers for R-hat, effective draws and standard errors, and what is made of them."""

import json
import math

import pytest
import torch

from pushforward.sampling.diagnostics import (
    Diagnosis,
    Quantity,
    diagnose,
    diagnostic_checks,
    looked_at,
)

F64 = torch.float64
CHAINS, DRAWS = 4, 1000


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CHAINS, DRAWS, *shape, generator=generator, dtype=F64)


def autoregressive(correlation, seed=0):
    noise = normals(seed=seed) * (1 - correlation**2) ** 0.5
    values = [normals(seed=seed + 1)[:, 0]]
    for step in range(1, DRAWS):
        values.append(correlation * values[-1] + noise[:, step])
    return torch.stack(values, 1)


def quantity_of(values):
    return diagnose({"x": values}, {}, {})["x"]


def split_r_hat(values):
    """Rank-normalised split R-hat of one component: Vehtari et al. 2021, sections 3.1 and 4.1."""
    from scipy.stats import norm, rankdata

    def plain(chains):
        count = chains.shape[1]
        within = chains.var(1).mean()
        between = chains.mean(1).var()
        return math.sqrt(((count - 1) / count * within + between) / within)

    half = values.shape[1] // 2
    halves = torch.cat([values[:, :half], values[:, -half:]])
    folded = (halves - halves.median()).abs()

    def ranked(chains):
        ranks = rankdata(chains.numpy(), method="average").reshape(chains.shape)
        return torch.from_numpy(norm.ppf((ranks - 0.375) / (ranks.size + 0.25)))

    return max(plain(ranked(halves)), plain(ranked(folded)))


def test_r_hat_is_that_of_its_formula():
    values = torch.stack([autoregressive(r, seed=i) for i, r in enumerate((0.0, 0.9, 0.99))], -1)
    values[..., 1] = values[..., 1].exp()
    values[0, :, 2] *= 3.0  # the same centre, another width
    found = quantity_of(values).r_hat
    expected = [split_r_hat(values[..., i].contiguous()) for i in range(3)]
    # The median of an even number of draws is another one there.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-4, atol=0)
    assert found[0] < 1.005
    assert found[2] > 1.05


@pytest.mark.statistical
def test_independent_draws():
    quantity = quantity_of(normals(50))
    assert quantity.r_hat.max() < 1.01
    # The estimate is itself noisy, by some per cent.
    assert (quantity.ess_bulk / (CHAINS * DRAWS)).log().abs().max() < 0.25
    assert (quantity.ess_tail / (CHAINS * DRAWS)).log().abs().max() < 0.35
    expected = quantity.std / (CHAINS * DRAWS) ** 0.5
    assert (quantity.standard_error / expected).log().abs().max() < 0.15


@pytest.mark.statistical
@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_correlated_draws(correlation):
    quantity = quantity_of(autoregressive(correlation))
    expected = CHAINS * DRAWS * (1 - correlation) / (1 + correlation)
    assert abs(math.log(float(quantity.ess_bulk) / expected)) < 0.3
    assert float(quantity.standard_error) == pytest.approx(expected**-0.5, rel=0.25)


def test_tails_that_were_met_only_once():
    values = normals()
    for chain in values:
        highest = chain.topk(DRAWS // 20).indices
        chain[:] = torch.cat([chain[highest], chain[~torch.isin(torch.arange(DRAWS), highest)]])
    quantity = quantity_of(values)
    assert quantity.ess_tail < 120
    assert quantity.fewest_effective == float(quantity.ess_tail)
    assert quantity.ess_bulk > 3 * quantity.ess_tail


def test_moments_are_of_all_draws():
    values = normals(3) * 2 + 5
    quantity = quantity_of(values)
    torch.testing.assert_close(quantity.mean, values.mean((0, 1)))
    torch.testing.assert_close(quantity.std, values.flatten(0, 1).std(0))


def test_chains_apart_are_told():
    values = normals()
    values[2] += 3.0
    quantity = quantity_of(values)
    assert quantity.worst_r_hat > 1.3
    assert quantity.fewest_effective < 30
    checks = {c.name: c for c in diagnostic_checks(diagnose({"x": values}, {}, {}))}
    assert checks["chains-agree"].status == "fail"
    assert checks["effective-draws"].status == "warn"
    assert "of x" in checks["chains-agree"].detail


def test_chains_almost_together_are_a_warning():
    values = normals()
    values[2] += 0.5
    diagnosis = diagnose({"x": values}, {}, {})
    assert 1.01 < diagnosis["x"].worst_r_hat < 1.1
    assert diagnostic_checks(diagnosis)[0].status == "warn"


def test_a_drift_of_all_chains_alike_is_told():
    quantity = quantity_of(normals() + torch.linspace(-2, 2, DRAWS, dtype=F64))
    assert quantity.worst_r_hat > 1.1


@pytest.mark.filterwarnings("error")
def test_components_that_never_move():
    values = normals(3)
    values[..., 1] = 2.0
    quantity = quantity_of(values)
    assert quantity.r_hat.isnan().tolist() == [False, True, False]
    assert quantity.worst_r_hat == float(quantity.r_hat[[0, 2]].max())
    values[..., 2] = torch.arange(4.0, dtype=F64)[:, None]  # stuck in different places
    assert quantity_of(values).worst_r_hat > 1e6
    still = diagnose({"x": torch.ones(CHAINS, DRAWS, 2, dtype=F64)}, {}, {})
    assert math.isnan(still["x"].worst_r_hat)
    assert still.worst() is None
    (check,) = diagnostic_checks(still)
    assert (check.name, check.status, check.detail) == ("chains-agree", "fail", "nothing moved")


@pytest.mark.filterwarnings("error")
def test_chains_that_are_lost():
    values = normals(3)
    values[1, 500:] = torch.nan
    (check,) = diagnostic_checks(diagnose({"x": values}, {}, {"potential": values[..., 0]}))
    assert (check.name, check.status) == ("chains-agree", "fail")
    assert check.detail == "a chain is not finite"


def test_many_components_are_sampled():
    assert looked_at(200).tolist() == list(range(200))
    some = looked_at(1000)
    assert len(some) == 200
    assert (some[0], some[-1]) == (0, 999)
    assert (some[1:] - some[:-1]).min() >= 5
    assert (some[1:] - some[:-1]).max() <= 6
    values = normals(10, 100)[:, :100].clone()
    whole, bare = quantity_of(values), quantity_of(values.flatten(2)[..., some])
    assert torch.equal(whole.r_hat, bare.r_hat)
    assert torch.equal(whole.mean, bare.mean)
    values.flatten(2)[0, :, int(some[150])] += 5.0
    assert int(quantity_of(values).r_hat.argmax()) == 150


def test_a_single_chain_is_compared_with_itself():
    values = normals()[:1]
    calm = diagnose({"x": values}, {}, {})
    assert calm["x"].worst_r_hat < 1.02
    assert calm["x"].fewest_effective == pytest.approx(DRAWS, rel=0.3)
    assert "one chain" in diagnostic_checks(calm)[0].detail
    values[:, DRAWS // 2 :] += 3.0
    assert quantity_of(values).worst_r_hat > 1.3
    # Halves, not every second draw.
    alternating = values * 0.1
    alternating[:, ::2] += 3.0
    assert quantity_of(alternating[:, : DRAWS // 2]).worst_r_hat < 1.02
    # An odd number of draws: the first is left out.
    odd = quantity_of(values[:, 1:])
    assert odd.mean == pytest.approx(float(values[:, 2:].mean()))


def test_numbers_of_other_types():
    found = diagnose({}, {"flag": normals() > 0, "single": normals().float()}, {})
    assert found["flag"].worst_r_hat < 1.05
    assert found["single"].mean.dtype == F64


def test_too_few_draws():
    diagnosis = diagnose({"x": normals()[:, :7]}, {}, {"potential": normals()[:, :7]})
    assert not diagnosis.enough_draws
    assert diagnosis.quantities == ()
    assert list(diagnosis.lines()) == ["too few draws for R-hat"]
    (check,) = diagnostic_checks(diagnosis)
    assert (check.name, check.status) == ("enough-draws-to-compare", "warn")
    enough = diagnose({"x": normals()[:, :8]}, {}, {})
    assert math.isfinite(enough["x"].worst_r_hat)
    assert math.isfinite(diagnose({"x": normals()[:1, :8]}, {}, {})["x"].worst_r_hat)


def test_order_and_kinds():
    x = normals()
    diagnosis = diagnose({"w": x + 9}, {"f": x, "g": x + 1}, {"potential": x, "acceptance": x})
    assert [(q.kind, q.name) for q in diagnosis.quantities] == [
        ("potential", "potential"),
        ("observation", "f"),
        ("observation", "g"),
        ("parameter", "w"),
    ]
    assert (diagnosis.num_chains, diagnosis.num_draws) == (CHAINS, DRAWS)
    with pytest.raises(KeyError, match="nothing"):
        diagnosis["nothing"]


def test_observations_are_judged_before_parameters():
    """Weights of permuted hidden units never agree; what the network computes can."""
    good, bad = normals(), normals()
    bad[0] += 5.0
    assert diagnostic_checks(diagnose({"w": bad}, {"f": good}, {}))[0].status == "pass"
    assert diagnostic_checks(diagnose({"w": good}, {"f": bad}, {}))[0].status == "fail"
    of_potential = diagnostic_checks(diagnose({"w": bad}, {}, {"potential": good}))
    assert "of potential" in of_potential[0].detail
    assert of_potential[0].status == "pass"
    assert diagnostic_checks(diagnose({"w": bad}, {}, {}))[0].status == "fail"
    diagnosis = diagnose({"w": good}, {"f": good, "g": bad}, {"potential": good})
    assert diagnosis.worst("observation").name == diagnosis.worst().name == "g"
    assert diagnosis.worst("parameter").name == "w"


def test_few_effective_draws_are_a_warning():
    agree, effective = diagnostic_checks(diagnose({"x": normals()[:, :60]}, {}, {}))
    assert effective.name == "effective-draws"
    assert effective.status == "warn"
    agree, effective = diagnostic_checks(diagnose({"x": normals()}, {}, {}))
    assert (agree.status, effective.status) == ("pass", "pass")


def test_lines_and_plain_objects():
    names = {f"w{i}": normals(2, seed=i) for i in range(11)}
    diagnosis = diagnose(names, {}, {})
    lines = list(diagnosis.lines())
    assert len(lines) == 1 + 8 + 1
    assert lines[-1] == "... 3 more"
    assert "R-hat" in lines[0]
    assert f"{diagnosis['w0'].worst_r_hat:.3f}" in lines[1]
    found = json.loads(json.dumps(diagnosis.to_dict()))
    assert found["num_draws"] == DRAWS
    assert len(found["quantities"]) == 11
    assert isinstance(diagnosis, Diagnosis)
    assert isinstance(diagnosis["w3"], Quantity)

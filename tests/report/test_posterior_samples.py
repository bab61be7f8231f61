"""The section on draws of a posterior: chains that agree, disagree, stand still, and few draws."""

import json

import pytest
import torch

import pushforward as pf
from pushforward.report import posterior_samples as module
from pushforward.report.averaged_prediction import average_prediction
from pushforward.report.page import CheckList, Figure, Paragraph, Report, Table, render, write
from pushforward.report.posterior_samples import posterior_samples_section

CENTRES = torch.tensor([0.0, 40.0], dtype=torch.float64)


def one_well(parameters):
    return -parameters["w"].square().sum() / 2


def two_wells(parameters):
    """Chains stay in the well in which they start."""
    return torch.logsumexp(-(parameters["w"][0] - CENTRES).square() / 2, 0) + one_well(
        {"w": parameters["w"][1:]}
    )


def chains_of(density=one_well, *, draws=300, initial=None, record=True, **options):
    potential = pf.Potential.of_density(density, {"w": torch.zeros(2, dtype=torch.float64)})
    kernel = pf.HMC(potential, **({"step_size": 0.4, "num_steps": 5} | options))
    noted = (lambda p: {"<first>": p["w"][:1], "sum": p["w"].sum()}) if record else None
    return pf.sample(kernel, num_draws=draws, num_warmup=20, initial=initial, record=noted, seed=3)


def apart():
    return {"w": torch.tensor([[0.0, 0], [40, 0], [0, 0], [40, 0]], dtype=torch.float64)}


def tables(section):
    return {block.title: block for block in section.blocks if isinstance(block, Table)}


def page_of(section):
    return render(Report("Title", "Subtitle", (section,)))


def test_chains_that_agree_make_a_page(tmp_path):
    chains = chains_of(draws=1000)
    section = posterior_samples_section(chains, about="Two <numbers>.", notes=("By HMC.",))
    assert section.verdict.status == "pass"
    assert "4 chains of HMC agree about the predictions" in section.verdict.headline
    page = page_of(section)
    assert "Two &lt;numbers&gt;. By HMC." in page
    assert "&lt;first&gt;" in page  # names come from users
    assert "nan" not in page.lower()
    table = tables(section)["Do the chains agree?"]
    assert [row[0].text for row in table.rows] == ["potential", "<first>", "sum", "w"]
    diagnosis = chains.diagnosis
    for row in table.rows:
        quantity = diagnosis[row[0].text]
        assert float(row[2].text) == pytest.approx(quantity.worst_r_hat, abs=6e-4)
        assert row[2].tone == "good"
        assert int(row[1].text) == len(quantity.mean)
    assert [type(block) for block in section.blocks][-1] is CheckList
    assert isinstance(section.blocks[1], Figure)
    assert "thermalize" in section.blocks[0].text  # agreement is not sufficient
    write(Report("Title", "Subtitle", (section,)), tmp_path / "index.html")
    saved = json.loads((tmp_path / "result.json").read_text())["sections"]["posterior-samples"]
    assert saved["results"]["chains"]["num_draws"] == 1000
    assert saved["results"]["prediction"] is None


def test_chains_in_different_wells_are_told_apart():
    section = posterior_samples_section(chains_of(two_wells, initial=apart()))
    assert section.verdict.status == "fail"
    assert "do not agree" in section.verdict.headline
    tiles = {tile.label: tile for tile in section.verdict.tiles}
    assert tiles["Largest R-hat"].tone == "bad"
    assert tiles["Effective draws"].tone == "warn"
    assert any("longer warm-up" in sentence for sentence in section.verdict.sentences)
    rows = {row[0].text: row for row in tables(section)["Do the chains agree?"].rows}
    assert rows["<first>"][2].tone == "bad"


def test_chains_that_stand_still_get_advice():
    chains = chains_of(two_wells, initial=apart(), step_size=1e4, draws=20)
    section = posterior_samples_section(chains)
    assert section.verdict.status == "fail"
    assert "did not move" in section.verdict.headline
    assert any("smaller step size" in sentence for sentence in section.verdict.sentences)
    tiles = {tile.label: tile for tile in section.verdict.tiles}
    assert tiles["Accepted proposals"].tone == "bad"
    assert "e+" not in page_of(section)  # no R-hat of 10^15


def test_few_draws_are_not_compared():
    section = posterior_samples_section(chains_of(draws=3))
    assert "too few to compare" in section.verdict.headline
    assert tables(section)["Do the chains agree?"].rows == ()
    assert "too few" in tables(section)["Do the chains agree?"].note
    page_of(section)


def test_without_observations_parameters_are_traced():
    section = posterior_samples_section(chains_of(record=False))
    assert "potential" in section.verdict.headline
    svg = next(block for block in section.blocks if isinstance(block, Figure)).svg
    assert "w[0]" in svg
    assert "w[1]" in svg


def test_every_chain_has_a_row():
    chains = chains_of(draws=40)
    table = tables(posterior_samples_section(chains))["Chain by chain"]
    assert [row[0].text for row in table.rows] == [f"chain {i}" for i in range(4)]
    at = table.columns.index("acceptance")
    shares = [float(row[at].text.split()[0]) / 100 for row in table.rows]
    expected = chains.statistics["acceptance"].mean(1).tolist()
    assert shares == pytest.approx(expected, rel=0.01)


def test_predictions_stand_beside_the_network():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()

    def predict(parameters, inputs):
        return inputs * parameters["w"] @ torch.tensor([[1.0, -1], [0, 0]], dtype=torch.float64)

    chains = chains_of(draws=30)
    averaged = average_prediction(
        predict,
        chains.draws(),
        pf.Categorical(),
        pf.Categorical(),
        (x, y),
        alone=lambda x: 0 * x,
    )
    section = posterior_samples_section(chains, averaged=averaged)
    table = tables(section)["What the draws predict"]
    assert [row[0].text for row in table.rows] == [row.name for row in averaged.rows]
    assert table.rows[table.strong][0].text == "average over the draws"
    shown = [float(row[1].text.split()[0]) for row in table.rows]
    assert shown == pytest.approx([row.nll.value for row in averaged.rows], rel=0.05)
    tiles = {tile.label: tile for tile in section.verdict.tiles}
    assert "trained network: 0.693" in tiles["NLL of the average"].detail
    assert "Accuracy of the average" in tiles
    assert "Are the probabilities right?" in page_of(section)
    assert section.results["prediction"]["num_examples"] == 60


def test_without_matplotlib_the_page_has_tables(monkeypatch):
    monkeypatch.setattr(module, "can_draw", lambda: False)
    section = posterior_samples_section(chains_of(draws=20))
    assert not [block for block in section.blocks if isinstance(block, Figure)]
    assert any("pushforward[plot]" in b.text for b in section.blocks if isinstance(b, Paragraph))


def test_drawings_stay_small():
    chains = chains_of(draws=3000)
    section = posterior_samples_section(chains)
    svg = next(block for block in section.blocks if isinstance(block, Figure)).svg
    assert len(svg) < 250_000

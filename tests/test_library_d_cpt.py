"""configs/selection/d_cpt.py: a planted law is found again, and foretells what it was not shown."""
import itertools

import numpy as np
import pytest

from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
d_cpt = load_file(ROOT / "configs/selection/d_cpt.py")
EXPONENTS, FACTORS = np.array([0.4, 0.6, 0.3, 0.7, 0.2]), np.array([1.5, 0.8, 0.5, 0.3])


def grid(shares) -> np.ndarray:
    """Points [n 3] of three sizes, three budgets and some shares."""
    return np.array(list(itertools.product((0.3, 1.0, 3.0), (0.5, 1.0, 1.5), shares)))


def test_the_terms_are_those_of_the_law():
    n, d, r = 2.0, 0.7, 0.4
    a, b, eta, c, e = EXPONENTS
    got = d_cpt.terms(np.array([[n, d, r]]), EXPONENTS)[0] @ FACTORS
    said = 1.5 + 0.8 / n**a + 0.5 * r**eta / d**b + 0.3 / (r + e) ** c
    assert got == pytest.approx(said, rel=1e-12)


def test_a_planted_law_is_found_again_and_foretells_unseen_shares():
    points, unseen = grid((0.1, 0.25, 0.4, 0.6, 0.8, 0.9)), grid((0.2, 0.5, 0.7))
    losses = d_cpt.terms(points, EXPONENTS) @ FACTORS
    exponents, factors = d_cpt.fit(points, losses)
    np.testing.assert_allclose(d_cpt.terms(points, exponents) @ factors, losses, rtol=1e-6)
    np.testing.assert_allclose(d_cpt.terms(unseen, exponents) @ factors,
                               d_cpt.terms(unseen, EXPONENTS) @ FACTORS, rtol=2e-4)


def test_with_many_shares_its_parameters_are_the_planted_ones():
    points = grid(np.linspace(0.02, 0.98, 25))
    exponents, factors = d_cpt.fit(points, d_cpt.terms(points, EXPONENTS) @ FACTORS)
    np.testing.assert_allclose(exponents, EXPONENTS, rtol=1e-2)
    np.testing.assert_allclose(factors, FACTORS, rtol=1e-2)


def planted(law) -> dict:
    """Figures of the study's arms, two seeds, in which law(N, D, r of the source) are the losses."""
    figures = {}
    for size in d_cpt.SIZES:
        for share in (*d_cpt.SHARES, *d_cpt.UNSEEN):
            n = d_cpt.count(d_cpt.bases[size].model) / 1e5
            figures[f"{size}{share}"] = {
                f"{source} at {step}": law(n, step / 80, own) + np.array([-0.01, 0.01])
                for source, own in (("wiki", share), ("code", 1 - share)) for step in d_cpt.POINTS}
    return figures


def test_the_conclusion_is_sure_of_a_law_and_the_others_are_not():
    found = d_cpt.foretold(planted(lambda *at: (d_cpt.terms(np.array([at]), EXPONENTS) @ FACTORS)[0]))
    assert found["R2 wiki"] > 0.9999 and found["R2 code"] > 0.9999 and found["error"] < 1e-3
    assert found["less a constant's"] < 0 and found["less a line's"] < 0


def test_losses_that_a_line_foretells_are_no_gain_over_lines():
    found = d_cpt.foretold(planted(lambda n, d, r: 2 + 1 / n - r / 2))
    assert found["less a line's"] >= 0 and found["less a constant's"] < 0


def test_a_measure_is_the_last_evaluation_up_to_a_step():
    rows = [dict(step=10, **{"eval/wiki/loss": 3.0}), dict(step=15), dict(step=20, **{"eval/wiki/loss": 2.0}),
            dict(step=30, **{"eval/wiki/loss": 1.0})]
    assert d_cpt.at(rows, "wiki", 25) == 2.0 and d_cpt.at(rows, "wiki", 30) == 1.0

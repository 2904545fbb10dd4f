"""Orders of convergence of gDDIM on Gaussian mixtures whose scores are known, against adaptive integration."""

import numpy as np
import pytest

from genie_diffusers import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMScheduler

STEPS = (80, 160)
POINTS = np.array([[1.2, 0.3], [-0.7, 1.0], [-0.4, -1.1]])
PICTURES = np.random.default_rng(0).standard_normal((3, 1, 3, 4))


def setting(name: str):
    """The scheduler class, its configuration, the means of the data, and the shape of a batch of states."""
    return {
        "vp": (GDDIMScheduler, {"continuous": True}, POINTS, (6, 2)),
        "cld": (GDDIMCLDScheduler, {}, POINTS, (6, 4)),
        # a blur of the width of these pictures, so that a hundred steps resolve it
        "blurring": (
            GDDIMBlurringScheduler,
            {"sample_size": (3, 4), "blur_sigma": 2.0, "blur_minimum": 0.05},
            PICTURES,
            (6, 1, 3, 4),
        ),
    }[name]


@pytest.fixture(scope="module")
def references() -> dict:
    return {}


@pytest.fixture
def errors(linear_mixture, references, noise):
    """The relative errors at the numbers of `steps` of a configuration on the process `name`."""

    def errors(name: str, steps=STEPS, **config):
        scheduler_class, defaults, means, shape = setting(name)
        scheduler = scheduler_class(
            **{**defaults, "final_sigmas_type": "sigma_min", "time_grid": "uniform_lambda", **config}
        )
        process = scheduler.process
        problem = linear_mixture(process, means)
        start = process.prior(noise(*shape))
        if name not in references:
            references[name] = problem.solve(start, process.timestep_max, process.timestep_min)
        found = []
        for count in steps:
            scheduler.set_timesteps(count)
            found.append(float((problem.sample(scheduler, start) - references[name]).norm() / references[name].norm()))
        return np.array(found)

    return errors


def order(errors: np.ndarray) -> float:
    return float(np.log2(errors[0] / errors[1]))


@pytest.mark.parametrize("name", ["vp", "cld", "blurring"])
@pytest.mark.parametrize("multistep_order", [1, 2, 3, 4])
def test_predictor_converges_with_its_order(errors, name, multistep_order):
    found = errors(name, multistep_order=multistep_order, interpolation="timestep")
    assert order(found) == pytest.approx(multistep_order, abs=0.15 + 0.1 * multistep_order)


@pytest.mark.parametrize("name", ["vp", "cld", "blurring"])
def test_polynomials_in_the_log_snr_have_the_same_order(errors, name):
    assert order(errors(name, multistep_order=3, interpolation="log_snr")) == pytest.approx(3, abs=0.4)


@pytest.mark.parametrize(("name", "multistep_order"), [("vp", 1), ("vp", 2), ("cld", 2), ("blurring", 1)])
def test_corrector_raises_the_order_by_one(errors, name, multistep_order):
    corrected = errors(name, multistep_order=multistep_order, corrector=True)
    assert order(corrected) == pytest.approx(multistep_order + 1, abs=0.5)
    assert corrected[-1] < 0.5 * errors(name, multistep_order=multistep_order)[-1]


@pytest.mark.parametrize("name, share", [("cld", 0.02), ("blurring", 0.8), ("vp", 0.5)])
def test_a_correction_that_leaves_the_prediction_as_it_was_spoils_the_first_steps(errors, monkeypatch, name, share):
    """With ten calls. Langevin diffusion diverges without the change of ε that a correction brings about."""
    scheduler_class, config = setting(name)[0], {"multistep_order": 2, "corrector": True}
    consistent = errors(name, steps=(10,), **config)[0]
    rows = scheduler_class.row

    def row(self, index, known):
        with monkeypatch.context() as patched:
            patched.setattr(scheduler_class, "_corrections", lambda *args: {})
            return rows(self, index, known)

    monkeypatch.setattr(scheduler_class, "row", row)
    assert consistent < share * errors(name, steps=(10,), **config)[0]


def test_the_cholesky_root_converges_too_but_further_away(errors):
    config = {"multistep_order": 2, "time_grid": "quadratic"}
    cholesky, root = errors("cld", parametrization="L", **config), errors("cld", **config)
    assert order(cholesky) == pytest.approx(2, abs=0.3)
    assert np.all(root < 0.5 * cholesky)


def test_a_weight_that_is_off_costs_the_order(errors, monkeypatch):
    """The measurement above can tell."""
    integrals = GDDIMCLDScheduler._integrals
    monkeypatch.setattr(GDDIMCLDScheduler, "_integrals", lambda *args: 1.01 * integrals(*args))
    assert order(errors("cld", multistep_order=2)) < 1.0

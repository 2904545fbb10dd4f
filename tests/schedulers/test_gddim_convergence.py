"""Orders of convergence of gDDIM on Gaussian mixtures whose scores are known, against adaptive integration."""

import numpy as np
import pytest
import torch

from genie_diffusers import GDDIMBlurringScheduler, GDDIMCLDScheduler, GDDIMScheduler, GeniePipeline
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.core.solvers import gddim
from genie_diffusers.schedulers import scheduling_gddim

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
    config = {"multistep_order": 2, "corrector": True}
    consistent = errors(name, steps=(10,), **config)[0]
    monkeypatch.setattr(scheduling_gddim, "gddim", lambda *args, corrector, **options: gddim.gddim(*args, **options))
    assert consistent < share * errors(name, steps=(10,), **config)[0]


def test_the_cholesky_root_converges_too_but_further_away(errors):
    config = {"multistep_order": 2, "time_grid": "quadratic"}
    cholesky, root = errors("cld", parametrization="L", **config), errors("cld", **config)
    assert order(cholesky) == pytest.approx(2, abs=0.3)
    assert np.all(root < 0.5 * cholesky)


def test_a_weight_that_is_off_costs_the_order(errors, monkeypatch):
    """The measurement above can tell."""
    integrals = gddim._integrals
    monkeypatch.setattr(gddim, "_integrals", lambda *args: 1.01 * integrals(*args))
    assert order(errors("cld", multistep_order=2)) < 1.0


def test_few_steps_of_a_trained_model_are_worth_correcting():
    pipe = GeniePipeline.from_pretrained(PACKAGED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.float()
    config = {**pipe.scheduler.config, "clip_sample": False, "time_grid": "uniform_lambda", "denoising_step": True}

    def drawn(calls, **options):
        pipe.scheduler = GDDIMScheduler.from_config(config, **options)
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        run = {"num_inference_steps": calls, "generator": generators, "output_type": "latent"}
        return pipe(class_labels=list(range(6)), **run).images

    exact = drawn(100, multistep_order=3)
    plain, corrected = ((drawn(10, multistep_order=1, corrector=c) - exact).norm() for c in (False, True))
    assert corrected < 0.45 * plain


def test_the_corrector_on_a_flow_in_few_calls_needs_polynomials_in_the_timestep(noise):
    """docs/gddim.md: with four calls on N(0, 1/4) polynomials in log SNR overshoot, those in the timestep do not."""
    start = noise(10, 100)

    def error(**options):
        scheduler = GDDIMScheduler(prediction_type="flow_prediction", multistep_order=2, **options)
        scheduler.set_timesteps(4)
        sample = start
        for timestep in scheduler.timesteps:
            alpha, sigma = (float(of(float(timestep))) for of in (scheduler.process.alpha, scheduler.process.sigma))
            data = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * sample
            sample = scheduler.step((sample - alpha * data) / sigma - data, timestep, sample).prev_sample
        alpha, sigma = scheduler.alphas[0], scheduler.noise_stds[0]
        exact = start * 0.5 / (alpha**2 * 0.25 + sigma**2) ** 0.5
        return float((sample - exact).norm() / exact.norm())

    without, on_timesteps = error(), error(corrector=True, interpolation="timestep")
    assert on_timesteps < 0.1 < without < 0.4 < error(corrector=True)

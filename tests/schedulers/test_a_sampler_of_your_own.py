"""The sampler that CONTRIBUTING.md shows, as it stands there, and what deriving from our classes promises."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from genie_diffusers import GaussianDiffusionScheduler, GenieScheduler, QuasiTaylorScheduler

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def adams_bashforth():
    """The class of the first code block under "Add your own sampler"."""
    text = CONTRIBUTING.read_text().partition("### Add your own sampler")[2]
    names: dict = {"__name__": "adams_bashforth"}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    return names["AdamsBashforthScheduler"]


def test_the_example_is_one_screen():
    text = CONTRIBUTING.read_text().partition("### Add your own sampler")[2]
    assert re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].count("\n") <= 25


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_converges_with_its_order(adams_bashforth, order, run, noise):
    config = {"continuous": True, "final_sigmas_type": "sigma_min", "time_grid": "quadratic"}
    exact = GenieScheduler(**config)
    exact.set_timesteps(900)
    reference, errors = run(exact, noise(16, 2)), []
    for count in (80, 160, 320):
        scheduler = adams_bashforth(multistep_order=order, **config)
        scheduler.set_timesteps(count)
        errors.append(float((run(scheduler, noise(16, 2)) - reference).norm()))
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.4)


def test_it_has_every_key_of_the_family_and_saves_with_its_own(adams_bashforth, tmp_path):
    made = adams_bashforth.from_config(DPMSolverMultistepScheduler(beta_schedule="scaled_linear").config)
    assert made.config.beta_schedule == "scaled_linear" and made.config.multistep_order == 3
    adams_bashforth(multistep_order=2, time_grid="karras").save_pretrained(tmp_path)
    loaded = adams_bashforth.from_pretrained(tmp_path)
    assert loaded.config.multistep_order == 2 and loaded.config.time_grid == "karras"
    with pytest.raises(ValueError, match="`multistep_order` must be one of 1, 2, 3, got 4"):
        adams_bashforth(multistep_order=4).set_timesteps(5)


def test_it_samples_flows(adams_bashforth, noise):
    scheduler = adams_bashforth.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    scheduler.set_timesteps(6)
    sample = noise(3, 2)
    for timestep in scheduler.timesteps:
        share = float(timestep) / 1000
        sample = scheduler.step((sample - 0.7) / share, timestep, sample).prev_sample  # the flow to one data point
    torch.testing.assert_close(sample, torch.full_like(sample, 0.7), rtol=0, atol=2e-3)


class Derived(GenieScheduler):
    def __init__(self, damping: float = 0.5, method: str = "taylor"):
        super().__init__()  # with or without arguments


def test_calling_the_parents_constructor_resets_nothing():
    config = Derived(beta_schedule="scaled_linear", damping=0.25).config
    assert (config.method, config.beta_schedule, config.damping) == ("taylor", "scaled_linear", 0.25)
    assert config.interpolation_order == 3 and config.time_grid is None


def test_an_argument_that_no_class_declares_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'dampng'"):
        Derived(dampng=0.25)


def test_a_constructor_in_the_way_of_diffusers_works_too():
    class Decorated(GenieScheduler):
        @register_to_config
        def __init__(self, method: str = "taylor", beta_schedule: str = "scaled_linear"):
            super().__init__()

    config = Decorated(time_grid="karras").config
    assert (config.method, config.beta_schedule, config.time_grid) == ("taylor", "scaled_linear", "karras")
    assert Decorated.from_config(config).config.time_grid == "karras"


def test_methods_of_derived_classes_stay_behind_too():
    class Third(GenieScheduler):
        choices = {"method": ("hermite", "taylor", "third")}

    config = Third(method="third").config
    assert QuasiTaylorScheduler.from_config(config).config.method == "ode"
    assert Third.from_config(config).config.method == "third"


def test_a_scheduler_without_rows_says_so():
    with pytest.raises(NotImplementedError, match="`GaussianDiffusionScheduler` must define `row`"):
        GaussianDiffusionScheduler().set_timesteps(5)

"""What the schedulers owe to diffusers: configuration, interface, errors, whole runs, numerics."""

import inspect
import json
import weakref
from collections import defaultdict

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput

from genie_diffusers import ExponentialMultistepScheduler, GenieScheduler, GGDMScheduler, QuasiTaylorScheduler

# diffusers' default noise schedule, the oracle of this file
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SHAPE = (2, 3, 4, 4)

#: learned samplers have the numbers of steps that they have
TABLES = GGDMScheduler.from_scheduler(GenieScheduler(), [3, 5, 6, 8, 20, 50]).config["tables"]

#: scheduler → its class, and the options that make it
SCHEDULERS = {
    "genie": (GenieScheduler, {}),
    "genie-taylor": (GenieScheduler, {"method": "taylor"}),
    "quasi-taylor": (QuasiTaylorScheduler, {}),
    "quasi-taylor-sde": (QuasiTaylorScheduler, {"method": "sde", "taylor_order": 3}),
    "unipc": (ExponentialMultistepScheduler, {"solver": "unipc_3"}),
    "ggdm": (GGDMScheduler, {"tables": TABLES}),
}
SOLVERS = [name for name in SCHEDULERS if name != "ggdm"]


def kinds(*names: str):
    """Run a test for these of the `SCHEDULERS`, all if none is named."""
    return pytest.mark.parametrize("kind", names or SCHEDULERS)


every_kind, every_solver = kinds(), kinds(*SOLVERS)
deterministic = kinds("genie", "genie-taylor", "quasi-taylor", "unipc", "ggdm")
every_class = kinds("genie", "quasi-taylor", "unipc")


def make(kind: str, **config):
    scheduler_class, options = SCHEDULERS[kind]
    return scheduler_class(**{**options, **config})


# diffusers hands tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")


def alpha_sigma(t) -> tuple[float, float]:
    alpha_cumprod = float(ALPHAS_CUMPROD[int(t)])
    return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5


def noise(seed: int = 0, shape=SHAPE, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def two_peaks(x: torch.Tensor, t) -> torch.Tensor:
    """ε of data at ±1, each widened to a standard deviation of 0.5: E[x_0 | x_t] in closed form, then ε."""
    alpha, sigma = alpha_sigma(t)
    variance = 0.25 * alpha**2 + sigma**2
    data = (sigma**2 * torch.tanh(alpha * x / variance) + 0.25 * alpha * x) / variance
    return (x - alpha * data) / sigma


def one_point(x: torch.Tensor, t) -> torch.Tensor:
    """ε of data that is the constant 0.7: constant along the ODE, so every solver is exact with any steps."""
    alpha, sigma = alpha_sigma(t)
    return (x - 0.7 * alpha) / sigma


def as_prediction(epsilon: torch.Tensor, x: torch.Tensor, t, prediction_type: str) -> torch.Tensor:
    alpha, sigma = alpha_sigma(t)
    data = (x - sigma * epsilon) / alpha
    return {"epsilon": epsilon, "sample": data, "v_prediction": alpha * epsilon - sigma * data}[prediction_type]


def run(scheduler, sample: torch.Tensor, model=two_peaks, timesteps=None) -> torch.Tensor:
    """The loop of diffusers' pipelines."""
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(5)
    for t in scheduler.timesteps if timesteps is None else timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(model(model_input, t), t, sample, **options).prev_sample
    return sample


def run_from_config(scheduler, num_inference_steps: int = 5, model=None) -> torch.Tensor:
    """A run with a model that does not depend on the noise schedule."""
    scheduler.set_timesteps(num_inference_steps)
    return run(scheduler, noise() * scheduler.init_noise_sigma, model or (lambda x, t: 0.3 * torch.tanh(x)))


def public(config) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


class ConstantSlope:
    """A slope source that counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, sample, noise_prediction, timestep, *, step, history_slope):
        self.calls.append((timestep, step))
        return torch.full_like(sample, 0.125)


with_and_without_a_source = pytest.mark.parametrize(
    "source", [lambda: None, ConstantSlope], ids=["without a source", "with a source"]
)


# --- configuration ---------------------------------------------------------------------------------------------------

#: Values that are nobody's default, for whichever of these arguments a scheduler of diffusers has.
THEIR_VALUES = {
    "num_train_timesteps": 500,
    "beta_start": 0.0002,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small_log",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": True,
    "clip_sample_range": 1.5,
    "set_alpha_to_one": False,
    "final_sigmas_type": "sigma_min",
    "dynamic_thresholding_ratio": 0.9,
    "use_karras_sigmas": True,
    "solver_order": 3,
    "skip_prk_steps": True,
    "sigma_data": 0.6,
    "rho": 6.0,
    "noise_sampler_seed": 7,
}
OUR_VALUES = {
    "num_train_timesteps": 500,
    "beta_start": 0.0002,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.5,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 2.0,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "use_karras_sigmas": True,
    "final_sigmas_type": "sigma_min",
    "time_grid": "quadratic",
    "analytical_first_step": True,
}
OUR_OWN_VALUES = {
    "genie": {"method": "taylor", "interpolation_order": 2, "denoising_step": True},
    "quasi-taylor": {"method": "sde", "taylor_order": 3},
    "unipc": {"solver": "res_3m"},
}


def diffusers_scheduler(name: str):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    return getattr(diffusers, name)


every_diffusers_scheduler = pytest.mark.parametrize("name", [member.name for member in KarrasDiffusionSchedulers])


@every_class
def test_a_config_without_a_schedule_of_betas_is_refused(kind):
    for cls in (
        diffusers.EDMEulerScheduler,
        diffusers.EDMDPMSolverMultistepScheduler,
        diffusers.CosineDPMSolverMultistepScheduler,
        diffusers.ScoreSdeVeScheduler,
        diffusers.CMStochasticIterativeScheduler,
        diffusers.IPNDMScheduler,
        diffusers.DDPMWuerstchenScheduler,
    ):
        with pytest.raises(ValueError, match="`config` must describe a variance-preserving model"):
            type(make(kind)).from_config(cls().config)
    theirs = diffusers.EulerDiscreteScheduler(timestep_type="continuous")
    with pytest.raises(ValueError, match="called with the timesteps of its noise schedule"):
        type(make(kind)).from_config(theirs.config)


@every_class
@pytest.mark.parametrize("theirs", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LCMScheduler"])
def test_a_noise_schedule_that_is_the_default_of_another_class_is_kept(kind, theirs, tmp_path):
    theirs = getattr(diffusers, theirs)()
    ours = type(make(kind)).from_config(theirs.config)
    ours.save_pretrained(tmp_path)
    for scheduler in (ours, type(ours).from_config(ours.config), type(ours).from_pretrained(tmp_path)):
        torch.testing.assert_close(scheduler.alphas_cumprod, theirs.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)


@every_class
@pytest.mark.parametrize(
    "name", [member.name for member in KarrasDiffusionSchedulers if member.name != "EDMEulerScheduler"]
)
def test_a_config_of_diffusers_runs_here_and_survives_the_way_back(kind, name):
    cls = diffusers_scheduler(name)
    given = {k: v for k, v in THEIR_VALUES.items() if k in inspect.signature(cls.__init__).parameters}
    theirs = cls(**given)
    ours = type(make(kind)).from_config(theirs.config, **SCHEDULERS[kind][1])
    assert {key: ours.config[key] for key in given} == given
    assert torch.isfinite(run_from_config(ours)).all()
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)

    back = cls.from_config(ours.config)
    assert public(back.config).items() >= public(theirs.config).items()
    torch.testing.assert_close(run_from_config(back), run_from_config(theirs), rtol=0, atol=0)


@every_class
@every_diffusers_scheduler
def test_our_config_runs_in_diffusers_and_survives_the_way_back(kind, name):
    values = OUR_VALUES | OUR_OWN_VALUES[kind]
    ours = make(kind, **values)
    theirs = diffusers_scheduler(name).from_config(ours.config)
    assert torch.isfinite(run_from_config(theirs)).all()
    back = type(ours).from_config(theirs.config)
    assert {key: back.config[key] for key in values} == values
    torch.testing.assert_close(run_from_config(back), run_from_config(ours), rtol=0, atol=0)


@every_class
@every_diffusers_scheduler
def test_our_defaults_run_in_diffusers_after_saving_and_loading(kind, name, tmp_path):
    make(kind).save_pretrained(tmp_path)
    theirs = diffusers_scheduler(name).from_config(type(make(kind)).from_pretrained(tmp_path).config)
    assert torch.isfinite(run_from_config(theirs)).all()


@every_class
def test_keys_of_our_own_are_no_keys_of_diffusers(kind):
    own = {"time_grid", "analytical_first_step", "continuous", *OUR_OWN_VALUES[kind]}
    assert own <= set(make(kind).config)
    for name in dir(diffusers):
        if name.endswith("Scheduler") and hasattr(getattr(diffusers, name), "from_config"):
            taken = own & set(inspect.signature(getattr(diffusers, name).__init__).parameters)
            assert not taken, f"{name} has {taken}"


@every_class
def test_every_diffusers_scheduler_is_named_as_an_alternative(kind):
    named = {cls.__name__ for cls in make(kind).compatibles}
    assert named >= {member.name for member in KarrasDiffusionSchedulers}


def test_unknown_keys_pass_through_both_ways():
    ours = GenieScheduler.from_config({"beta_end": 0.01, "a_key_of_tomorrow": 3})
    theirs = DDIMScheduler.from_config(ours.config)
    assert ours.config["a_key_of_tomorrow"] == theirs.config["a_key_of_tomorrow"] == 3
    assert GenieScheduler.from_config(theirs.config).config["a_key_of_tomorrow"] == 3


@every_class
def test_saved_scheduler_loads_the_same(kind, tmp_path):
    saved = make(kind, **OUR_VALUES | OUR_OWN_VALUES[kind])
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    assert public(loaded.config) == public(saved.config)
    torch.testing.assert_close(run_from_config(loaded), run_from_config(saved), rtol=0, atol=0)


def test_folder_of_a_diffusers_scheduler_loads_as_ours(tmp_path):
    DDPMScheduler(beta_end=0.01, clip_sample=False).save_pretrained(tmp_path)
    loaded = GenieScheduler.from_pretrained(tmp_path)
    expected = GenieScheduler(beta_end=0.01, timestep_spacing="leading")  # a file holds the defaults, too
    torch.testing.assert_close(run_from_config(loaded), run_from_config(expected), rtol=0, atol=0)


def test_attachment_is_not_part_of_the_configuration(tmp_path):
    plain, attached = GenieScheduler(), GenieScheduler()
    attached.attach(ConstantSlope())
    assert dict(attached.config) == dict(plain.config)
    attached.save_pretrained(tmp_path)
    assert "slope" not in (tmp_path / "scheduler_config.json").read_text()
    json.loads((tmp_path / "scheduler_config.json").read_text())

    with_source, without = run_from_config(attached), run_from_config(plain)
    assert not torch.allclose(with_source, without)
    for copy in (GenieScheduler.from_config(attached.config), GenieScheduler.from_pretrained(tmp_path)):
        torch.testing.assert_close(run_from_config(copy), without, rtol=0, atol=0)


def rewrite_as_pipelines_do(scheduler, key, value):
    config = dict(scheduler.config)
    config[key] = value
    scheduler._internal_dict = FrozenDict(config)


def rewrite_by_registering(scheduler, key, value):
    scheduler.register_to_config(**{key: value})


@pytest.mark.parametrize("rewrite", [rewrite_as_pipelines_do, rewrite_by_registering])
@pytest.mark.parametrize(
    "key, value",
    [
        ("steps_offset", 1),
        ("timestep_spacing", "trailing"),
        ("clip_sample", True),
        ("clip_sample_range", 0.5),
        ("thresholding", True),
        ("prediction_type", "v_prediction"),
        ("beta_end", 0.03),
        ("beta_schedule", "scaled_linear"),
        ("trained_betas", np.linspace(0.001, 0.015, 1000).tolist()),
        ("num_train_timesteps", 500),
        ("rescale_betas_zero_snr", True),
        ("final_sigmas_type", "sigma_min"),
        ("use_karras_sigmas", True),
        ("time_grid", "quadratic"),
        ("denoising_step", True),
        ("method", "taylor"),
        ("interpolation_order", 1),
        ("analytical_first_step", True),
        ("continuous", True),
    ],
)
def test_set_timesteps_uses_the_configuration_as_it_is_now(rewrite, key, value):
    initial = {"timestep_spacing": "linspace" if key == "continuous" else "leading"}
    if key == "clip_sample_range":
        initial["clip_sample"] = True
    if key == "denoising_step":
        initial["time_grid"] = "quadratic"
    scheduler = GenieScheduler(**initial)
    before = run_from_config(scheduler)
    rewrite(scheduler, key, value)
    after = run_from_config(scheduler)
    fresh = run_from_config(GenieScheduler(**{**initial, key: value}))
    torch.testing.assert_close(after, fresh, rtol=0, atol=0)
    assert not torch.allclose(after, before)


# --- interface -------------------------------------------------------------------------------------------------------


def ready(num_inference_steps: int = 5, kind: str = "genie", **config):
    scheduler = make(kind, **config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


@every_class
def test_signatures_are_those_pipelines_inspect(kind):
    step = inspect.signature(SCHEDULERS[kind][0].step).parameters
    assert list(step)[1:4] == ["model_output", "timestep", "sample"]
    assert {"generator", "return_dict"} <= set(step)
    assert "eta" not in step  # a pipeline would pass its own
    assert {"num_inference_steps", "device", "timesteps", "sigmas"} <= set(
        inspect.signature(SCHEDULERS[kind][0].set_timesteps).parameters
    )


def test_neutral_options_of_ddim_are_accepted():
    t, x = ready().timesteps[0], noise()
    plain = ready().step(x, t, x).prev_sample
    neutral = ready().step(x, t, x, eta=0, use_clipped_model_output=None).prev_sample
    torch.testing.assert_close(neutral, plain, rtol=0, atol=0)
    ready().step(x, t, x, eta=0.0, use_clipped_model_output=False)


@pytest.mark.parametrize("option, value", [("eta", 0.5), ("use_clipped_model_output", True)])
def test_options_that_would_be_ignored_are_refused(option, value):
    scheduler = ready()
    with pytest.raises(ValueError, match=f"`{option}`.*{value}"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), **{option: value})


def test_unknown_argument_of_step_is_a_type_error():
    scheduler = ready()
    with pytest.raises(TypeError, match="variance_noise"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), variance_noise=None)


def test_step_returns_an_output_or_a_tuple_and_draws_no_noise():
    x, t = noise(), ready().timesteps[0]
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    output = ready().step(x, t, x, generator=generator)
    as_tuple = ready().step(x, t, x, generator=[generator, generator], return_dict=False)
    assert isinstance(output, SchedulerOutput)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    torch.testing.assert_close(output.prev_sample, as_tuple[0], rtol=0, atol=0)
    assert torch.equal(generator.get_state(), state)


def test_order_length_and_model_input():
    scheduler = ready(num_train_timesteps=500)
    assert scheduler.order == 1
    assert len(scheduler) == 500
    x = noise()
    assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[0]), x)
    assert torch.equal(scheduler.scale_model_input(x), x)


def test_timesteps_are_integers_on_the_device_asked_for():
    scheduler = GenieScheduler()
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == 5
    assert len(scheduler.sigmas) == 6


def test_timestep_on_an_accelerator_is_not_read():
    # The meta device stands for an accelerator: reading a value from it fails.
    scheduler = ready()
    expected = run(scheduler, noise(), timesteps=(on_host := scheduler.timesteps))
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = noise()
    for t, t_on_host in zip(scheduler.timesteps, on_host, strict=True):
        x = scheduler.step(two_peaks(x, t_on_host), t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": np.linspace(0.001, 0.03, 100).tolist(), "num_train_timesteps": 100},
    ],
    ids=lambda schedule: next(iter(schedule.values()), "linear") if len(schedule) != 2 else "trained_betas",
)
def test_forward_process_is_that_of_ddpm(schedule):
    ours, theirs = GenieScheduler(**schedule), DDPMScheduler(**schedule)
    last = len(ours) - 1
    timesteps = torch.tensor([0, 1, last // 3, last - 1, last])
    x, z = noise(1, (5, 3, 4, 4), torch.float32), noise(2, (5, 3, 4, 4), torch.float32)
    # diffusers sets the last ᾱ of zero terminal SNR to 0 in this scheduler, and to 2⁻²⁴ in those that divide by it
    tolerance = {"rtol": 1e-4, "atol": 2e-3 if "rescale_betas_zero_snr" in schedule else 2e-5}
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.add_noise(x, z, timesteps), theirs.add_noise(x, z, timesteps), **tolerance)
    torch.testing.assert_close(ours.get_velocity(x, z, timesteps), theirs.get_velocity(x, z, timesteps), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_noise_keeps_the_dtype_of_the_samples(dtype):
    x, z, t = noise(1, dtype=dtype), noise(2, dtype=dtype), torch.tensor([10, 500])
    noisy = GenieScheduler().add_noise(x, z, t)
    assert noisy.dtype == dtype
    expected = GenieScheduler().add_noise(x.double(), z.double(), t)
    torch.testing.assert_close(noisy.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_initial_noise_is_standard_normal_unless_the_first_step_is_analytical():
    assert GenieScheduler().init_noise_sigma == 1.0
    assert ready().init_noise_sigma == 1.0


def test_analytical_first_step_is_a_ddim_step_with_the_noise_itself_as_prediction():
    free, plain = ready(5, analytical_first_step=True), ready(6)
    assert free.timesteps.tolist() == plain.timesteps[1:].tolist()
    (alpha_0, sigma_0), (alpha_1, sigma_1) = alpha_sigma(plain.timesteps[0]), alpha_sigma(plain.timesteps[1])
    # x₁ = α₁ (x₀ − σ₀ ε)/α₀ + σ₁ ε with ε = x₀
    expected = alpha_1 / alpha_0 * (1 - sigma_0) + sigma_1
    assert free.init_noise_sigma == pytest.approx(expected, rel=1e-10)
    assert free.init_noise_sigma != 1.0


# --- errors ----------------------------------------------------------------------------------------------------------


def assert_sentence(error: pytest.ExceptionInfo, *parts: str):
    """A sentence or two that name the argument and the value."""
    message = str(error.value)
    assert message[0] in "`ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert message.endswith(".")
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert part in message


@pytest.mark.parametrize("value", [0, -1, 1001, 2.5, True, "5"])
def test_impossible_numbers_of_steps_are_errors(value):
    with pytest.raises(ValueError) as error:
        GenieScheduler().set_timesteps(value)
    assert_sentence(error, "`num_inference_steps`", f"got {value!r}")


def test_the_analytical_first_step_takes_one_of_the_timesteps():
    scheduler = GenieScheduler(analytical_first_step=True)
    scheduler.set_timesteps(999)
    with pytest.raises(ValueError) as error:
        scheduler.set_timesteps(1000)
    assert_sentence(error, "`num_inference_steps`", "between 1 and 999", "got 1000")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 2, "timesteps": [500, 10]},
        {"num_inference_steps": 2, "sigmas": [5.0, 0.5]},
        {"timesteps": [500, 10], "sigmas": [5.0, 0.5]},
    ],
)
def test_exactly_one_description_of_the_grid_is_needed(arguments):
    with pytest.raises(ValueError) as error:
        GenieScheduler().set_timesteps(**arguments)
    assert_sentence(error, "`num_inference_steps`", "`timesteps`", "`sigmas`", "exactly one")


@pytest.mark.parametrize(
    "timesteps",
    [[10, 500], [500, 500, 10], [500.5, 10], [float("nan"), 10], [1000, 10], [500, -1], [], 500, [[500, 10]]],
)
def test_custom_timesteps_must_be_decreasing_integers_of_the_process(timesteps):
    with pytest.raises(ValueError) as error:
        GenieScheduler().set_timesteps(timesteps=timesteps)
    assert_sentence(error, "`timesteps`", f"got {timesteps}")


@pytest.mark.parametrize("sigmas", [[0.5, 5.0], [5.0, 5.0], [1e9, 5.0], [0.0], [5.0, -1.0], [float("nan")], []])
def test_custom_sigmas_must_be_decreasing_noise_levels_of_the_process(sigmas):
    with pytest.raises(ValueError) as error:
        GenieScheduler().set_timesteps(sigmas=sigmas)
    assert_sentence(error, "`sigmas`", f"got {sigmas}")


def test_analytical_first_step_needs_room_above_custom_timesteps():
    with pytest.raises(ValueError) as error:
        GenieScheduler(analytical_first_step=True).set_timesteps(timesteps=[999, 10])
    assert_sentence(error, "timesteps", "999")


@pytest.mark.parametrize(
    "key", ["prediction_type", "method", "time_grid", "timestep_spacing", "final_sigmas_type", "beta_schedule"]
)
def test_unknown_option_is_an_error_that_names_it_and_the_choices(key):
    choices = {
        "prediction_type": PREDICTION_TYPES,
        "method": ("hermite", "taylor"),
        "time_grid": ("linear", "quadratic", "uniform_lambda", "karras", "beta", "linspace", "leading", "trailing"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    }
    with pytest.raises(ValueError) as error:
        GenieScheduler(**{key: "nonsense"}).set_timesteps(5)
    assert_sentence(error, f"`{key}`", "got 'nonsense'", *choices[key])


@pytest.mark.parametrize("act", ["step", "set_begin_index"])
def test_use_before_set_timesteps_is_an_error(act):
    scheduler = GenieScheduler()
    with pytest.raises(ValueError) as error:
        scheduler.step(noise(), 999, noise()) if act == "step" else scheduler.set_begin_index(0)
    assert_sentence(error, "`set_timesteps`", f"before `{act}`")


def test_use_past_the_end_is_an_error_until_the_timesteps_are_set_again():
    scheduler = ready()
    first = run(scheduler, noise())
    for t in (scheduler.timesteps[-1], scheduler.timesteps[0]):
        with pytest.raises(ValueError) as error:
            scheduler.step(noise(), t, noise())
        assert_sentence(error, "All 5 steps", "`set_timesteps`")
    scheduler.set_timesteps(5)
    torch.testing.assert_close(run(scheduler, noise()), first, rtol=0, atol=0)


@every_kind
def test_a_finished_run_keeps_no_tensors(kind):
    scheduler, kept = ready(5, kind), []

    def model(x, t):
        kept.append(weakref.ref(output := 0.3 * x))
        return output

    run(scheduler, noise(), model)
    assert [reference() for reference in kept] == [None] * 5


@pytest.mark.parametrize("as_tensor", [False, True])
def test_timestep_that_is_not_in_the_list_is_an_error(as_tensor):
    scheduler = ready()
    with pytest.raises(ValueError) as error:
        scheduler.step(noise(), torch.tensor(998) if as_tensor else 998, noise())
    assert_sentence(error, "`timestep`", "got 998", *[str(int(t)) for t in scheduler.timesteps])


@pytest.mark.parametrize("wrong_turn", [0, 2], ids=["again", "skipping one"])
def test_timestep_out_of_turn_is_an_error(wrong_turn):
    scheduler = ready()
    x = scheduler.step(noise(), scheduler.timesteps[0], noise()).prev_sample
    with pytest.raises(ValueError) as error:
        scheduler.step(noise(), scheduler.timesteps[wrong_turn], x)
    given, expected = scheduler.timesteps[wrong_turn], scheduler.timesteps[1]
    assert_sentence(error, "`timestep`", f"must be {expected}", f"got {given}")


def test_a_batch_of_timesteps_is_an_error():
    scheduler = ready()
    with pytest.raises(ValueError) as error:
        scheduler.step(noise(), scheduler.timesteps[:2], noise())
    assert_sentence(error, "`timestep`", "(2,)")


@pytest.mark.parametrize("begin_index", [-1, 5])
def test_begin_index_outside_the_run_is_an_error(begin_index):
    with pytest.raises(ValueError) as error:
        ready().set_begin_index(begin_index)
    assert_sentence(error, "`begin_index`", "between 0 and 4", f"got {begin_index}")


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (1, 3, 4, 4), (2, 3, 4), (2, 3, 8, 8)])
def test_model_output_of_another_shape_is_an_error(shape):
    scheduler = ready()
    with pytest.raises(ValueError) as error:
        scheduler.step(noise(shape=shape), scheduler.timesteps[0], noise())
    assert_sentence(error, "`model_output`", str(SHAPE), str(shape), "variance_type")


def test_a_rejected_step_leaves_the_run_as_it_was():
    scheduler, expected = ready(), run(ready(), noise())
    x = noise()
    for i, t in enumerate(scheduler.timesteps):
        output = two_peaks(x, t)
        for wrong in ((output, t - 1, x), (output[:1], t, x)):
            with pytest.raises(ValueError):
                scheduler.step(*wrong)
        assert scheduler.step_index in (None, i)
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("source", [3, "head", object()])
def test_a_slope_source_must_be_callable(source):
    with pytest.raises(ValueError) as error:
        GenieScheduler().attach(source)
    assert_sentence(error, "`source`", type(source).__name__)


def test_a_slope_of_another_shape_is_an_error():
    scheduler = ready()
    scheduler.attach(lambda sample, *args, **kwargs: sample[:1])
    with pytest.raises(ValueError) as error:
        scheduler.step(noise(), scheduler.timesteps[0], noise())
    assert_sentence(error, "slope source", str(SHAPE), str((1, 3, 4, 4)))


# --- whole runs ------------------------------------------------------------------------------------------------------


#: how timesteps are chosen
GRIDS = [
    {"timestep_spacing": "linspace"},
    {"final_sigmas_type": "sigma_min", "time_grid": "karras"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"time_grid": "quadratic"},
    {"time_grid": "linear", "denoising_step": True},
    {"analytical_first_step": True},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, grid",
    [(kind, grid) for kind in SOLVERS for grid in (GRIDS if kind == "genie" else GRIDS[:2])],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 25, 50, 99, 334, 500, 501, 999, 1000])
def test_any_number_of_steps_runs_to_the_end_without_a_timestep_twice(kind, count, grid):
    count -= int(count == 1000 and "analytical_first_step" in grid)
    scheduler = ready(count, kind, **grid)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == count
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] <= 999 and timesteps[-1] >= 0

    start_alpha, start_sigma = alpha_sigma(timesteps[0])
    z = noise(shape=(1, 2))
    x = run(scheduler, 0.7 * start_alpha + start_sigma * z, one_point)
    if grid.get("final_sigmas_type") != "sigma_min":
        torch.testing.assert_close(x, torch.full_like(x, 0.7), rtol=0, atol=1e-7)
    elif kind.startswith("genie"):  # the others are exact for one point at clean data only
        alpha, sigma = alpha_sigma(0)
        torch.testing.assert_close(x, 0.7 * alpha + sigma * z, rtol=0, atol=1e-7)
    assert torch.isfinite(x).all()


@every_solver
@pytest.mark.parametrize("count", [1, 2, 10, 333, 1000])
def test_continuous_process_runs_to_the_end_with_any_number_of_steps(kind, count):
    def alpha_sigma_continuous(t):
        time = float(t) / 999
        alpha_cumprod = float(np.exp(-(0.1 * time + 0.5 * 19.9 * time**2)))
        return alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5

    def one_point_continuous(x, t):
        alpha, sigma = alpha_sigma_continuous(t)
        return (x - 0.7 * alpha) / sigma

    scheduler = ready(count, kind, continuous=True)
    assert scheduler.timesteps.dtype == torch.float32
    alpha, sigma = alpha_sigma_continuous(scheduler.timesteps[0])
    x = run(scheduler, 0.7 * alpha + sigma * noise(), one_point_continuous)
    torch.testing.assert_close(x, torch.full_like(x, 0.7), rtol=0, atol=1e-4)


def test_custom_timesteps_are_visited_as_given():
    for timesteps in ([999, 800, 300, 7], torch.tensor([999, 800, 300, 7]), np.array([999, 800, 300, 7])):
        scheduler = GenieScheduler()
        scheduler.set_timesteps(timesteps=timesteps)
        assert scheduler.timesteps.tolist() == [999, 800, 300, 7]
        assert scheduler.num_inference_steps == 4


def test_custom_sigmas_are_visited_at_their_nearest_timesteps():
    scheduler = GenieScheduler()
    gammas = np.sqrt(1 / ALPHAS_CUMPROD - 1)
    scheduler.set_timesteps(sigmas=gammas[[999, 500, 20]] * 1.0001)  # as if rounded
    assert scheduler.timesteps.tolist() == [999, 500, 20]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*gammas[[999, 500, 20]], 0.0], rtol=1e-9)


@every_solver
@with_and_without_a_source
def test_start_mid_way_is_the_same_by_begin_index_by_lookup_and_by_custom_timesteps(kind, source):
    scheduler = ready(10, kind)
    scheduler.attach(source())
    remaining = scheduler.timesteps[4:]
    by_lookup = run(scheduler, noise(), timesteps=remaining)

    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    assert scheduler.begin_index == 4
    by_index = run(scheduler, noise(), timesteps=remaining)

    scheduler.set_timesteps(timesteps=remaining)
    assert scheduler.begin_index is None
    by_custom = run(scheduler, noise())
    torch.testing.assert_close(by_index, by_lookup, rtol=0, atol=0)
    torch.testing.assert_close(by_custom, by_lookup, rtol=0, atol=0)


@every_solver
def test_begin_index_abandons_a_run_under_way(kind):
    scheduler, fresh = ready(6, kind), ready(6, kind)
    run(scheduler, noise(9), timesteps=scheduler.timesteps[:3])  # another picture, interrupted
    scheduler.set_begin_index(0)
    torch.testing.assert_close(run(scheduler, noise()), run(fresh, noise()), rtol=0, atol=0)
    scheduler.set_begin_index(4)
    assert ("prediction", 1) not in scheduler.table[4]  # as printed before the run
    fresh.set_begin_index(4)
    remaining = fresh.timesteps[4:]
    torch.testing.assert_close(
        run(scheduler, noise(), timesteps=remaining), run(fresh, noise(), timesteps=remaining), rtol=0, atol=0
    )


def test_start_mid_way_begins_at_first_order_and_goes_on_at_second():
    scheduler = ready(10, "genie-taylor")
    t_0, t_1, t_2 = scheduler.timesteps[4:7]
    (alpha_0, sigma_0), (alpha_1, sigma_1), (alpha_2, sigma_2) = map(alpha_sigma, (t_0, t_1, t_2))
    gamma_0, gamma_1, gamma_2 = sigma_0 / alpha_0, sigma_1 / alpha_1, sigma_2 / alpha_2
    run(scheduler, noise(9), timesteps=scheduler.timesteps[:4])  # history of another picture must not matter
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)

    x_0 = noise()
    e_0 = two_peaks(x_0, t_0)
    x_1 = scheduler.step(e_0, t_0, x_0).prev_sample
    torch.testing.assert_close(x_1, alpha_1 * (x_0 / alpha_0 + (gamma_1 - gamma_0) * e_0))  # DDIM
    e_1 = two_peaks(x_1, t_1)
    x_2 = scheduler.step(e_1, t_1, x_1).prev_sample
    step, ratio = gamma_2 - gamma_1, (gamma_2 - gamma_1) / (gamma_1 - gamma_0)
    adams_bashforth = x_1 / alpha_1 + step * ((1 + ratio / 2) * e_1 - ratio / 2 * e_0)
    torch.testing.assert_close(x_2, alpha_2 * adams_bashforth)


def test_slope_source_replaces_the_history():
    scheduler, source = ready(4, "genie-taylor"), ConstantSlope()
    scheduler.attach(source)
    x = noise()
    levels = [alpha_sigma(t) for t in scheduler.timesteps] + [(1.0, 0.0)]
    for i, t in enumerate(scheduler.timesteps):
        (alpha, sigma), (alpha_next, sigma_next) = levels[i : i + 2]
        gamma, h = sigma / alpha, sigma_next / alpha_next - sigma / alpha
        epsilon = two_peaks(x, t)
        derivative = -0.125 / gamma if i < 3 else 0.0  # dε/dγ; the step to clean data is x_0
        expected = alpha_next * (x / alpha + h * epsilon + 0.5 * h**2 * derivative)
        x = scheduler.step(epsilon, t, x).prev_sample
        torch.testing.assert_close(x, expected)
    lambdas = [np.log(alpha / sigma) for alpha, sigma in levels[:-1]]
    assert [t for t, _ in source.calls] == scheduler.timesteps[:3].tolist()
    np.testing.assert_allclose([step for _, step in source.calls], np.diff(lambdas), rtol=1e-6)


def test_detaching_a_source_mid_way_goes_on_without_history():
    scheduler = ready(6)
    scheduler.attach(ConstantSlope())
    x = run(scheduler, noise(), timesteps=scheduler.timesteps[:3])
    scheduler.attach(None)
    detached = run(scheduler, x, timesteps=scheduler.timesteps[3:])

    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    torch.testing.assert_close(detached, run(scheduler, x, timesteps=scheduler.timesteps[3:]), rtol=0, atol=0)


@every_kind
@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@with_and_without_a_source
def test_an_edit_of_the_sample_changes_the_next_one_by_the_linear_response_only(kind, index, prediction_type, source):
    x, delta = noise(), noise(1)
    after = []
    for edit in (torch.zeros_like(x), delta):
        scheduler = ready(6, kind, prediction_type=prediction_type)
        scheduler.attach(source())
        denoise = lambda x, t: as_prediction(two_peaks(x, t), x, t, prediction_type)  # noqa: E731
        before = run(scheduler, x, denoise, timesteps=scheduler.timesteps[:index])
        t = scheduler.timesteps[index]
        generator = torch.Generator().manual_seed(1)
        after.append(scheduler.step(denoise(before, t), t, before + edit, generator).prev_sample)
    # The edit moves the sample, and the prediction as converted from the model's output, which is what it was.
    alpha, sigma = alpha_sigma(t)
    of_noise = {"epsilon": 0.0, "sample": 1 / sigma, "v_prediction": sigma}[prediction_type]
    of_data = {"epsilon": 1 / alpha, "sample": 0.0, "v_prediction": alpha}[prediction_type]
    row, folded = (defaultdict(float, table[index]) for table in (scheduler.table, scheduler.table.fold()))
    response = row["sample", 0] + folded["prediction", 0] * of_noise + folded["data", 0] * of_data
    torch.testing.assert_close(after[1] - after[0], response * delta)


@deterministic
def test_an_overwritten_sample_is_where_the_run_goes_on(kind):
    """Inpainting: the known half of every sample is replaced, and the other half does not notice."""
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[..., :2] = True
    known = torch.full(SHAPE, 0.5, dtype=torch.float64)
    inpainted, free = ready(8, kind), ready(8, kind)
    x = y = noise()
    for t in inpainted.timesteps:
        x = inpainted.step(two_peaks(x, t), t, x).prev_sample  # acts on each pixel alone
        y = free.step(two_peaks(y, t), t, y).prev_sample
        x = torch.where(mask, known, x)
    torch.testing.assert_close(x, torch.where(mask, known, y), rtol=0, atol=0)


# --- numerics --------------------------------------------------------------------------------------------------------


@every_kind
@with_and_without_a_source
@pytest.mark.parametrize("clips", [{}, {"clip_sample": True, "clip_sample_range": 0.8}], ids=["free", "clipped"])
def test_prediction_types_of_one_denoiser_give_the_same_samples(kind, source, clips):
    def sample(prediction_type):
        scheduler = ready(8, kind, prediction_type=prediction_type, **clips)
        scheduler.attach(source())
        return run(scheduler, noise(), lambda x, t: as_prediction(two_peaks(x, t), x, t, prediction_type))

    expected = sample("epsilon")
    torch.testing.assert_close(sample("sample"), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(sample("v_prediction"), expected, rtol=0, atol=1e-9)


def clip(data):
    return data.clamp(-0.8, 0.8)


def threshold(data):
    """Saharia et al. (2022), Section 2.3, one sample at a time."""
    clipped = []
    for sample in data:
        scale = min(max(np.quantile(sample.abs().numpy(), 0.7), 1.0), 1.5)
        clipped.append(sample.clamp(-scale, scale) / scale)
    return torch.stack(clipped)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "config, clipped",
    [
        ({"clip_sample": True, "clip_sample_range": 0.8}, clip),
        ({"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5}, threshold),
    ],
    ids=["clip_sample", "thresholding"],
)
def test_clipping_is_that_of_the_predicted_data(config, clipped, prediction_type):
    scheduler = ready(4, "genie-taylor", prediction_type=prediction_type, **config)
    scales = torch.tensor([0.5, 3.0], dtype=torch.float64).reshape(2, 1, 1, 1)  # the samples have their own scales
    x, history = noise(), []
    levels = [alpha_sigma(t) for t in scheduler.timesteps] + [(1.0, 0.0)]
    for i, t in enumerate(scheduler.timesteps):
        data = noise(i + 1) * scales
        (alpha, sigma), (alpha_next, sigma_next) = levels[i : i + 2]
        epsilon = (x - alpha * data) / sigma
        output = as_prediction(epsilon, x, t, prediction_type)
        assert not torch.equal(clipped(data), data)
        history.append((sigma / alpha, (x - alpha * clipped(data)) / sigma))
        # the last two clipped predictions, extrapolated linearly over the step in γ
        (gamma, value), (before, value_before) = history[-1], history[-2 if i else -1]
        h = sigma_next / alpha_next - gamma
        slope = (value - value_before) / (gamma - before) if 0 < i < 3 else 0.0
        expected = alpha_next * (x / alpha + h * value + 0.5 * h**2 * slope)
        x = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, clipped(data), rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_channels_are_dropped(kind, variance_type):
    scheduler, plain = ready(3, kind, variance_type=variance_type), ready(3, kind)
    both = run(scheduler, noise(), lambda x, t: torch.cat([two_peaks(x, t), noise(3)], dim=1))
    torch.testing.assert_close(both, run(plain, noise()), rtol=0, atol=0)


@deterministic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@with_and_without_a_source
def test_half_precision_costs_the_rounding_of_one_step(kind, dtype, prediction_type, source):
    half, full = ready(8, kind, prediction_type=prediction_type), ready(8, kind, prediction_type=prediction_type)
    half.attach(source())
    full.attach(source())
    x, history = noise(dtype=dtype), []
    for i, t in enumerate(half.timesteps):
        output = as_prediction(two_peaks(x.double(), t), x.double(), t, prediction_type).to(dtype)
        x_half = half.step(output, t, x).prev_sample
        expected = full.step(output.float(), t, x.float()).prev_sample
        assert x_half.dtype == dtype
        # half a unit in the last place for the sample, and for every ε in the history that had to be converted
        converted = 0.0
        if prediction_type != "epsilon":
            history.insert(0, two_peaks(x.float(), t).abs())
            weights = full.table[i].items()
            converted = sum(abs(weight) * history[lag] for (what, lag), weight in weights if what == "prediction")
        unit = torch.finfo(dtype).eps / 2
        assert ((x_half.float() - expected).abs() <= 1.02 * unit * (expected.abs() + converted) + 1e-6).all()
        x = x_half


@deterministic
def test_float32_run_agrees_with_float64(kind):
    double = run(ready(50, kind), noise())
    single = run(ready(50, kind), noise(dtype=torch.float32), lambda x, t: two_peaks(x.double(), t).float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


@every_kind
@pytest.mark.parametrize("shape", [(2, 24), (2, 6, 4), (2, 3, 2, 2, 2)], ids=["vector", "sequence", "video"])
def test_samples_of_any_number_of_dimensions_are_treated_alike(kind, shape):
    config = {"thresholding": True}
    images = run(ready(6, kind, **config), noise(shape=(2, 3, 2, 4)))
    others = run(ready(6, kind, **config), noise(shape=(2, 3, 2, 4)).reshape(shape))
    torch.testing.assert_close(others.reshape(images.shape), images, rtol=0, atol=0)


@deterministic
@pytest.mark.parametrize(
    "config", [{}, {"clip_sample": True}, {"thresholding": True}], ids=["free", "clip", "threshold"]
)
def test_samples_do_not_depend_on_the_split_into_batches(kind, config):
    x = noise(shape=(5, 3, 4, 4))
    whole = run(ready(6, kind, **config), x)
    parts = torch.cat([run(ready(6, kind, **config), part) for part in (x[:1], x[1:3], x[3:])])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.5}, {"thresholding": True}])
def test_a_source_is_given_the_prediction_of_the_model_and_counts_where_it_is_not_clipped(options):
    scheduler = GenieScheduler(time_grid="quadratic", **options)
    given = []

    def source(sample, noise_prediction, timestep, **kwargs):
        given.append(noise_prediction)
        return torch.ones_like(sample)

    scheduler.attach(source)
    scheduler.set_timesteps(20)
    data, output = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = float(scheduler.alphas[0]) * data + float(scheduler.noise_stds[0]) * output
    with_slope = scheduler.step(output, scheduler.timesteps[0], sample).prev_sample
    torch.testing.assert_close(given[0], output, rtol=0, atol=0)

    scheduler.attach(None)
    scheduler.set_timesteps(20)
    without_slope = scheduler.step(output, scheduler.timesteps[0], sample).prev_sample
    if "clip_sample" in options:
        held = data.abs() > 0.5
        assert held.any() and not held.all()
        assert torch.equal(with_slope[held], without_slope[held])
        assert not torch.isclose(with_slope[~held], without_slope[~held]).any()


@kinds("genie", "genie-taylor", "quasi-taylor")
@pytest.mark.parametrize("schedule", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 5e-4), (torch.float32, 1e-7)])
def test_the_step_from_pure_noise_loses_no_precision_to_cancellation(kind, schedule, dtype, rounding):
    scheduler = make(kind, **schedule, prediction_type="v_prediction", timestep_spacing="trailing")
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    ends = []
    for precision in (dtype, torch.float64):
        scheduler.set_timesteps(20)
        first = scheduler.timesteps[0]
        ends.append(scheduler.step(output.to(precision), first, sample.to(precision)).prev_sample.double())
    assert (ends[0] - ends[1]).norm() < rounding * ends[1].norm()


@pytest.mark.parametrize("method, slopes", [("hermite", 4), ("taylor", 3)])
def test_a_source_is_told_the_slope_that_the_history_knows(method, slopes):
    scheduler = GenieScheduler(time_grid="uniform_lambda", method=method)
    told = []

    def source(sample, noise_prediction, timestep, *, step, history_slope):
        told.append(history_slope)
        return torch.zeros_like(sample)

    scheduler.attach(source)
    for _ in range(2):  # the second run knows nothing of the first
        scheduler.set_timesteps(4)
        outputs = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
            scheduler.step(output, timestep, torch.ones_like(output))
        # the step to clean data needs none, but the corrector of the one before does
        assert told[0] is None and len(told) == slopes
        for index in range(1, slopes):
            width = scheduler.lambdas[index] - scheduler.lambdas[index - 1]
            torch.testing.assert_close(told[index], (outputs[index] - outputs[index - 1]) / width)
        told.clear()


def test_attaching_a_model_without_a_head_is_refused():
    model = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(ValueError, match="`source` must know slopes, which a plain `UNet2DModel` does not"):
        GenieScheduler().attach(model)

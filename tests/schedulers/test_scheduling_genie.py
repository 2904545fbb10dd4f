import math

import pytest
import torch
from diffusers import DDIMScheduler

from genie_diffusers import GenieScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class FirstOrderScheduler(GenieScheduler):
    """GENIE without derivatives and without history, which is DDIM."""

    def row(self, index, known):
        return super().row(index, known=1)


class PublishedSampler:
    """
    The sampler of the paper, written from its formulas alone: linear-β process, x̄ = x/α, γ = σ/α, striding in τ.

    Records the times that the network is called with.
    """

    def __init__(self, mixture, steps: int, striding: str, analytical_first_step: bool, denoising: bool):
        self.mixture, self.times = mixture, []
        self.analytical_first_step, self.denoising = analytical_first_step, denoising
        ramp = [step / steps for step in range(steps + 1)]
        if striding == "linear":
            self.taus = [1 + s * (1e-3 - 1) for s in ramp]
        else:
            self.taus = [(1 + s * (math.sqrt(1e-3) - 1)) ** 2 for s in ramp]

    def alpha(self, tau: float) -> float:
        return math.exp(-0.5 * (0.1 * tau + 0.5 * 19.9 * tau**2))

    def gamma(self, tau: float) -> float:
        return math.sqrt(1 / self.alpha(tau) ** 2 - 1)

    def noise_prediction(self, x_bar: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        alpha = 1 / torch.sqrt(1 + gamma**2)
        return self.mixture.noise_prediction(alpha * x_bar, alpha, gamma * alpha)

    def call_network(self, x_bar: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
        """ε and its total derivative in γ along dx̄/dγ = ε."""
        self.times.append(999 * tau)
        gamma = torch.tensor(self.gamma(tau), dtype=torch.float64)
        noise = self.noise_prediction(x_bar, gamma)
        return torch.func.jvp(self.noise_prediction, (x_bar, gamma), (noise, torch.ones_like(gamma)))

    def __call__(self, x_T: torch.Tensor) -> torch.Tensor:
        x_bar = x_T / self.alpha(1)
        for n, (tau, tau_next) in enumerate(zip(self.taus[:-1], self.taus[1:], strict=True)):
            if n == 0 and self.analytical_first_step:
                noise, derivative = x_T, 0.0
            else:
                noise, derivative = self.call_network(x_bar, tau)
            h = self.gamma(tau_next) - self.gamma(tau)
            x_bar = x_bar + h * noise + 0.5 * h**2 * derivative
        last = self.taus[-1]
        if not self.denoising:
            return self.alpha(last) * x_bar
        return x_bar - self.gamma(last) * self.call_network(x_bar, last)[0]


@pytest.mark.parametrize("denoising", [True, False], ids=["denoising", ""])
@pytest.mark.parametrize("analytical_first_step", [True, False], ids=["analytical first step", ""])
@pytest.mark.parametrize("striding", ["quadratic", "linear"])
@pytest.mark.parametrize("steps", [4, 10])
def test_the_published_sampler_is_reproduced(
    mixture, run, noise, slope_source, steps, striding, analytical_first_step, denoising
):
    published = PublishedSampler(mixture, steps, striding, analytical_first_step, denoising)
    scheduler = GenieScheduler(
        method="taylor",
        continuous=True,
        time_grid=striding,
        denoising_step=True,
        analytical_first_step=analytical_first_step,
        final_sigmas_type="zero" if denoising else "sigma_min",
    )
    source = slope_source(scheduler)
    scheduler.attach(source)
    network_calls = steps - analytical_first_step + denoising
    scheduler.set_timesteps(network_calls)
    x_T = noise(5, 2)
    torch.testing.assert_close(
        run(scheduler, scheduler.init_noise_sigma * x_T), published(x_T), rtol=1e-10, atol=1e-10
    )

    assert len(published.times) == len(scheduler.timesteps) == network_calls
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(published.times), rtol=1e-7, atol=0)
    called = published.taus[analytical_first_step:] if denoising else published.taus[analytical_first_step:-1]
    gammas = torch.tensor([published.gamma(tau) for tau in called], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas[:network_calls], gammas, rtol=1e-10, atol=0)
    assert len(source.calls) == network_calls - denoising  # the denoising step needs no slope


def test_a_slope_source_is_told_the_step_in_log_snr(run, noise, slope_source):
    scheduler = GenieScheduler(final_sigmas_type="sigma_min")
    source = slope_source(scheduler)
    scheduler.attach(source)
    scheduler.set_timesteps(6)
    run(scheduler, noise(2, 2))
    steps = torch.tensor([call["step"] for call in source.calls], dtype=torch.float64)
    torch.testing.assert_close(steps, -scheduler.sigmas.log().diff())
    assert torch.all(steps > 0)


def test_without_a_source_it_is_adams_bashforth_in_gamma(mixture, run, noise):
    scheduler = GenieScheduler(method="taylor", time_grid="quadratic")
    scheduler.set_timesteps(7)
    gammas = scheduler.sigmas.tolist()
    x_bar, previous, old_step = noise(5, 2) * math.sqrt(1 + gammas[0] ** 2), None, None
    for n in range(7):
        h, alpha = gammas[n + 1] - gammas[n], 1 / math.sqrt(1 + gammas[n] ** 2)
        noise_prediction = mixture.noise_prediction(alpha * x_bar, alpha, gammas[n] * alpha)
        if n == 0 or n == 6:  # no history yet; the step to clean data is x_0 itself
            x_bar = x_bar + h * noise_prediction
        else:
            x_bar = x_bar + h * noise_prediction + 0.5 * h**2 * (noise_prediction - previous) / old_step
        previous, old_step = noise_prediction, h
    torch.testing.assert_close(run(scheduler, noise(5, 2)), x_bar, rtol=1e-10, atol=1e-10)


def test_a_run_that_begins_mid_way_begins_without_history():
    schedulers = [cls(interpolation_order=2) for cls in (GenieScheduler, GenieScheduler, FirstOrderScheduler)]
    whole, late, first_order = schedulers
    for scheduler in schedulers:
        scheduler.set_timesteps(6)
    late.set_begin_index(2)
    assert late.table[2] == first_order.table[2] != whole.table[2]
    assert late.table[3] == whole.table[3] != first_order.table[3]


def ddim(prediction_type: str, **config) -> DDIMScheduler:
    """DDIM of diffusers with its alphas in float64."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **config)
    process = GenieScheduler(**config).process
    scheduler.alphas_cumprod = torch.from_numpy(process.alpha(range(1000)) ** 2)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_first_step_without_a_source_is_that_of_ddim(noise, prediction_type, beta_schedule):
    theirs = ddim(prediction_type, beta_schedule=beta_schedule)
    theirs.set_timesteps(10)
    ours = GenieScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    x, model_output, t = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), theirs.timesteps[0]
    expected = theirs.step(model_output, t, x).prev_sample
    torch.testing.assert_close(ours.step(model_output, t, x).prev_sample, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_derivatives_and_history_it_is_ddim_at_every_step(run, noise, prediction_type):
    theirs = ddim(prediction_type)
    theirs.set_timesteps(10)
    ours = FirstOrderScheduler(method="taylor", prediction_type=prediction_type)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    theirs.sigmas = ours.sigmas  # which the exact denoiser reads
    torch.testing.assert_close(run(ours, noise(5, 2)), run(theirs, noise(5, 2)), rtol=1e-9, atol=1e-9)


def test_one_step_to_clean_data_is_the_predicted_data(noise):
    scheduler = GenieScheduler()
    scheduler.set_timesteps(1)
    x, model_output, t = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1), int(scheduler.timesteps[0])
    alpha_squared = float(scheduler.alphas_cumprod[t])
    expected = (x - math.sqrt(1 - alpha_squared) * model_output) / math.sqrt(alpha_squared)
    torch.testing.assert_close(scheduler.step(model_output, t, x).prev_sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_source", [True, False], ids=["source", ""])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clipping_where_nothing_is_clipped_changes_nothing(run, noise, slope_source, prediction_type, with_source):
    def sample(**clipping):
        scheduler = GenieScheduler(continuous=True, prediction_type=prediction_type, time_grid="quadratic", **clipping)
        scheduler.attach(slope_source(scheduler) if with_source else None)
        scheduler.set_timesteps(8)
        return run(scheduler, noise(5, 2))

    free = sample()
    torch.testing.assert_close(sample(clip_sample=True, clip_sample_range=100.0), free, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sample(clip_sample=True, clip_sample_range=0.3), free, rtol=1e-2)


@pytest.mark.parametrize(
    "config", [{}, {"continuous": True, "time_grid": "quadratic"}], ids=["discrete", "continuous"]
)
def test_the_analytical_first_step_is_a_rescaling_of_the_initial_noise(config):
    """x̄₁ = x̄₀ + (γ₁ − γ₀) x_T, the first-order step with ε(x_T) := x_T."""
    whole = GenieScheduler(**config)
    whole.set_timesteps(9)
    scheduler = GenieScheduler(**config, analytical_first_step=True)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == whole.timesteps.tolist()[1:]
    gamma_0, gamma_1 = whole.sigmas[:2].tolist()
    expected = (math.sqrt(1 + gamma_0**2) + gamma_1 - gamma_0) / math.sqrt(1 + gamma_1**2)
    assert scheduler.init_noise_sigma == pytest.approx(expected, rel=1e-12)
    x_T = torch.ones(1, 2, dtype=torch.float64)
    by_step = whole.step(x_T, whole.timesteps[0], x_T).prev_sample
    torch.testing.assert_close(scheduler.init_noise_sigma * x_T, by_step, rtol=1e-10, atol=0)
    assert whole.init_noise_sigma == 1.0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "source", [None, lambda sample, *args, **kwargs: torch.zeros_like(sample)], ids=["", "source"]
)
def test_steps_never_wait_for_the_device(prediction_type, source):
    """Reading a value of a tensor on the meta device is an error."""
    scheduler = GenieScheduler(prediction_type=prediction_type, time_grid="quadratic")
    scheduler.attach(source)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.empty(2, 3, 4, 4, device="meta")
    for timestep in scheduler.timesteps:
        assert timestep.device.type == "meta"
        sample = scheduler.step(torch.empty_like(sample), timestep, sample).prev_sample
    assert scheduler.step_index == 5


@pytest.mark.parametrize("clipping", [{"clip_sample": True}, {"thresholding": True}], ids=["clip", "threshold"])
def test_clipping_never_waits_for_the_device(clipping):
    scheduler = GenieScheduler(**clipping)
    scheduler.set_timesteps(3, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.empty(2, 3, 4, 4, device="meta")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.empty_like(sample), timestep, sample).prev_sample


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'euler'"):
        GenieScheduler(method="euler").set_timesteps(5)


@pytest.mark.parametrize("order", [0, 5, 2.5])
def test_an_impossible_order_is_refused(order):
    with pytest.raises(ValueError, match="interpolation_order"):
        GenieScheduler(interpolation_order=order).set_timesteps(5)


@pytest.mark.parametrize("with_slopes, expected", [(False, {0, 1, 2, 3}), (True, {0, 1})])
def test_the_default_order_is_four_values_or_two_values_and_a_slope(with_slopes, expected):
    scheduler = GenieScheduler()
    if with_slopes:
        scheduler.attach(lambda sample, noise_prediction, timestep, **kwargs: torch.zeros_like(sample))
    scheduler.set_timesteps(8)
    row = scheduler.table[5]
    assert {lag for what, lag in row if what == "prediction"} == expected
    assert {lag for what, lag in row if what == "slope"} == ({0} if with_slopes else set())

"""gDDIM: what it reduces to, its stochastic steps, its integrals, and its contract."""

import inspect
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler
from scipy.integrate import quad_vec, solve_ivp

from genie_diffusers import (
    Blurring,
    CriticallyDampedLangevin,
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMScheduler,
    GenieScheduler,
    LinearDiffusion,
    LinearDiffusionScheduler,
)
from genie_diffusers.core.interpolation import exponential_moments, interpolation_weights
from genie_diffusers.core.solvers.gddim import integral_weights, square_root, stochastic_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

SIZE = (3, 4)
SCHEDULERS = {
    "vp": (GDDIMScheduler, {}),
    "cld": (GDDIMCLDScheduler, {}),
    "blurring": (GDDIMBlurringScheduler, {"sample_size": SIZE}),
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def build(name: str, **config) -> LinearDiffusionScheduler:
    scheduler_class, defaults = SCHEDULERS[name]
    return scheduler_class(**{**defaults, **config})


def pictures(count: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, *SIZE))


def transposed(matrix: np.ndarray) -> np.ndarray:
    return matrix.swapaxes(-1, -2)


# --- a single data point ---------------------------------------------------------------------------------------------


@every_scheduler
@pytest.mark.parametrize("num_inference_steps", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"corrector": True}, {"multistep_order": 1, "eta": 0.7}], ids=str)
def test_a_single_data_point_is_sampled_exactly_with_any_number_of_steps(
    linear_mixture, noise, name, num_inference_steps, options
):
    scheduler, data = build(name, **options), pictures()
    problem = linear_mixture(scheduler.process, data, std=0.0)
    scheduler.set_timesteps(num_inference_steps)
    start = scheduler.process.prior(noise(3, scheduler.process.weight_shape[-1], *SIZE))
    end = problem.sample(scheduler, start, torch.Generator().manual_seed(0))
    expected = torch.from_numpy(data).expand(3, 1, *SIZE)
    # a correction is the difference of two extrapolations, so that rounding grows
    tolerance = 1e-4 if options.get("corrector") else 1e-6
    torch.testing.assert_close(scheduler.process.pictures(end), expected, rtol=0, atol=tolerance)


def path_predictions(linear_mixture, noise, name: str, parametrization: str, count: int = 12) -> np.ndarray:
    """ε_K along the exact path of a single data point."""
    process = build(name).process
    problem = linear_mixture(process, pictures(), std=0.0)
    state = process.prior(noise(2, process.weight_shape[-1], *SIZE))
    origin = process.timestep_data
    times = origin + np.geomspace(process.timestep_max - origin, process.timestep_min - origin, count)
    found = []
    for i, time in enumerate(times):
        state = state if i == 0 else problem.solve(state, times[i - 1], time)
        blocks = problem.block_prediction(problem.to_blocks(state.numpy()), time)
        # the same score: ε_K = Kᵀ R^{−T} ε_R
        change = transposed(square_root(process, time, parametrization)) @ transposed(
            np.linalg.inv(process.root(time))
        )
        found.append(change @ blocks)
    return np.array(found)


@every_scheduler
def test_noise_prediction_of_one_point_is_constant_along_the_exact_path_with_r(linear_mixture, noise, name):
    found = path_predictions(linear_mixture, noise, name, "R")
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-5)


def test_noise_prediction_of_one_point_turns_along_the_exact_path_with_the_cholesky_root(linear_mixture, noise):
    found = path_predictions(linear_mixture, noise, "cld", "L")
    relative = np.linalg.norm((found - found[0]).reshape(len(found), -1), axis=1) / np.linalg.norm(found[0])
    assert relative.max() > 1.0
    # it turns, and keeps its length
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=-2), np.linalg.norm(found[:1], axis=-2) + 0 * found[:, :, 0], rtol=1e-5
    )


# --- variance preserving ---------------------------------------------------------------------------------------------


def levels(scheduler) -> tuple[np.ndarray, np.ndarray]:
    return scheduler.alphas, scheduler.noise_stds


def test_order_one_is_ddim():
    scheduler = build("vp", multistep_order=1)
    scheduler.set_timesteps(20)
    alpha, sigma = levels(scheduler)
    for i, row in enumerate(scheduler.table):
        ratio = alpha[i + 1] / alpha[i]
        assert row["sample", 0] == pytest.approx(ratio, rel=1e-13)
        assert row["prediction", 0] == pytest.approx(sigma[i + 1] - ratio * sigma[i], rel=1e-12)
        assert set(row) == {("sample", 0), ("prediction", 0)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_order_one_steps_as_ddim_of_diffusers(noise, prediction_type, clip_sample):
    config = {"prediction_type": prediction_type, "clip_sample": clip_sample, "timestep_spacing": "trailing"}
    theirs = DDIMScheduler(**config)
    ours = GDDIMScheduler.from_config(theirs.config, multistep_order=1)
    sample = noise(2, 3, 4, 4)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        state = sample
        for timestep in scheduler.timesteps:
            options = {"use_clipped_model_output": True} if scheduler is theirs else {}
            state = scheduler.step(0.5 * torch.tanh(state), timestep, state, **options).prev_sample
        results.append(state)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_eta_one_is_the_ddpm_posterior():
    scheduler = build("vp", multistep_order=1, eta=1.0)
    scheduler.set_timesteps(20)
    alpha, sigma = levels(scheduler)
    for i, row in enumerate(scheduler.table[:-1]):
        ratio = alpha[i] / alpha[i + 1]  # √(1 − β) of this step
        beta = 1 - ratio**2
        # Ho et al. (2020), Eqs. 7 and 11
        assert row["noise", 0] ** 2 == pytest.approx(sigma[i + 1] ** 2 / sigma[i] ** 2 * beta, rel=1e-10)
        assert row["sample", 0] == pytest.approx(1 / ratio, rel=1e-12)
        assert row["prediction", 0] == pytest.approx(-beta / (ratio * sigma[i]), rel=1e-10)
    assert ("noise", 0) not in scheduler.table[-1]


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
def test_noise_of_other_strengths_has_its_formula(eta):
    scheduler = build("vp", multistep_order=1, eta=eta)
    scheduler.set_timesteps(20)
    alpha, sigma = levels(scheduler)
    gamma = sigma / alpha
    for i, row in enumerate(scheduler.table[:-1]):
        expected = sigma[i + 1] ** 2 * (1 - (gamma[i + 1] / gamma[i]) ** (2 * eta**2))
        assert row["noise", 0] ** 2 == pytest.approx(expected, rel=1e-10)
        # the marginal of a single data point is kept: what is left of its noise, and the fresh noise
        kept = row["sample", 0] * sigma[i] + row["prediction", 0]
        assert kept**2 + row["noise", 0] ** 2 == pytest.approx(sigma[i + 1] ** 2, rel=1e-10)


@pytest.mark.parametrize("multistep_order", [2, 3, 4])
def test_multistep_is_deis_in_closed_form(multistep_order):
    """C_j = −α_s ∫ e^{−λ} ℓ_j(λ) dλ, the exponential integrator of DEIS in λ."""
    scheduler = build("vp", multistep_order=multistep_order)
    scheduler.set_timesteps(10)
    lambdas = scheduler.lambdas
    for i, row in enumerate(scheduler.table[:-1]):
        count = min(i + 1, multistep_order)
        nodes = [lambdas[i - lag] - lambdas[i] for lag in range(count)]
        moments = exponential_moments(lambdas[i + 1] - lambdas[i], count, rate=-1.0)
        expected = (
            -scheduler.alphas[i + 1] * math.exp(-lambdas[i]) * interpolation_weights(nodes, [0] * count, moments)
        )
        np.testing.assert_allclose([row["prediction", lag] for lag in range(count)], expected, rtol=1e-8)


@pytest.mark.parametrize("multistep_order", [2, 3])
def test_multistep_steps_as_deis_of_diffusers(noise, multistep_order):
    theirs = DEISMultistepScheduler(solver_order=multistep_order, lower_order_final=False)
    ours = GDDIMScheduler.from_config(theirs.config, multistep_order=multistep_order)
    sample, results = noise(2, 3, 4, 4), []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(12)
        state = sample
        for timestep in scheduler.timesteps[:-1]:  # DEIS of diffusers does not end at clean data
            state = scheduler.step(0.5 * torch.tanh(state), timestep, state).prev_sample
        results.append(state)
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


# --- integrals and stochastic steps, for matrices and frequencies ----------------------------------------------------


@pytest.mark.parametrize("parametrization", ["R", "L"])
@pytest.mark.parametrize("process", [CriticallyDampedLangevin(), Blurring(SIZE)], ids=["cld", "blurring"])
@pytest.mark.parametrize("step", [(900.0, 700.0), (60.0, 5.0), (30.0, None), (500.0, None)], ids=str)
def test_weights_are_the_integrals_of_lagrange_polynomials(process, parametrization, step):
    start, end = step[0], step[1] or process.timestep_min
    nodes = [start, start + 25.0, start + 60.0]

    def integrand(log_time, j):
        time = np.exp(log_time)
        lagrange = np.prod([(time - node) / (nodes[j] - node) for node in nodes if node != nodes[j]])
        inverse = transposed(np.linalg.inv(square_root(process, time, parametrization)))
        return time * lagrange * 0.5 * process.transition(end, time) @ process.diffusion(time) @ inverse

    found = integral_weights(process, start, end, nodes, parametrization=parametrization)
    for j, weight in enumerate(found):
        expected, _ = quad_vec(integrand, np.log(start), np.log(end), epsabs=1e-13, epsrel=1e-12, args=(j,))
        np.testing.assert_allclose(weight, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("eta", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("process", [CriticallyDampedLangevin(), Blurring((2, 1))], ids=["cld", "blurring"])
@pytest.mark.parametrize("step", [(990.0, 600.0), (60.0, 5.0)], ids=str)
def test_stochastic_step_has_the_covariance_of_its_differential_equation(process, eta, step):
    """Ψ̂ of F̂ = F + ½(1 + η²) G Gᵀ Σ^{−1}, and dP/dτ = F̂ P + P F̂ᵀ − η² G Gᵀ, P = 0 at the start."""
    start, end = step
    shape = process.weight_shape

    def derivative(time, flat):
        transition, spread = flat.reshape(2, *shape)
        diffusion = process.diffusion(time)
        drift = process.drift(time) + 0.5 * (1 + eta**2) * diffusion @ np.linalg.inv(process.covariance(time))
        change = drift @ spread
        return np.stack([drift @ transition, change + transposed(change) - eta**2 * diffusion]).ravel()

    identity = np.broadcast_to(np.eye(shape[-1]), shape)
    initial = np.stack([identity, 0 * identity]).ravel()
    solution = solve_ivp(derivative, (start, end), initial, method="DOP853", rtol=1e-11, atol=1e-13)
    transition, covariance = solution.y[:, -1].reshape(2, *shape)
    of_prediction, of_noise = stochastic_weights(process, start, end, eta)
    np.testing.assert_allclose(of_noise @ transposed(of_noise), covariance, rtol=1e-7, atol=1e-10)
    expected = (transition - process.transition(end, start)) @ process.root(start)
    np.testing.assert_allclose(of_prediction, expected, rtol=1e-7, atol=1e-9)


@every_scheduler
def test_stochastic_samples_have_the_covariance_of_the_process(linear_mixture, name):
    """Many samples of a single data point, half way down: mean Ψ u_0, covariance Σ."""
    scheduler = build(name, multistep_order=1, eta=1.0)
    process, generator = scheduler.process, torch.Generator().manual_seed(0)
    problem = linear_mixture(process, pictures(), std=0.0)
    scheduler.set_timesteps(6)
    shape = (20000, process.weight_shape[-1], *SIZE)
    state = process.prior(torch.randn(shape, generator=generator, dtype=torch.float64))
    for index, timestep in enumerate(scheduler.timesteps[:4]):
        prediction = problem.noise_prediction(state, scheduler._host_timesteps[index])
        state = scheduler.step(prediction, timestep, state, generator).prev_sample
    arrived = scheduler._host_timesteps[4]
    blocks = problem.to_blocks(state.numpy()) - process.mean(arrived) @ problem.means
    covariance = (blocks @ transposed(blocks)).mean(0) / blocks.shape[-1]
    # 20,000 samples or more: five standard deviations of a variance are 5 % of it
    scale = np.sqrt(np.einsum("...ii->...i", process.covariance(arrived)))
    difference = (covariance - process.covariance(arrived)) / (scale[..., :, None] * scale[..., None, :])
    assert np.abs(difference).max() < 0.05


@every_scheduler
def test_noise_is_the_same_for_every_split_of_the_batch(noise, name):
    scheduler = build(name, multistep_order=1, eta=1.0)
    state = noise(4, 2, *SIZE)

    def run(rows):
        scheduler.set_timesteps(5)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        sample = state[rows]
        for timestep in scheduler.timesteps:
            sample = scheduler.step(0.5 * torch.tanh(sample), timestep, sample, generators).prev_sample
        return sample

    torch.testing.assert_close(run([0, 1, 2, 3])[2:], run([2, 3]))


# --- critically-damped Langevin --------------------------------------------------------------------------------------


def test_both_roots_take_the_same_denoising_and_stochastic_steps(noise):
    state, prediction = noise(2, 2, *SIZE), noise(2, 2, *SIZE, seed=1)
    for options, steps in (({}, 1), ({"multistep_order": 1, "eta": 1.0}, 4)):
        ends = []
        for parametrization in ("R", "L"):
            scheduler = build("cld", parametrization=parametrization, **options)
            scheduler.set_timesteps(steps)
            step = scheduler.step(prediction, scheduler.timesteps[0], state, torch.Generator().manual_seed(0))
            ends.append(step.prev_sample)
        torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("cld", {}), ("cld", {"parametrization": "L"}), ("blurring", {})], ids=str
)
def test_a_preconditioned_model_samples_like_the_one_it_stands_for(linear_mixture, noise, name, options, corrector):
    data = pictures(3)
    ends = []
    for preconditioned in (False, True):
        scheduler = build(name, corrector=corrector, preconditioned=preconditioned, **options)
        process = scheduler.process
        problem = linear_mixture(process, data)
        scheduler.set_timesteps(25)
        state = process.prior(noise(2, process.weight_shape[-1], *SIZE))
        for index, timestep in enumerate(scheduler.timesteps):
            time = scheduler._host_timesteps[index]
            prediction = problem.noise_prediction(state, time)
            model_input = scheduler.scale_model_input(state, timestep)
            if preconditioned:
                scaling, of_state, of_output = process.preconditioning(time)
                torch.testing.assert_close(model_input, process.combine([torch.from_numpy(scaling)], [state]))
                to_output = np.linalg.inv(of_output)
                weights = [torch.from_numpy(weight) for weight in (to_output, -to_output @ of_state)]
                prediction = process.combine(weights, [prediction, state])
            else:
                assert model_input is state
            state = scheduler.step(prediction, timestep, state).prev_sample
        ends.append(state)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_what_the_preconditioned_blurring_model_predicts_is_the_picture_without_blur(noise):
    """x_0 = α y − σ v for the v that belongs to the true noise."""
    process, picture, drawn = Blurring(SIZE), torch.from_numpy(pictures()), noise(1, 1, *SIZE)
    for time in (1.0, 200.0, 600.0):
        state = process.add_noise(picture, drawn, torch.tensor([time]))
        _, of_state, of_output = process.preconditioning(time)
        weights = [torch.from_numpy(weight) for weight in (1 / of_output, -of_state / of_output)]
        output = process.combine(weights, [drawn, state])
        recovered = float(process.alpha(time)) * state - float(process.sigma(time)) * output
        torch.testing.assert_close(recovered, picture, rtol=1e-9, atol=1e-9)


# --- configuration and errors ----------------------------------------------------------------------------------------


@every_scheduler
def test_configuration_survives_saving_and_loading(tmp_path, name):
    given = {"multistep_order": 3, "corrector": True, "time_grid": "linear", "final_sigmas_type": "sigma_min"}
    scheduler = build(name, **given)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in given} == given
    scheduler.set_timesteps(5)
    loaded.set_timesteps(5)
    for ours, theirs in zip(scheduler.table, loaded.table, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[column], theirs[column]) for column in ours)


@every_scheduler
def test_options_survive_from_config_twice(name):
    given = {"multistep_order": 3, "corrector": True, "time_grid": "linear"}
    scheduler = type(build(name)).from_config(build(name).config, **given)
    again = type(scheduler).from_config(scheduler.config)
    assert {key: again.config[key] for key in given} == given


def test_keys_of_our_own_are_no_keys_of_diffusers():
    # `eta` is the strength of a stochastic sampler there too
    own = set().union(*(build(name).config for name in SCHEDULERS)) - set(GenieScheduler().config) - {"eta"}
    assert {"multistep_order", "corrector", "interpolation", "parametrization", "preconditioned"} <= own
    for name in dir(diffusers):
        if name.endswith("Scheduler") and hasattr(getattr(diffusers, name), "from_config"):
            assert not own & set(inspect.signature(getattr(diffusers, name).__init__).parameters), name


@pytest.mark.parametrize("name", ["cld", "blurring"])
@pytest.mark.parametrize("load", ["from_config", "from_pretrained"])
def test_configuration_of_a_variance_preserving_model_is_refused(tmp_path, name, load):
    DDIMScheduler().save_pretrained(tmp_path)
    given = tmp_path if load == "from_pretrained" else DDIMScheduler().config
    with pytest.raises(ValueError, match=r"variance-preserving one .*`GDDIMScheduler` samples"):
        getattr(SCHEDULERS[name][0], load)(given)


@every_scheduler
@pytest.mark.parametrize(
    "option",
    [
        {"multistep_order": 5},
        {"interpolation": "time"},
        {"eta": -1.0},
        {"eta": 0.5, "multistep_order": 2},
        {"eta": 0.5, "multistep_order": 1, "corrector": True},
        {"time_grid": "cubic"},
        {"final_sigmas_type": "one"},
    ],
    ids=str,
)
def test_options_that_do_not_exist_are_named(name, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}`? must"):
        build(name, **option).set_timesteps(5)


def test_parametrization_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="`parametrization` must be one of R, L"):
        build("cld", parametrization="K").set_timesteps(5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (5,)])
def test_langevin_states_of_the_wrong_shape_are_refused(shape):
    scheduler = build("cld", preconditioned=True)
    scheduler.set_timesteps(5)
    for call in (scheduler.scale_model_input, lambda *args: scheduler.step(torch.zeros(shape), args[1], args[0])):
        with pytest.raises(ValueError, match="`sample` must be a state of shape"):
            call(torch.zeros(shape), scheduler.timesteps[0])


def test_pictures_of_another_size_are_refused():
    scheduler = build("blurring")
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"`sample_size`, whose frequencies .* got \(4, 4\)"):
        scheduler.step(torch.zeros(2, 1, 4, 4), scheduler.timesteps[0], torch.zeros(2, 1, 4, 4))


@every_scheduler
def test_timesteps_out_of_range_are_refused(name):
    scheduler = build(name)
    with pytest.raises(ValueError, match="`timesteps` must strictly decrease and lie between"):
        scheduler.set_timesteps(timesteps=[2000, 10])
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep` must be one of the timesteps of this run"):
        scheduler.step(torch.zeros(1, 2, *SIZE), 1.5, torch.zeros(1, 2, *SIZE))


def test_an_error_in_a_step_leaves_the_run_as_it_was(noise):
    scheduler = build("cld")
    scheduler.set_timesteps(4)
    state = noise(2, 2, *SIZE)
    first = scheduler.step(state, scheduler.timesteps[0], state).prev_sample
    with pytest.raises(ValueError):
        scheduler.step(state[:, :1], scheduler.timesteps[1], state[:, :1])
    scheduler.step(state, scheduler.timesteps[1], first)
    assert scheduler.step_index == 2


# --- a process of one's own ------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_samples_its_process(linear_mixture, noise, tmp_path):
    """The code block in docs/gddim.md, run as it stands."""
    page = (Path(__file__).parents[2] / "docs" / "gddim.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if "class VarianceExploding" in block).split("```")[0]
    names: dict = {}
    exec(code, names)
    process: LinearDiffusion = names["VarianceExploding"]()
    names["VarianceExplodingScheduler"](final_sigmas_type="sigma_min", multistep_order=3).save_pretrained(tmp_path)
    scheduler = names["VarianceExplodingScheduler"].from_pretrained(tmp_path)
    problem = linear_mixture(process, np.array([[1.2, 0.3], [-0.7, 1.0], [-0.4, -1.1]]))
    start = process.prior(noise(6, 2))
    scheduler.set_timesteps(60)
    expected = problem.solve(start, process.timestep_max, process.timestep_min)
    torch.testing.assert_close(problem.sample(scheduler, start), expected, rtol=1e-2, atol=1e-2)
    assert all(isinstance(weight, float) for row in scheduler.table for weight in row.values())

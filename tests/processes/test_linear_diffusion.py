"""What every linear diffusion must satisfy, for the closed forms and for the adaptive integration."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from genie_diffusers import Blurring, CriticallyDampedLangevin, LinearDiffusion, VariancePreserving

PROCESSES = {
    "vp": lambda: VariancePreserving.from_config({"continuous": True}),
    "cld": CriticallyDampedLangevin,
    "cld, other": lambda: CriticallyDampedLangevin(
        500, langevin_beta=3.0, friction=0.7, initial_velocity_variance=0.1
    ),
    "blurring": lambda: Blurring((5, 4)),
    "blurring, weak": lambda: Blurring(3, blur_sigma=1.5, blur_minimum=0.2),
}
every_process = pytest.mark.parametrize("name", PROCESSES)


def transposed(matrix: np.ndarray) -> np.ndarray:
    return matrix.swapaxes(-1, -2)


def inner(process: LinearDiffusion, count: int = 40) -> np.ndarray:
    """Timesteps between both ends, denser at the data."""
    return np.geomspace(process.timestep_min, process.timestep_max, count)


def assert_solves(process, function, derivative):
    """function(b) − function(a) = ∫ derivative over adjacent intervals, to ten digits."""
    points, weights = np.polynomial.legendre.leggauss(40)
    times = inner(process)
    for start, end in pairwise(times):
        nodes = start * (end / start) ** ((points + 1) / 2)
        integral = np.tensordot(weights * nodes * np.log(end / start) / 2, derivative(nodes), axes=1)
        np.testing.assert_allclose(function(end) - function(start), integral, rtol=0, atol=1e-10)


@every_process
def test_root_is_a_square_root_of_the_covariance(name):
    process = PROCESSES[name]()
    root = process.root(inner(process))
    np.testing.assert_allclose(root @ transposed(root), process.covariance(inner(process)), rtol=1e-10, atol=1e-14)


@every_process
def test_mean_covariance_and_root_solve_their_differential_equations(name):
    process = PROCESSES[name]()

    def covariance_derivative(timesteps):
        spread = process.drift(timesteps) @ process.covariance(timesteps)
        return spread + transposed(spread) + process.diffusion(timesteps)

    def root_derivative(timesteps):
        root = process.root(timesteps)
        return process.drift(timesteps) @ root + 0.5 * process.diffusion(timesteps) @ transposed(np.linalg.inv(root))

    assert_solves(process, process.mean, lambda t: process.drift(t) @ process.mean(t))
    assert_solves(process, process.covariance, covariance_derivative)
    assert_solves(process, process.root, root_derivative)


@every_process
def test_transitions_compose_and_carry_the_mean_both_ways(name):
    process = PROCESSES[name]()
    early, middle, late = inner(process, 7)[[1, 3, 6]]
    for start, end in ((early, late), (late, early)):
        through = process.transition(end, middle) @ process.transition(middle, start)
        np.testing.assert_allclose(process.transition(end, start), through, rtol=1e-9)
        np.testing.assert_allclose(
            process.transition(end, start) @ process.mean(start), process.mean(end), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("name", ["cld", "cld, other"])
def test_adaptive_integration_agrees_with_the_closed_forms(name):
    process = PROCESSES[name]()
    for function in ("mean", "covariance", "root"):
        numeric = getattr(LinearDiffusion, function)(process, inner(process))
        np.testing.assert_allclose(numeric, getattr(process, function)(inner(process)), rtol=1e-9, atol=1e-11)


def test_langevin_starts_at_its_initial_covariance_and_ends_at_the_stationary_one():
    process = CriticallyDampedLangevin()
    np.testing.assert_allclose(process.covariance(0.0), np.diag([1e-6, 0.04 / 4 + 1e-6]), rtol=1e-14)
    np.testing.assert_allclose(process.root(0.0), np.diag([1e-3, np.sqrt(0.04 / 4 + 1e-6)]), rtol=1e-14)
    np.testing.assert_allclose(process.covariance(999.0), np.diag([1.0, 0.25]), atol=2e-5)
    # the paper's: friction 1, M⁻¹ = 4, β = 4 per unit of time
    np.testing.assert_allclose(process.drift(3.0) * 999, 4 * np.array([[0, 4], [-1, -4]]), rtol=1e-14)
    np.testing.assert_allclose(process.diffusion(3.0) * 999, np.diag([0, 8]), rtol=1e-14)


def test_blurring_follows_the_published_schedule():
    process = Blurring((6, 8))
    time = np.array([1e-5, 0.3, 0.9])
    height, width = np.meshgrid(np.arange(6) / 6, np.arange(8) / 8, indexing="ij")
    alpha = np.cos((time + 0.004) / 1.008 * np.pi / 2)
    dissipation = 0.5 * (10 * np.sin(np.pi * time / 2) ** 2) ** 2
    blur = 0.999 * np.exp(-(np.pi**2) * (height**2 + width**2) * dissipation[:, None, None]) + 0.001
    np.testing.assert_allclose(process.mean(999 * time)[..., 0, 0], alpha[:, None, None] * blur, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(999 * time) ** 2, 1 - alpha**2, rtol=1e-9)
    assert process.gamma(process.timestep_max) == pytest.approx(80.0)
    assert process.timestep_max / 999 == pytest.approx(0.996, abs=1e-3)
    assert process.timestep_min / 999 == pytest.approx(1e-5)


@every_process
def test_log_snr_decreases_and_is_inverted(name):
    process = PROCESSES[name]()
    log_snr = process.log_snr(inner(process))
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(process.timestep(log_snr), inner(process), rtol=1e-9)


# States


def state_of(process: LinearDiffusion, seed: int = 0, channels: int = 2) -> torch.Tensor:
    size = process.sample_size if isinstance(process, Blurring) else (3, 2)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, process.weight_shape[-1] * channels, *size, generator=generator, dtype=torch.float64)


def pictures_of(process: LinearDiffusion) -> torch.Tensor:
    return process.pictures(state_of(process, seed=1)).contiguous()


@every_process
def test_marginal_samples_have_the_mean_and_the_root(name):
    process, timesteps = PROCESSES[name](), torch.tensor([20.0, 300.0, 480.0])
    pictures, noise = pictures_of(process), state_of(process)
    noisy = process.add_noise(pictures, noise, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        mean, root = process.mean(timestep), process.root(timestep)
        clean, drawn = process.state(pictures)[i].numpy(), noise[i].numpy()
        if isinstance(process, Blurring):
            frequencies = mean[..., 0, 0] * dctn(clean, axes=(1, 2), norm="ortho")
            expected = idctn(frequencies, axes=(1, 2), norm="ortho") + process.sigma(timestep) * drawn
        else:
            size = process.weight_shape[-1]
            blocks = mean @ clean.reshape(size, -1) + root @ drawn.reshape(size, -1)
            expected = blocks.reshape(clean.shape)
        np.testing.assert_allclose(noisy[i].numpy(), expected, rtol=1e-10, atol=1e-12)


@every_process
def test_pictures_come_back_out_of_their_state(name):
    process = PROCESSES[name]()
    assert torch.equal(process.pictures(process.state(pictures_of(process))), pictures_of(process))


@every_process
def test_noise_prediction_of_the_score_of_one_point_is_the_noise(name):
    process, timesteps = PROCESSES[name](), torch.tensor([20.0, 300.0, 480.0])
    noise = state_of(process)
    offset = process.add_noise(0 * pictures_of(process), noise, timesteps)
    precision = torch.from_numpy(np.linalg.inv(process.covariance(timesteps.numpy())))
    score = -process.combine([precision], [offset])  # ∇ log N(u; Ψ u_0, Σ)
    torch.testing.assert_close(process.noise_prediction(score, timesteps), noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(process.score(noise, timesteps), score, rtol=1e-8, atol=1e-8)


@every_process
def test_prior_is_the_root_at_the_noisiest_time(name):
    process, noise = PROCESSES[name](), state_of(PROCESSES[name]())
    timesteps = torch.full((len(noise),), process.timestep_max)
    torch.testing.assert_close(process.prior(noise), process.add_noise(0 * pictures_of(process), noise, timesteps))


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (8, 8)])
def test_weights_of_frequencies_act_in_the_orthonormal_dct(size):
    process = Blurring(size)
    states = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(*size, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(process.combine([ones], [states]), states)
    weight = torch.rand(*size, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = idctn(
        weight[..., 0, 0].numpy() * dctn(states.numpy(), axes=(2, 3), norm="ortho"), axes=(2, 3), norm="ortho"
    )
    np.testing.assert_allclose(process.combine([weight], [states]).numpy(), expected, atol=1e-12)


# The preconditioning of a Langevin model


def test_preconditioned_model_sees_a_variance_preserving_picture_and_pure_noise():
    process, timesteps = CriticallyDampedLangevin(), inner(CriticallyDampedLangevin())
    scaling, _, _ = process.preconditioning(timesteps)
    signal = (scaling @ process.mean(timesteps))[..., 0]
    np.testing.assert_allclose(signal[:, 1], 0.0, atol=1e-10)
    spread = scaling @ process.covariance(timesteps) @ transposed(scaling)
    np.testing.assert_allclose(spread[:, 0, 0], 1 - signal[:, 0] ** 2, atol=1e-10)
    np.testing.assert_allclose(spread[:, [0, 1], [1, 1]], np.broadcast_to([0, 1], (40, 2)), atol=1e-10)


def test_a_variance_preserving_denoiser_is_a_langevin_one_in_the_preconditioned_coordinates(mixture, noise):
    """The score of CLD, from the mixture's density in (x, v), and from its variance-preserving ε."""
    process = CriticallyDampedLangevin()
    for timestep in (1.0, 40.0, 300.0, 900.0):
        scaling, of_state, of_output = (torch.from_numpy(w) for w in process.preconditioning(timestep))
        mean, covariance = (torch.from_numpy(f(timestep)) for f in (process.mean, process.covariance))
        state = process.prior(noise(5, 4)) + process.combine([mean], [noise(5, 4, seed=1)])
        total = mixture.std**2 * mean[:, :1] @ mean[:, :1].T + covariance
        offsets = state.reshape(5, 1, 2, 2) - mean[:, :1] * mixture.means[:, None]
        whitened = torch.linalg.solve(total, offsets)
        posterior = (mixture.probabilities.log() - 0.5 * (offsets * whitened).sum((2, 3))).softmax(1)
        score = -(posterior[..., None, None] * whitened).sum(1).reshape(5, 4)

        seen = process.combine([scaling], [state])
        alpha = float((scaling @ mean)[0, 0])
        of_picture = mixture.noise_prediction(seen[:, :2], alpha, float(np.sqrt(1 - alpha**2)))
        output = torch.cat([of_picture, torch.zeros_like(of_picture)], dim=1)
        predicted = process.combine([of_state, of_output], [state, output])
        expected = process.noise_prediction(score, torch.full((5,), timestep))
        torch.testing.assert_close(predicted, expected, rtol=1e-6, atol=1e-7)


# Bad input


@pytest.mark.parametrize(
    "build",
    [
        lambda: CriticallyDampedLangevin(langevin_beta=0.0),
        lambda: CriticallyDampedLangevin(friction=-1.0),
        lambda: CriticallyDampedLangevin(initial_velocity_variance=0.0),
        lambda: Blurring((4, 4, 4)),
        lambda: Blurring(0),
        lambda: Blurring(3.5),
        lambda: Blurring(4, blur_minimum=0.0),
        lambda: Blurring(4, blur_sigma=-1.0),
    ],
)
def test_parameters_out_of_range_are_named(build):
    with pytest.raises(ValueError, match=r"`\w+` must (not )?be"):
        build()


@pytest.mark.parametrize("timestep", [-1.0, 1001.0, float("nan")])
@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_timesteps_out_of_range_are_refused(name, timestep):
    process = PROCESSES[name]()
    with pytest.raises(ValueError, match="`timesteps` must lie between"):
        process.add_noise(pictures_of(process), state_of(process), torch.full((3,), timestep))


@pytest.mark.parametrize("name", ["cld", "blurring"])
def test_noise_of_another_shape_than_the_states_is_refused(name):
    process = PROCESSES[name]()
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        process.add_noise(pictures_of(process), state_of(process, channels=4), torch.full((3,), 5.0))


def test_states_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"2 blocks of C channels are stacked, got \(2, 3, 4, 4\)"):
        CriticallyDampedLangevin().check_state(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"must have the height and width \(5, 4\)"):
        Blurring((5, 4)).check_state(torch.zeros(2, 3, 4, 5))

"""Where diffusers has a solver of `ExponentialMultistepScheduler`, its pictures are ours."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

from genie_diffusers import ExponentialMultistepScheduler
from genie_diffusers.core import Parametrisation, run
from genie_diffusers.core.solvers.adams_bashforth import ipndm
from genie_diffusers.core.table import Levels, build

# diffusers hands tensors to numpy
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

#: name → diffusers' class, its options, and to what the pictures agree: DPM-Solver++ computes in float32
PEERS = {
    "ddim": (DPMSolverMultistepScheduler, {"solver_order": 1}, 1e-5),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}, 1e-5),
    "dpmpp_2m_heun": (DPMSolverMultistepScheduler, {"solver_type": "heun"}, 1e-5),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3}, 1e-5),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 1e-5),
    "unipc_1": (UniPCMultistepScheduler, {"solver_order": 1}, 1e-10),
    "unipc_2": (UniPCMultistepScheduler, {}, 1e-10),
    "unipc_3": (UniPCMultistepScheduler, {"solver_order": 3}, 1e-10),
    "unipc_1_bh1": (UniPCMultistepScheduler, {"solver_order": 1, "solver_type": "bh1"}, 1e-10),
    "unipc_2_bh1": (UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh1"}, 1e-10),
    "unipc_3_bh1": (UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh1"}, 1e-10),
    "deis_1": (DEISMultistepScheduler, {"solver_order": 1}, 1e-10),
    "deis_2": (DEISMultistepScheduler, {}, 1e-10),
    "deis_3": (DEISMultistepScheduler, {"solver_order": 3}, 1e-10),
    "sa_solver_2": (SASolverScheduler, {}, 1e-10),
    "sa_solver_3": (SASolverScheduler, {"predictor_order": 3, "corrector_order": 3}, 1e-10),
}
#: they stop before clean data in diffusers, or have no step that reaches it
END_NOISY = ("unipc_1_bh1", "unipc_2_bh1", "unipc_3_bh1", "deis_1", "deis_2", "deis_3", "sa_solver_2", "sa_solver_3")
MODELS = {
    "epsilon": {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction", "timestep_spacing": "leading"},
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "shifted flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}


def states(scheduler, levels, mixture, sample, count=None):
    """After each of the first `count` steps, by the exact denoiser in the scheduler's parametrisation."""
    conversion, found = Parametrisation(levels.config.prediction_type), []
    for index, timestep in enumerate(scheduler.timesteps[:count]):
        alpha, sigma = levels.alphas[index], levels.noise_stds[index]
        output = conversion.output(mixture.noise_prediction(sample, alpha, sigma), sample, alpha, sigma)
        # a generator for each step, since not all of ours draw
        generator, options = torch.Generator().manual_seed(index), {}
        if isinstance(scheduler, (ExponentialMultistepScheduler, SASolverScheduler)):
            options = {"generator": generator}
        elif scheduler.config.get("algorithm_type") == "sde-dpmsolver++":  # draws in single precision
            options = {"variance_noise": torch.randn(sample.shape, generator=generator, dtype=torch.float64)}
        sample = scheduler.step(output, timestep, sample, **options, return_dict=False)[0]
        found.append(sample)
    return torch.stack(found)


def on_levels_of(peer, ours, steps):
    """Our scheduler on the timesteps of `peer`, with noise levels that are the same but for rounding to float32."""
    peer.set_timesteps(steps)
    flows = peer.config.use_flow_sigmas
    if flows:
        ours.set_timesteps(sigmas=peer.sigmas[:-1].double().tolist())
    else:
        ours.set_timesteps(steps)
        assert ours.timesteps.tolist() == peer.timesteps.tolist()
    levels = ours.levels.sigmas if flows else ours.levels.gammas
    # pure noise of a flow has α = 2⁻¹² here, and 10⁻⁶ in diffusers' UniPC
    np.testing.assert_allclose(peer.sigmas[:-1], levels[:-1], rtol=3e-4 if flows else 1e-4)
    peer.sigmas = torch.from_numpy(levels.copy())


@pytest.mark.parametrize(
    ("steps", "lower_order_final"), [(1, True), (4, True), (10, True), (10, False), (20, True), (20, False)]
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PEERS)
def test_pictures_are_those_of_diffusers(name, model, steps, lower_order_final, mixture, noise):
    peer_class, options, tolerance = PEERS[name]
    peer = peer_class(**MODELS[model], **options, lower_order_final=lower_order_final)
    ours = ExponentialMultistepScheduler.from_config(peer.config, solver=name, flow_shift=1.0)
    assert ours.config.lower_order_final == lower_order_final
    if name in END_NOISY and not peer.config.use_flow_sigmas:
        ours.register_to_config(final_sigmas_type="sigma_min")
    on_levels_of(peer, ours, steps)
    reaches = name not in END_NOISY and (lower_order_final or peer_class is not UniPCMultistepScheduler)
    compared = steps if ours.sigmas[-1] > 0 or reaches else steps - 1
    found = states(ours, ours, mixture, noise(3, 2))
    assert torch.all(torch.isfinite(found))
    if compared > 0:
        theirs = states(peer, ours, mixture, noise(3, 2), compared)
        torch.testing.assert_close(found[:compared], theirs.double(), rtol=tolerance, atol=tolerance)


def test_the_sde_of_third_order_has_another_sign_in_diffusers():
    """The weight of the second difference vanishes with the length of the step; in diffusers it becomes −α."""
    peer = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min")
    peer.set_timesteps(999)
    peer._step_index = 500
    unit = [torch.tensor([value]) for value in (1.0, 0.0, 0.0)]
    zero = torch.zeros(1)
    theirs = float(peer.multistep_dpm_solver_third_order_update(unit, sample=zero, noise=zero))
    ours = ExponentialMultistepScheduler(solver="dpmpp_3m_sde", final_sigmas_type="sigma_min")
    ours.set_timesteps(timesteps=peer.timesteps)
    alpha = float(ours.alphas[501])
    assert theirs == pytest.approx(-alpha / 2, rel=0.1)
    assert abs(ours.table[500]["data", 2]) < 0.02 * alpha


@pytest.mark.parametrize("steps", [4, 10, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_that_of_diffusers(order, prediction_type, steps, mixture, noise):
    """Theirs is a scheduler of x̄ = x/α, whose order is an argument of its step."""
    config = {"beta_schedule": "scaled_linear", "prediction_type": prediction_type, "timestep_spacing": "leading"}
    peer = LMSDiscreteScheduler(**config)
    ours = ExponentialMultistepScheduler.from_config(peer.config, solver=f"lms_{order}")
    peer.set_timesteps(steps)
    ours.set_timesteps(timesteps=peer.timesteps.tolist())
    np.testing.assert_allclose(peer.sigmas, ours.levels.gammas, rtol=2e-4)
    peer.sigmas = torch.from_numpy(ours.levels.gammas.copy())  # without its rounding to float32
    conversion, sample = Parametrisation(prediction_type), noise(3, 2)
    scaled = sample / ours.alphas[0]
    for index, timestep in enumerate(ours.timesteps):
        alpha, sigma = ours.alphas[index], ours.noise_stds[index]
        for scheduler in (ours, peer):
            at = sample if scheduler is ours else peer.scale_model_input(scaled, timestep)
            output = conversion.output(mixture.noise_prediction(at, alpha, sigma), at, alpha, sigma)
            if scheduler is ours:
                sample = ours.step(output, timestep, sample).prev_sample
            else:
                scaled = peer.step(output, timestep, scaled, order=order).prev_sample
    torch.testing.assert_close(sample, scaled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_ipndm_is_that_of_diffusers(steps, mixture, noise):
    """Theirs has a path of its own, and a model of v whose sign is the other one: its ε is σ x + α v."""
    peer = IPNDMScheduler()
    peer.set_timesteps(steps)
    sigmas = peer.betas.double().numpy()
    sigmas[0] = 0.9999  # α is zero there
    levels = Levels(np.arange(steps), np.sqrt(1 - sigmas**2), sigmas)
    peer.betas, peer.alphas = torch.from_numpy(levels.sigmas), torch.from_numpy(levels.alphas)

    def model(sample, index):
        return mixture.noise_prediction(sample, levels.alphas[index], levels.sigmas[index])

    found, sample = run(build(levels, ipndm), model, noise(3, 2)), noise(3, 2)
    for index, timestep in enumerate(peer.timesteps):
        output = (model(sample, index) - levels.sigmas[index] * sample) / levels.alphas[index]
        sample = peer.step(output, timestep, sample).prev_sample
    torch.testing.assert_close(found, sample, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_noise_is_that_of_diffusers(eta, mixture, noise):
    peer = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ours = ExponentialMultistepScheduler.from_config(peer.config, solver="ddim", eta=eta, clip_sample=False)
    peer.set_timesteps(10)
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == peer.timesteps.tolist()
    ends = []
    for scheduler, options in ((peer, {"eta": eta}), (ours, {})):
        sample = noise(3, 2)
        for index, timestep in enumerate(scheduler.timesteps):
            output = mixture.noise_prediction(sample, ours.alphas[index], ours.noise_stds[index])
            generator = torch.Generator().manual_seed(index)
            sample = scheduler.step(output, timestep, sample, **options, generator=generator).prev_sample
        ends.append(sample)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


def test_the_generator_of_a_pipeline_draws_the_same_noise(mixture, noise):
    """In single precision, in which diffusers' SDE-DPM-Solver++ draws."""
    peer = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    ours = ExponentialMultistepScheduler.from_config(peer.config, solver="dpmpp_2m_sde")
    ends = []
    on_levels_of(peer, ours, 10)
    for scheduler in (peer, ours):
        sample, generator = noise(3, 2).float(), torch.Generator().manual_seed(0)
        for index, timestep in enumerate(scheduler.timesteps):
            output = mixture.noise_prediction(sample.double(), ours.alphas[index], ours.noise_stds[index]).float()
            sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        ends.append(sample)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)

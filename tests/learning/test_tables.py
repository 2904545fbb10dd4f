import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genie_diffusers import GDDIMScheduler, GenieScheduler, GGDMScheduler, Table
from genie_diffusers.learning.paths import Noises
from genie_diffusers.learning.tables import (
    Alpha,
    LearnedTable,
    MarginalTable,
    learned_scheduler,
    mean_products,
    sample_by,
)
from genie_diffusers.metrics import KernelDistance

PROCESS = GenieScheduler().process
EVERYTHING = ["states", "history", "noise", "time"]

ORIGINS = {
    "DDIM": GGDMScheduler.from_ddim(GenieScheduler(), [3, 5]),
    "DDIM, η = 0.5": GGDMScheduler.from_ddim(GenieScheduler(), [3, 5], 0.5),
    "DDPM": GGDMScheduler.from_ddim(GenieScheduler(), [3, 5], 1.0),
    "DEIS": GGDMScheduler.from_scheduler(GDDIMScheduler(multistep_order=3), [3, 5]),
    "GENIE with corrector": GGDMScheduler.from_scheduler(GenieScheduler(time_grid="uniform_lambda"), [3, 5]),
}


class Denoiser(torch.nn.Module):
    """A smooth ε in any precision."""

    config = SimpleNamespace(in_channels=1, sample_size=4, num_class_embeds=None)

    def __init__(self, prediction_type: str = "epsilon"):
        super().__init__()
        self.prediction_type = prediction_type

    def forward(self, sample, timestep, class_labels=None):
        epsilon = 0.8 * torch.sin(2 * sample + timestep / 300) + 0.3 * sample
        alpha = Alpha.apply(timestep.double()[None], PROCESS)
        sigma = (1 - alpha**2).sqrt()
        data = (sample - sigma * epsilon) / alpha
        outputs = {"epsilon": epsilon, "sample": data, "v_prediction": alpha * epsilon - sigma * data}
        return SimpleNamespace(sample=outputs[self.prediction_type])


def noises(count: int = 3, seed: int = 0, dtype=torch.float64) -> Noises:
    generator = torch.Generator().manual_seed(seed)
    return Noises(torch.randn((count, 1, 4, 4), generator=generator, dtype=torch.float64).to(dtype), None, None)


def fresh_noise(steps: int, count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn((steps, count, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(learned: LearnedTable, size: float = 0.05, seed: int = 2) -> LearnedTable:
    """Somewhere else than at the origin."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learned.parameters():
        parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return learned


def weights_of(table: dict, size: int) -> np.ndarray:
    """All numbers of a table, padded with zeros to `size` weights a row and term."""
    read = Table.from_dict(table, PROCESS)
    terms = [(what, lag) for what in ("sample", "data", "prediction") for lag in range(size)]
    weights = [row.get(term, 0.0) for row in read for term in [*terms, ("noise", 0)]]
    return np.array([*weights, *read.timesteps])


# --- the parametrisation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORIGINS)
@pytest.mark.parametrize("family", [[], EVERYTHING])
def test_learning_starts_at_the_origin_exactly(name, family):
    for steps, table in ORIGINS[name].config.tables.items():
        learned = LearnedTable(table, PROCESS, family)
        learned.whiten([torch.eye(len(columns), dtype=torch.float64) * 3 for columns in learned.columns])
        found = weights_of(learned.as_table(), int(steps))
        np.testing.assert_allclose(found, weights_of(table, int(steps)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ORIGINS)
def test_the_chain_is_what_the_scheduler_samples(name, prediction_type):
    learned = moved(LearnedTable(ORIGINS[name].config.tables["5"], PROCESS, EVERYTHING))
    unet, start = Denoiser(prediction_type), noises()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found = sample_by(unet, learned, start, fresh_noise(5), prediction_type)
    scheduler = learned_scheduler({"prediction_type": prediction_type}, {"5": learned.as_table()})
    scheduler.set_timesteps(5)
    signs = [row.get(("noise", 0), torch.ones(())).sign() for row in learned()]
    sample = start.noise
    assert scheduler.timesteps.dtype == torch.float32 and (scheduler.timesteps % 1 != 0).any()
    for index, timestep in enumerate(scheduler.timesteps):
        scheduler._draw = lambda sample, generator, i=index: signs[i] * fresh_noise(5)[i]
        output = unet(sample, timestep).sample
        sample = scheduler.step(output, timestep, sample, generator).prev_sample
    torch.testing.assert_close(found, sample, rtol=1e-4, atol=1e-4)  # timesteps of the model are single precision


def test_slopes_of_earlier_steps_are_asked_for():
    def source(sample, noise_prediction, timestep, *, step, history_slope):
        return 0.1 * sample - 0.2 * noise_prediction

    origin = GenieScheduler(time_grid="uniform_lambda")
    origin.attach(source)
    scheduler = GGDMScheduler.from_scheduler(origin, 3)
    table = scheduler.config.tables["3"]
    slopes = [row.get("slope", []) for row in table["rows"]]
    assert slopes[1][1], "the second step weighs the slope of the first"
    learned, unet, start = LearnedTable(table, PROCESS, ["history", "slope"]), Denoiser("epsilon"), noises()
    scheduler.attach(source)
    scheduler.set_timesteps(3)
    sample = start.noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(unet(sample, timestep).sample, timestep, sample).prev_sample
    with torch.no_grad():
        found = sample_by(unet, learned, start, fresh_noise(3), "epsilon", source)
        torch.testing.assert_close(found, sample, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="weighs slopes"):
            sample_by(unet, learned, start, fresh_noise(3), "epsilon")


def test_gradients_are_those_of_finite_differences():
    learned = moved(LearnedTable(ORIGINS["DDPM"].config.tables["3"], PROCESS, EVERYTHING), 3e-3)

    def value() -> torch.Tensor:
        pictures = sample_by(Denoiser("v_prediction"), learned, noises(8), fresh_noise(3, 8), "v_prediction")
        return pictures.square().mean()

    value().backward()
    for name, parameter in learned.named_parameters():
        generator = torch.Generator().manual_seed(3)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # timesteps of the model are single precision
        ends, width = [], 3e-3 if name == "log_intervals" else 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * width * direction
                ends.append(value().item())
                parameter -= sign * width * direction
        slope = float(parameter.grad.flatten() @ direction.flatten())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * width), rel=5e-3), name


def test_a_unit_of_any_coordinate_moves_the_next_state_by_one():
    learned = LearnedTable(ORIGINS["DDIM"].config.tables["5"], PROCESS, ["states"])
    grams = mean_products(Denoiser(), learned, noises(64), fresh_noise(5, 64), "epsilon")
    learned.whiten(grams)
    for index, gram in enumerate(grams):
        whitening = learned._unwhitened(index)
        size = torch.linalg.eigvalsh(whitening.T @ gram @ whitening).sqrt()
        assert size.max() < 1.001 and size.min() >= 0
        # a direction with a mean square of a percent of the columns' still counts fully
        assert (size > 0.95).sum() >= (torch.linalg.eigvalsh(gram) > 0.01 * gram.diagonal().mean()).sum()


def test_timesteps_stay_in_order_and_in_range_however_far_they_are_moved():
    table = ORIGINS["GENIE with corrector"].config.tables["5"]
    learned = moved(LearnedTable(table, PROCESS, ["time"]), 3.0)
    timesteps = np.array(learned.as_table()["timesteps"])
    assert (np.diff(timesteps) < 0).all() and timesteps[-1] > 0
    assert timesteps[0] == 999, "nothing is above the largest timestep, where it starts"
    assert np.abs(timesteps - table["timesteps"]).max() > 10


# --- marginals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_are_kept_however_far_the_rest_is_moved(eta):
    table = GGDMScheduler.from_ddim(GenieScheduler(), 5, eta).config.tables["5"]
    learned = MarginalTable(table, PROCESS, ["states", "noise", "time"])
    np.testing.assert_allclose(weights_of(learned.as_table(), 5), weights_of(table, 5), rtol=0, atol=1e-9)
    scheduler = learned_scheduler({}, {"5": moved(learned, 0.3).as_table()})
    scheduler.set_timesteps(5)
    alphas, sigmas = scheduler.marginals()
    np.testing.assert_allclose(alphas, scheduler.alphas, rtol=1e-10)
    np.testing.assert_allclose(sigmas, scheduler.noise_stds, rtol=1e-10, atol=1e-12)
    assert min(row.get("noise", [0.0])[0] for row in learned.as_table()["rows"]) >= 0
    assert np.abs(weights_of(learned.as_table(), 5) - weights_of(table, 5)).max() > 0.1
    free = moved(LearnedTable(table, PROCESS, ["states", "noise", "time"]), 0.3)
    scheduler = learned_scheduler({}, {"5": free.as_table()})
    scheduler.set_timesteps(5)
    assert np.abs(scheduler.marginals()[1] - scheduler.noise_stds).max() > 0.05


def test_with_kept_marginals_the_estimate_of_the_data_has_two_numbers_of_its_own():
    table = ORIGINS["DDIM"].config.tables["3"]
    learned = MarginalTable(table, PROCESS, ["pred"])
    of_states, of_model = 0.1, -0.2
    learned.of_data.data[1] = torch.tensor([of_states, of_model])
    found, rows = Table.from_dict(learned.as_table()), Table.from_dict(table)
    of_data = rows[1]["data", 0]
    assert found[1]["data", 0] == pytest.approx(of_data * (1 + of_model))
    assert found[1]["sample", 0] == pytest.approx(rows[1]["sample", 0] + of_data * of_states)
    assert found[2].get(("sample", 0), 0.0) == pytest.approx(rows[2].get(("sample", 0), 0.0), abs=1e-12)


@pytest.mark.parametrize("name", ["DEIS", "GENIE with corrector"])
def test_marginals_cannot_be_kept_of_what_weighs_earlier_predictions(name):
    with pytest.raises(ValueError, match="`--keep_marginals` needs states and the latest x̂_0 alone"):
        MarginalTable(ORIGINS[name].config.tables["5"], PROCESS, [])


def test_marginals_cannot_be_kept_of_a_table_that_has_others():
    table = ORIGINS["DDIM"].config.tables["3"]
    others = table | {"rows": [row | {"data": [1.01 * weight for weight in row["data"]]} for row in table["rows"]]}
    with pytest.raises(ValueError, match="`--origin` with the marginals of the diffusion"):
        MarginalTable(others, PROCESS, [])


# --- rematerialisation -----------------------------------------------------------------------------------------------


def stored(run) -> int:
    """Bytes that `run` keeps for its backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(kept.values())


def test_rematerialised_gradients_are_the_same_and_cost_only_the_states(unet):
    model = unet(in_channels=3, out_channels=3).float().requires_grad_(False)
    start = Noises(torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]), None)
    gradients, sizes = {}, {}
    for rematerialise in (True, False):
        for steps in (5, 10):
            origin = GGDMScheduler.from_scheduler(GenieScheduler(), steps).config.tables[str(steps)]
            learned = LearnedTable(origin, PROCESS, ["states", "history"])

            def run(learned=learned, rematerialise=rematerialise):
                return sample_by(model, learned, start, None, "epsilon", rematerialise=rematerialise)

            sizes[rematerialise, steps] = stored(run)
            numbers = sum(buffer.nbytes for buffer in learned.buffers())
        run().square().mean().backward()
        gradients[rematerialise] = learned.weights.grad
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-4, atol=1e-6 * gradients[False].abs().max())
    state = start.noise.nbytes
    # a state and its x_0, and the weights themselves
    assert sizes[True, 10] - sizes[True, 5] <= 5 * 2 * state + numbers
    assert sizes[False, 10] - sizes[False, 5] > 5 * 20 * state


# --- objectives ------------------------------------------------------------------------------------------------------


def test_the_kernel_objective_goes_down_on_pictures_of_known_statistics():
    """Data N(0.7, 0.5²), the denoiser in closed form; three steps of DDIM make too narrow a distribution."""

    class Gaussian(torch.nn.Module):
        def forward(self, sample, timestep, class_labels=None):
            alpha = float(PROCESS.alpha(float(timestep)))
            sigma = math.sqrt(1 - alpha**2)
            return SimpleNamespace(sample=sigma * (sample - 0.7 * alpha) / (alpha**2 * 0.25 + sigma**2))

    generator = torch.Generator().manual_seed(0)
    real = 0.7 + 0.5 * torch.randn((2000, 16), generator=generator)
    distance = KernelDistance(real.square())
    learned = LearnedTable(ORIGINS["DDIM"].config.tables["3"], PROCESS, ["states"])

    def value(seed: int) -> torch.Tensor:
        start = noises(256, seed, torch.float32)
        return distance(sample_by(Gaussian(), learned, start, None, "epsilon").flatten(1).square())

    before = value(10_000).item()
    optimizer = torch.optim.Adam(learned.parameters(), lr=2e-2)
    for step in range(40):
        optimizer.zero_grad()
        value(step).backward()
        optimizer.step()
    assert before > 0.01
    assert value(10_000).item() < 0.2 * before

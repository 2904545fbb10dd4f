from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from genie_diffusers import GenieScheduler
from genie_diffusers.learning import fitting, paths
from genie_diffusers.learning.step_heads import GRIDS

CPU = torch.device("cpu")


class Gaussian(torch.nn.Module):
    """The denoiser of data N(0.7, s²), which is linear in the sample: ε = σ (x − 0.7 α)/(α² s² + σ²)."""

    def __init__(self, std: float, scheduler: GenieScheduler):
        super().__init__()
        self.std, self.process = std, scheduler.process
        self.config = SimpleNamespace(in_channels=3, sample_size=4, num_class_embeds=None)

    def forward(self, sample, timestep, class_labels=None):
        alpha, sigma = float(self.process.alpha(int(timestep))), float(self.process.sigma(int(timestep)))
        offset = sample.double() - 0.7 * alpha
        return SimpleNamespace(sample=(sigma * offset / (alpha**2 * self.std**2 + sigma**2)).to(sample.dtype))


def fitted(unet, steps: int, grid: str, teacher_steps: int, count: int = 32) -> tuple[dict, float]:
    noises = paths.draw(unet, count * 5 // 4, 1, 0.0)
    teacher = paths.teacher_of({})
    trajectories = paths.Trajectories(unet, teacher, teacher_steps, noises, 16, CPU)
    scheduler = paths.solver_of({}, time_grid=grid)
    return fitting.fit_table(unet, scheduler, steps, noises, trajectories, count, 16, CPU)


def solved(unet, scheduler, steps: int, noises) -> torch.Tensor:
    with torch.no_grad():
        return paths.solve(unet, scheduler, steps, noises)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tables_of_a_single_data_point_are_exact(steps, grid):
    scheduler = paths.solver_of({}, time_grid=grid)
    table, error = fitted(Gaussian(0.0, scheduler), steps, grid, teacher_steps=10)
    assert error < 1e-4 and max(row["residual"][0] for row in table["rows"]) < 1e-4
    assert len(table["timesteps"]) == steps


def test_tables_of_gaussian_data_land_on_the_exact_solution():
    """x = α 0.7 + √(α² s² + σ²) z along the ODE: even one step is exact, where those of DDIM are far off."""
    unet = Gaussian(0.5, GenieScheduler())
    for steps in (2, 4):
        table, error = fitted(unet, steps, "uniform_lambda", teacher_steps=60)
        assert error < 1e-3
        scheduler = paths.solver_of({})
        scheduler.attach(fitting.TablesAlone({str(steps): table}))
        noises = paths.draw(unet, 8, 9, 0.0)
        process = scheduler.process
        alpha, sigma = float(process.alpha(999)), float(process.sigma(999))
        first = table["timesteps"][0]
        assert first == 999
        z = (noises.noise - 0.7 * alpha) / (alpha**2 * 0.25 + sigma**2) ** 0.5
        expected = 0.7 + 0.5 * z
        found = solved(unet, scheduler, steps, noises)
        assert paths.relative_error(found, expected).mean() < 2e-3
        ddim = solved(unet, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), steps, noises)
        assert paths.relative_error(ddim, expected).mean() > 0.03

from types import SimpleNamespace

import pytest
import torch

from genie_diffusers import GenieScheduler
from genie_diffusers.learning import paths

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


@pytest.mark.parametrize("num_class_embeds", [None, 4])
def test_noises_are_the_same_however_many_are_drawn_at_a_time_and_labelled_where_there_are_classes(num_class_embeds):
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=4, in_channels=3, num_class_embeds=num_class_embeds))
    noises = paths.draw(unet, 200, seed=0, label_dropout=0.2)
    assert noises.noise.shape == (200, 3, 4, 4) and len(noises) == 200 and noises.scales is None
    assert torch.equal(noises.noise, paths.draw(unet, 200, seed=0, label_dropout=0.2).noise)
    if num_class_embeds is None:
        assert noises.labels is None
        return
    assert 0.1 < (noises.labels == 3).float().mean() < 0.3
    assert set(noises.labels.tolist()) == {0, 1, 2, 3}
    guided = paths.draw(unet, 200, seed=0, label_dropout=0.0, max_guidance_scale=3.0)
    assert set(guided.labels.tolist()) == {0, 1, 2}
    assert guided.scales.min() >= 1 and 2.5 < guided.scales.max() <= 3


def test_guided_predictions_combine_both_branches(unet):
    unet = unet().float()
    noises = paths.draw(unet, 3, 0, 0.0, max_guidance_scale=4.0)
    timestep = torch.tensor(300)
    with torch.no_grad():
        guided = paths.predict(unet, noises.noise, timestep, noises)
        for i, scale in enumerate(noises.scales):
            null, own = (
                unet(noises.noise[i : i + 1], timestep, class_labels=torch.tensor([label])).sample
                for label in (3, int(noises.labels[i]))
            )
            torch.testing.assert_close(guided[i : i + 1], null + scale * (own - null), rtol=1e-4, atol=1e-5)


def test_trajectories_pass_through_the_states_between_and_end_at_the_clean_pictures():
    scheduler = GenieScheduler()
    unet = Gaussian(0.5, scheduler)
    noises = paths.draw(unet, 4, 0, 0.0)
    trajectories = paths.Trajectories(unet, paths.teacher_of({}), 80, noises, 4, CPU)
    process = scheduler.process

    def spread(alpha, sigma):
        return (alpha**2 * 0.25 + sigma**2) ** 0.5

    z = (noises.noise - 0.7 * float(process.alpha(999))) / spread(float(process.alpha(999)), float(process.sigma(999)))
    for timestep in (900, 432, 77, 3):
        alpha, sigma = float(process.alpha(timestep)), float(process.sigma(timestep))
        found = trajectories.at(float(process.log_snr(timestep)))
        torch.testing.assert_close(found, 0.7 * alpha + spread(alpha, sigma) * z, rtol=0, atol=1e-3)
    torch.testing.assert_close(trajectories.at(float("inf")), 0.7 + 0.5 * z, rtol=0, atol=3e-3)

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from genie_diffusers import GenieInverseScheduler, GeniePipeline, GenieScheduler, GenieUNet2DModel
from genie_diffusers.learning.encoders import OPTIONS, RoundTrip
from genie_diffusers.learning.paths import Noises, relative_error


@pytest.fixture(scope="module")
def base(like_trained, tmp_path_factory) -> Path:
    """A class-conditional model with random weights, as a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(like_trained(unet), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_what_is_learned_from_is_what_is_sampled(base, prediction_type):
    """The round trip agrees with that of the schedulers, before and after the rows are moved."""
    unet = GenieUNet2DModel.from_pretrained(base, subfolder="unet")
    config = GenieScheduler.load_config(base, subfolder="scheduler")
    encoder = GenieInverseScheduler.from_config(
        {**config, "clip_sample": False, "prediction_type": prediction_type}, **OPTIONS
    )
    generator = torch.Generator().manual_seed(0)
    pictures = Noises(torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2]), None)
    trip = RoundTrip(encoder, 5, torch.device("cpu"))
    trip.whiten(unet, pictures, 1.0)

    def by_schedulers(encoder) -> torch.Tensor:
        sample = pictures.noise
        for scheduler in (encoder, GenieScheduler.from_config(encoder.config)):
            scheduler.set_timesteps(5)
            sample = sample * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                output = unet(sample, timestep, class_labels=pictures.labels).sample
                sample = scheduler.step(output, timestep, sample).prev_sample
        return relative_error(sample, pictures.noise)

    with torch.no_grad():
        before = trip(unet, pictures).sqrt()
        torch.testing.assert_close(before, by_schedulers(encoder), rtol=1e-3, atol=1e-5)
        trip.encoder.weights += 0.3 * torch.randn(trip.encoder.weights.shape, generator=generator).double()
        after = trip(unet, pictures).sqrt()
        moved = GenieInverseScheduler.from_config(encoder.config, encoding={"5": trip.rows()})
        torch.testing.assert_close(after, by_schedulers(moved), rtol=1e-3, atol=1e-5)
        assert (after - before).abs().max() > 0.01 * before.max()

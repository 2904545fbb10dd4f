from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from genie_diffusers import DerivativeHead, GeniePipeline, GenieScheduler, GenieUNet2DModel
from genie_diffusers.learning.derivative_heads import SlopeDistillation
from genie_diffusers.models.exact_slope import forward_mode

NULL_CLASS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A class-conditional model with attention and random weights, as a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=NULL_CLASS + 1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(unet, GenieScheduler()).save_pretrained(folder)
    return folder


def points(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.rand((count, 3, 8, 8), generator=generator) * 2 - 1,
        "noise": torch.randn((count, 3, 8, 8), generator=generator),
        "times": torch.rand(count, generator=generator, dtype=torch.float64),
        "choices": torch.rand((count, 2), generator=generator, dtype=torch.float64),
        "labels": torch.randint(0, NULL_CLASS, (count,), generator=generator),
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("max_guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
def test_target_is_the_exact_slope_of_the_branch_along_the_guided_path(base, prediction_type, max_guidance_scale):
    plain = UNet2DModel.from_pretrained(base, subfolder="unet").eval()
    unet = GenieUNet2DModel.from_unet(plain, DerivativeHead.for_unet(plain))
    scheduler = GenieScheduler(prediction_type=prediction_type)
    process, batch = scheduler.process, points(24)
    distillation = SlopeDistillation(
        unet,
        process,
        prediction_type,
        max_guidance_scale=max_guidance_scale,
        branch_dropout=0.4,
    )
    inputs, slope = distillation(batch, torch.device("cpu"))

    branches = set()
    for i in range(24):
        timestep = int(batch["times"][i] * 1000)
        alpha, sigma = float(process.alpha(timestep)), float(process.sigma(timestep))
        sample = alpha * batch["images"][i : i + 1] + sigma * batch["noise"][i : i + 1]
        label, null = batch["labels"][i : i + 1], torch.tensor([NULL_CLASS])
        u_branch, u_scale = batch["choices"][i].tolist()
        scale = 1 + (max_guidance_scale - 1) * max(0.0, 2 * u_scale - 1)
        own = null if u_branch < 0.4 else label
        branches.add((u_branch < 0.4, scale > 1))

        def noise(x, t, alpha, sigma, class_label):
            out = plain(x, t, class_labels=class_label).sample
            return {
                "epsilon": out,
                "v_prediction": alpha * out + sigma * x,
                "sample": (x - alpha * out) / sigma,
            }[prediction_type]

        levels = [torch.tensor(value) for value in (float(timestep), alpha, sigma)]
        with torch.no_grad():
            of_own, of_null, of_label = (noise(sample, *levels, each) for each in (own, null, label))
        direction = of_own if scale == 1 else of_null + scale * (of_label - of_null)
        torch.testing.assert_close(inputs["sample"][i : i + 1], sample)
        torch.testing.assert_close(inputs["noise_prediction"][i : i + 1], direction, rtol=1e-3, atol=1e-3)
        # along dx/dλ = σ² x − σ ε, dα/dλ = ασ², dσ/dλ = −σα², whichever branch is differentiated
        velocity = sigma**2 * sample - sigma * direction
        rates = [1 / float(process.log_snr_derivative(timestep)), alpha * sigma**2, -sigma * alpha**2]
        rates = [torch.tensor(value) for value in rates]
        with torch.no_grad(), forward_mode(plain):
            point, rate = (sample, *levels), (velocity, *rates)
            expected = torch.func.jvp(lambda *point, own=own: noise(*point, own), point, rate)[1]
        torch.testing.assert_close(slope[i : i + 1], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert len(branches) == (4 if max_guidance_scale > 1 else 2), "a case is missing from the points"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_secant_tends_to_the_derivative_on_a_denoiser_smooth_in_time(prediction_type):
    class LinearDenoiser(torch.nn.Module):
        """ε = x·sin(t/200): the other prediction types follow from it."""

        def forward(self, sample, timestep, class_labels=None):
            t = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1, 1, 1)
            if prediction_type == "epsilon":
                return SimpleNamespace(sample=sample * torch.sin(t / 200))
            alpha, sigma = scheduler.process.coefficients(t.flatten(), sample)
            noise = sample * torch.sin(t / 200)
            v, data = (noise - sigma * sample) / alpha, (sample - sigma * noise) / alpha
            return SimpleNamespace(sample=v if prediction_type == "v_prediction" else data)

        recording = nullcontext
        last_call = {"features": torch.zeros(1), "time_embedding": torch.zeros(1)}

    scheduler = GenieScheduler(continuous=True, prediction_type=prediction_type)
    process, batch = scheduler.process, points(32)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    del batch["labels"]
    _, secant = SlopeDistillation(LinearDenoiser(), process, prediction_type, secant_width=0.02)(
        batch, torch.device("cpu")
    )
    timesteps = process.timestep_min + batch["times"].numpy() * (process.timestep_max - process.timestep_min)
    # Eq. (3) of docs/genie.md for ε = x f(t): dε/dλ = f·(σ² x − σ x f) + x·f'·dt/dλ
    alpha, sigma = process.coefficients(torch.from_numpy(timesteps), batch["images"])
    sample = alpha * batch["images"] + sigma * batch["noise"]
    f, f_dot = (
        torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (np.sin(timesteps / 200), np.cos(timesteps / 200) / 200)
    )
    t_dot = torch.from_numpy(1 / process.log_snr_derivative(timesteps)).reshape(-1, 1, 1, 1)
    expected = f * (sigma**2 * sample - sigma * sample * f) + sample * f_dot * t_dot
    torch.testing.assert_close(secant, expected, rtol=5e-3, atol=2e-3)  # times go through float32


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_secant_is_centred_on_the_point_and_spans_the_width(base, timestep):
    plain = UNet2DModel.from_pretrained(base, subfolder="unet").eval()
    unet = GenieUNet2DModel.from_unet(plain, DerivativeHead.for_unet(plain))
    called = []
    unet.register_forward_pre_hook(lambda module, args: called.append(args[1]))
    process, batch = GenieScheduler().process, points(1) | {"times": torch.tensor([timestep / 1000 + 1e-6])}
    distillation = SlopeDistillation(unet, process, "epsilon", 0.3)
    distillation(batch, torch.device("cpu"))
    middle, cleaner, noisier = (process.log_snr(t.item()) for t in called)
    assert noisier < cleaner and noisier <= middle <= cleaner
    if timestep == 500:
        assert cleaner - middle == pytest.approx(0.15, abs=0.02) and middle - noisier == pytest.approx(0.15, abs=0.02)

"""A pipeline whose model is the exact denoiser of a Gaussian mixture, on any path and with any prediction."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from genie_diffusers import GenieScheduler
from genie_diffusers.core import Parametrisation

NUMBERS = 48


class Mixture:
    """Σ_k p_k N(μ_k, s²) in 48 dimensions; `classes` choose the component that is guided towards."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.means = torch.randn(6, NUMBERS, generator=generator, dtype=torch.float64)
        self.std = 0.9  # wide enough that near paths do not part

    def noise(self, sample: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        flat = sample.double().flatten(1)
        variance = alpha**2 * self.std**2 + sigma**2
        offsets = flat[:, None] - alpha * self.means
        logits = -(offsets**2).sum(-1) / (2 * variance)
        score = (logits.softmax(-1)[..., None] * offsets).sum(1) / variance
        return (sigma * score).reshape(sample.shape)


class ToyPipeline(DiffusionPipeline):
    """The loop of diffusers' pipelines around [`Mixture`]; `guidance_scale` multiplies what the model says."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.mixture, self.model_calls, self.dtype_of_model = Mixture(), 0, torch.float32

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        batch_size=1,
        num_inference_steps=10,
        guidance_scale=1.0,
        strength=1.0,
        generator=None,
        output_type="pil",
        return_dict=True,
    ):
        count = len(prompt) if isinstance(prompt, list) else batch_size
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        if strength < 1:
            begin = num_inference_steps - int(num_inference_steps * strength)
            self.scheduler.set_begin_index(begin)
            timesteps = timesteps[begin:]
        sample = randn_tensor((count, 3, 4, 4), generator=generator, dtype=self.dtype_of_model)
        process = GenieScheduler.from_config(self.scheduler.config).process
        predicted = Parametrisation(self.scheduler.config.get("prediction_type", "flow_prediction"))
        with self.progress_bar(total=len(timesteps)) as bar:
            for timestep in timesteps:
                level = float(process.alpha(float(timestep))), float(process.sigma(float(timestep)))
                noise = guidance_scale * self.mixture.noise(sample, *level)
                output = predicted.output(noise, sample.double(), *level).to(sample.dtype)
                self.model_calls += 1
                sample = self.scheduler.step(output, timestep, sample).prev_sample
                bar.update()
        return (sample,) if not return_dict else {"images": sample}


@pytest.fixture
def flow_pipeline() -> ToyPipeline:
    return ToyPipeline(FlowMatchEulerDiscreteScheduler(shift=2.0))


@pytest.fixture
def vp_pipeline() -> ToyPipeline:
    return ToyPipeline(GenieScheduler())


def ends(pipe: ToyPipeline, scheduler, steps: int, seeds=range(1000, 1032), **inputs) -> np.ndarray:
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"batch_size": len(generators), "generator": generators, "num_inference_steps": steps, **inputs}
    return pipe(**call)["images"].flatten(1).double().numpy()


def error(found: np.ndarray, reference: np.ndarray) -> float:
    return float((np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)).mean())

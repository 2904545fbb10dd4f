"""What only an accelerator can show: no step waits for the device, and calibration is that of the host."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline

from genie_diffusers import (
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    QuasiTaylorScheduler,
    calibrate,
)
from tests.pipelines.test_calibrate_flow import assert_follows, distance, draw
from tests.pipelines.tiny_diffusion import text_to_image
from tests.pipelines.tiny_flow import FAMILIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TABLES = GGDMScheduler.from_scheduler(GenieScheduler(), [6]).config["tables"]


@pytest.mark.parametrize(
    "scheduler",
    [
        GenieScheduler(),
        GenieScheduler(method="taylor"),
        GenieScheduler(prediction_type="flow_prediction"),
        GenieScheduler(tables=TABLES),
        GenieScheduler(clip_sample=True),
        GenieInverseScheduler(),
        QuasiTaylorScheduler(method="sde", taylor_order=2),
        GDDIMScheduler(multistep_order=3),
        GGDMScheduler(tables=TABLES),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.get('method')}",
)
def test_no_step_waits_for_the_device(scheduler):
    generator = torch.Generator("cuda").manual_seed(0)
    sample = torch.randn(2, 3, 8, 8, device="cuda", generator=generator)
    for mode in ("default", "error"):  # the first run loads kernels
        scheduler.set_timesteps(6, device="cuda")
        scheduler.set_begin_index(0)  # as pipelines do; without it the first step reads where it is
        timesteps = list(scheduler.timesteps)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            x = sample
            for timestep in timesteps:
                x = scheduler.step(0.1 * x, timestep, x, generator=generator).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("build", [FAMILIES["flux"], text_to_image], ids=["flux", "stable-diffusion"])
def test_the_tables_of_the_device_are_those_of_the_host(build):
    pipe, inputs = build()
    pipe = copy.deepcopy(pipe)
    on_host = calibrate(pipe, steps=3, refinements=0, **inputs)
    on_device = calibrate(pipe.to("cuda"), steps=3, refinements=0, **inputs)
    expected, found = (scheduler.config["tables"]["3"] for scheduler in (on_host, on_device))
    assert found["timesteps"] == expected["timesteps"]
    pipe.to("cpu")
    torch.testing.assert_close(draw(pipe, on_device, inputs, 3), draw(pipe, on_host, inputs, 3), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("build", [FAMILIES["flux"], text_to_image], ids=["flux", "stable-diffusion"])
@pytest.mark.parametrize("how", ["half precision", "offloading of models", "offloading of layers", "compiled"])
def test_calibration_of_what_runs_on_an_accelerator(build, how):
    pipe, inputs = build()
    pipe: DiffusionPipeline = copy.deepcopy(pipe)
    if how == "half precision":
        pipe.to("cuda", torch.bfloat16)
    elif how == "offloading of models":
        pipe.enable_model_cpu_offload()
    elif how == "offloading of layers":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to("cuda")
        (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).compile()
    learned = calibrate(pipe, steps=4, **inputs)
    solver = GenieScheduler.from_config(learned.config, tables=None)
    solution = draw(pipe, solver, inputs, 60).float()
    found = draw(pipe, learned, inputs, 4)
    assert_follows(learned, 4)
    assert distance(found.float(), solution) < distance(draw(pipe, solver, inputs, 4).float(), solution)

"""
What the pieces cost, as ratios of times measured side by side in one run.

    python benchmarks/cost.py

writes `benchmarks/results/cost.json`. Every pair is timed in turn, many times over, and compared by its median, so
that a change in the machine's load meets both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel, UniPCMultistepScheduler
from torch.autograd.functional import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from genie_diffusers import DerivativeHead, ExactSlope, GenieScheduler, GenieUNet2DModel, StepHead
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.derivative_heads import SlopeDistillation

ROOT = Path(__file__).parent
PACKAGED_HEAD = Path(PACKAGED_MODEL).parent / "genie-head-cifar10-16"
#: the architecture of google/ddpm-cifar10-32, with random weights: timing needs no others
DDPM_CIFAR10_32 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def medians(repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each function, all run in turn `repeats` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def model_costs(
    plain: UNet2DModel, head: DerivativeHead, step_head: StepHead, batch_size: int, repeats: int
) -> dict[str, float]:
    """Both heads, the exact slope, and a training step of a derivative head, against a forward pass of the UNet."""
    torch.manual_seed(0)
    scheduler = GenieScheduler()
    plain.eval().requires_grad_(False)
    unet = model = GenieUNet2DModel.from_unet(plain, head)
    with_step_head = GenieUNet2DModel.from_unet(plain, step_head)
    classes = unet.config.num_class_embeds
    labels = None if classes is None else torch.arange(batch_size) % (classes - 1)
    sample = torch.randn(batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    timestep = torch.tensor(500)
    exact = ExactSlope(model)
    exact.bind(scheduler.process, "epsilon")

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(sample, timestep, class_labels=labels).sample

    prediction = forward()

    levels = float(scheduler.process.alpha(500)), float(scheduler.process.sigma(500))

    @torch.no_grad()
    def runs(unet: GenieUNet2DModel, *of_step):
        """A call of the head of `unet`, with what it reads at hand."""
        with unet.recording():
            unet(sample, timestep, class_labels=labels)
            read = unet.last_call["features"], unet.last_call["time_embedding"]
        return torch.no_grad()(lambda: unet.derivative_head(sample, prediction, *read, *levels, *of_step))

    def exact_step():
        exact(sample, forward(), 500.0)

    batch = {
        "images": torch.rand_like(sample) * 2 - 1,
        "noise": torch.randn_like(sample),
        "times": torch.rand(batch_size, dtype=torch.float64),
        "choices": torch.rand(batch_size, 2, dtype=torch.float64),
    } | ({} if labels is None else {"labels": labels})
    distillation = SlopeDistillation(model, scheduler.process, "epsilon", branch_dropout=0.25)

    def train(inputs: dict, slope: torch.Tensor):
        torch.nn.functional.mse_loss(head(**inputs), slope).backward()
        head.zero_grad()

    def forward_mode_training():
        train(*distillation(batch, torch.device("cpu")))

    def double_backward_training():
        train(*double_backward_target(model, scheduler, batch, labels))

    seconds = medians(
        repeats,
        forward=forward,
        head=runs(model),
        step_head=runs(with_step_head, 0.5, prediction),
        exact_slope_step=exact_step,
        forward_mode_training=forward_mode_training,
        double_backward_training=double_backward_training,
    )
    exact.remove()
    return {
        "parameters": unet.num_parameters() - head.num_parameters(),
        "head_parameters": head.num_parameters(),
        "step_head_parameters": step_head.num_parameters(),
        "batch_size": batch_size,
        "forward_seconds": seconds["forward"],
        "head_per_forward": seconds["head"] / seconds["forward"],
        "step_head_per_forward": seconds["step_head"] / seconds["forward"],
        "exact_slope_step_per_forward": seconds["exact_slope_step"] / seconds["forward"],
        "double_backward_per_forward_mode_training_step": seconds["double_backward_training"]
        / seconds["forward_mode_training"],
    }


def double_backward_target(model: GenieUNet2DModel, scheduler: GenieScheduler, batch: dict, labels):
    """The published recipe: the same inputs and slope, by one double-backward product in x and another in t."""
    process = scheduler.process
    timesteps = (batch["times"] * process.num_train_timesteps).long()
    alpha, sigma = process.coefficients(timesteps, batch["images"])
    sample = alpha * batch["images"] + sigma * batch["noise"]
    t_dot = torch.from_numpy(1.0 / process.log_snr_derivative(timesteps.numpy())).float()
    with torch.no_grad(), model.recording():
        noise = model(sample, timesteps, class_labels=labels).sample
        features, time_embedding = model.last_call["features"], model.last_call["time_embedding"]
    velocity = sigma**2 * sample - sigma * noise
    times = timesteps.float()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        _, in_x = jvp(lambda x: model(x, times, class_labels=labels).sample, sample, velocity)
        _, in_t = jvp(lambda t: model(sample, t, class_labels=labels).sample, times, t_dot)
    inputs = {
        "sample": sample,
        "noise_prediction": noise,
        "features": features,
        "time_embedding": time_embedding,
        "alpha": alpha,
        "sigma": sigma,
    }
    return inputs, in_x + in_t


def step_costs(repeats: int) -> dict[str, float]:
    """`step()` on a 4×4×64×64 latent, all steps of a run, against diffusers' multistep solvers."""
    sample, model_output = torch.randn(2, 4, 4, 64, 64)
    attached = GenieScheduler()
    attached.attach(lambda sample, noise_prediction, timestep, *, step, history_slope: noise_prediction)
    schedulers = {
        "genie": GenieScheduler(),
        "genie_with_slope": attached,
        "dpmsolver++": DPMSolverMultistepScheduler(),
        "unipc": UniPCMultistepScheduler(),
    }

    @torch.no_grad()
    def seconds_per_step(scheduler) -> float:
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(0)
        start = time.perf_counter()
        for t in scheduler.timesteps:
            scheduler.step(model_output, t, sample)
        return (time.perf_counter() - start) / 20

    times: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(repeats):
        for name, scheduler in schedulers.items():
            times[name].append(seconds_per_step(scheduler))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "genie_step_microseconds": 1e6 * median["genie"],
        "genie_per_dpmsolver++": median["genie"] / median["dpmsolver++"],
        "genie_per_unipc": median["genie"] / median["unipc"],
        "genie_with_slope_per_dpmsolver++": median["genie_with_slope"] / median["dpmsolver++"],
        "genie_with_slope_per_unipc": median["genie_with_slope"] / median["unipc"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step_alone", action="store_true", help="Measure `step`; the rest stays as it is.")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "cost.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.step_alone:
        results = json.loads(args.output.read_text()) | {"step": step_costs(20 * args.repeats)}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results["step"], indent=2))
        return
    packaged = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float()
    packaged_head = DerivativeHead.from_pretrained(PACKAGED_HEAD).float()
    large = UNet2DModel(**DDPM_CIFAR10_32)
    large_heads = DerivativeHead.for_unet(large), StepHead.for_unet(large)
    results = {
        "command": "python benchmarks/cost.py",
        "environment": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "processor": platform.machine(),
            "threads": args.threads,
        },
        "step": step_costs(20 * args.repeats),
        "google/ddpm-cifar10-32 (random weights)": model_costs(large, *large_heads, 4, args.repeats),
        "packaged ddpm-cifar10-16": model_costs(packaged, packaged_head, packaged.derivative_head, 16, args.repeats),
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""
What distilling heads takes of an accelerator's memory, for Stable Diffusion 1.5 and SDXL, without having one.

    python benchmarks/memory.py

writes `benchmarks/results/memory.json`. Every training step is run with tensors that have shapes and no contents (the
meta device), while the bytes of all living tensors are counted; attention is counted as a fused kernel. What is not
counted is the same for all: the accelerator's context, workspaces of kernels and fragmentation, here taken as 2 GiB.
All that lives is proportional to the number of pixels, so that 1024 pixels take four times what is counted at 512.
"""

import argparse
import json
import weakref
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genie_diffusers import DerivativeHead, GenieScheduler, StepHead
from genie_diffusers.learning.conditions import Conditioned, rematerialised, with_head
from genie_diffusers.learning.derivative_heads import SlopeDistillation
from genie_diffusers.learning.paths import Noises, predict

ROOT = Path(__file__).parent
#: the published architectures
MODELS = {
    "Stable Diffusion 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TOKENS = 77
GIB = 2**30
#: GiB, of which this many are not counted
CARDS, NOT_COUNTED = (16, 24, 80), 2


class FusedAttention(torch.autograd.Function):
    """The shapes that a fused kernel keeps: its inputs and its output."""

    @staticmethod
    def forward(context, query, key, value):
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context, gradient):
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of storages that are there in addition to those of a model, and their largest number."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.device.type == "meta":
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


def build(config: dict, checkpointing: bool, head_class=StepHead) -> tuple[Conditioned, StepHead | DerivativeHead]:
    """The denoiser in half precision with a head in single precision, and a caption; captions stay on the host."""
    with torch.device("meta"):
        plain = UNet2DConditionModel(**config)
        head = head_class(
            in_channels=4,
            feature_channels=plain.conv_norm_out.num_channels,
            time_embedding_dim=plain.time_embedding.linear_2.out_features,
            width=160,
        )
        rows = {"encoder_hidden_states": torch.empty(2, TOKENS, config["cross_attention_dim"])}
        if "addition_embed_type" in config:
            rows |= {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
    head.matches = lambda unet: True  # nothing has contents
    unet = with_head(plain, head).requires_grad_(False).eval()
    head.requires_grad_(True)
    if checkpointing:
        rematerialised(unet)
    unet.to(torch.float16)
    head.float()
    return Conditioned(unet, rows, 64), head


def step_head_step(denoiser: Conditioned, head: StepHead, steps: int) -> int:
    """The bytes that are alive at most while a training step of one guided path runs, beyond weights and captions."""
    table = {
        "timesteps": torch.linspace(999, 50, steps).long().tolist(),
        "weights": [[1.0, -0.1, 0.1, 0.1, 0.1][: min(i, 3) + 2] for i in range(steps)],
        "residuals": [0.1] * steps,
    }
    head.register_to_config(tables={str(steps): table})
    scheduler = GenieScheduler()
    scheduler.attach(denoiser.slope_source.differentiable())
    scheduler.set_timesteps(steps)
    side = denoiser.config.sample_size
    with LivingBytes(denoiser) as living:
        noise = torch.empty(1, 4, side, side, device="meta")
        labels = torch.empty(1, dtype=torch.long, device="meta")
        noises = Noises(noise, labels, torch.empty(1, device="meta"))
        sample = noise
        for timestep in scheduler.timesteps:
            sample = scheduler.step(predict(denoiser, sample, timestep, noises), timestep, sample).prev_sample
        sample.square().mean().backward()
    for parameter in head.parameters():
        parameter.grad = None
    return living.peak


def derivative_step(denoiser: Conditioned, head: DerivativeHead) -> int:
    """The same for a training step of a derivative head, with secants as targets, on a point of a guided path."""
    side = denoiser.config.sample_size
    distillation = SlopeDistillation(denoiser, GenieScheduler().process, "epsilon", 0.3, max_guidance_scale=8.0)
    with LivingBytes(denoiser) as living:
        batch = {
            "images": torch.empty(1, 4, side, side, device="meta"),
            "noise": torch.empty(1, 4, side, side, device="meta"),
            "labels": torch.empty(1, dtype=torch.long, device="meta"),
            "times": torch.full((1,), 0.5, dtype=torch.float64),
            "choices": torch.full((1, 2), 0.9, dtype=torch.float64),
        }
        inputs, slope = distillation(batch, torch.device("meta"))
        torch.nn.functional.mse_loss(head(**inputs), slope).backward()
    for parameter in head.parameters():
        parameter.grad = None
    return living.peak


def of_each_resolution(name: str, denoiser: Conditioned, head, run: dict, sample_bytes: int) -> list[dict]:
    """What a path or point takes, and how many fit, from what it takes at 512 pixels."""
    fixed = {
        "denoiser": 2 * (denoiser.unet.num_parameters() - head.num_parameters()),
        # weights, gradients, two moments and the average, four bytes each
        "head and optimizer": 20 * head.num_parameters(),
    }
    results = []
    for resolution in (512, 1024):
        here = sample_bytes / GIB * (resolution / 512) ** 2
        free = {card: card - NOT_COUNTED - sum(fixed.values()) / GIB for card in CARDS}
        result = {
            "model": name,
            **run,
            "resolution": resolution,
            "GiB": {part: round(size / GIB, 2) for part, size in fixed.items()},
            "GiB_per_guided_sample": round(here, 2),
            "train_batch_size": {f"{card} GiB": max(0, int(free[card] / here)) for card in CARDS},
        }
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def main(args: argparse.Namespace) -> None:
    torch.nn.functional.scaled_dot_product_attention = lambda query, key, value, **_: FusedAttention.apply(
        query, key, value
    )
    results = []
    for name, config in MODELS.items():
        for checkpointing in (True, False):
            denoiser, head = build(config, checkpointing)
            for steps in args.steps:
                run = {"head": "step head", "gradient_checkpointing": checkpointing, "model_calls": steps}
                results += of_each_resolution(name, denoiser, head, run, step_head_step(denoiser, head, steps))
        denoiser, head = build(config, False, DerivativeHead)
        run = {"head": "derivative head"}
        results += of_each_resolution(name, denoiser, head, run, derivative_step(denoiser, head))
    report = {"command": "python benchmarks/memory.py", "torch": torch.__version__, "results": results}
    (ROOT / "results" / "memory.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory of distilling step heads, computed.")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[4, 8], help="Model calls of the runs trained through."
    )
    main(parser.parse_args())

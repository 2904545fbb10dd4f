"""
What calibration brings, against diffusers' solvers on their best grids, those that calibration finds among them.

    python benchmarks/calibration.py                      # the packaged variance-preserving checkpoint
    python benchmarks/calibration.py --model flow         # the packaged flow transformer
    python benchmarks/calibration.py curves               # against paths, calls of the recorded run, guidance scales

Errors are relative distances to the converged solution of the same noise, as in solver_error.py, on noises that nothing
was fitted to or chosen on. Every peer has, for each number of calls, the best of its grids (and on flows, of its
shifts), chosen on the 16 noises of the choice. Writes `benchmarks/results/calibration-{model}.json`, `.md` and `.png`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure

from genie_diffusers import GenieDiTPipeline, GeniePipeline, GenieScheduler
from genie_diffusers.calibration import Calibration
from genie_diffusers.core.time_grids import TIME_GRIDS, TIMESTEP_SPACINGS

ROOT = Path(__file__).parent
CHECKPOINTS = ROOT.parent / "genie_diffusers" / "checkpoints"
MODELS = {"vp": (GeniePipeline, "ddpm-cifar10-16"), "flow": (GenieDiTPipeline, "flow-cifar10-16")}
SCALES = {"vp": (1.0, 3.0, 7.5), "flow": (1.0, 3.0, 5.0)}
#: UniPC's default first, then others
PEERS = {
    "DPM-Solver++(2M)": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "DPM-Solver++(3M)": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "UniPC-2": (UniPCMultistepScheduler, {"solver_order": 2}),
    "UniPC-3": (UniPCMultistepScheduler, {"solver_order": 3}),
    "DEIS-3": (DEISMultistepScheduler, {"solver_order": 3}),
}
FLOW_PEERS = {"Euler": FlowMatchEulerDiscreteScheduler, "Heun": FlowMatchHeunDiscreteScheduler}
SHIFTS = (1.0, 1.5, 2.0, 3.0, 5.0)
SPACINGS = ("linspace", "trailing", "leading")
SIGMA_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
REFERENCE_CALLS = 400


class Bench:
    """A packaged pipeline, and noises of it with their converged solutions."""

    def __init__(self, model: str, scale: float, args: argparse.Namespace):
        pipeline_class, folder = MODELS[model]
        self.pipe = pipeline_class.from_pretrained(CHECKPOINTS / folder).to(torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.model, self.scale = model, scale
        self.config = {**self.pipe.scheduler.config, "clip_sample": False}
        self.sets = {}
        for name, count, seed in (("choice", args.choice_noises, 50_000), ("report", args.noises, 60_000)):
            labels, seeds = [(seed + i) % 10 for i in range(count)], range(seed, seed + count)
            converging = GenieScheduler.from_config(self.config, time_grid="uniform_lambda", clip_sample=False)
            if model == "flow":  # near pure noise nothing happens that λ would resolve
                converging = GenieScheduler.from_config(self.config, time_grid="linear")
            self.sets[name] = labels, seeds, self.ends(converging, REFERENCE_CALLS, labels, seeds)

    def ends(self, scheduler, steps: int, labels, seeds, batch_size: int = 64) -> torch.Tensor:
        self.pipe.scheduler, parts = scheduler, []
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            call = {"class_labels": labels[part], "guidance_scale": self.scale, "num_inference_steps": steps}
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            parts.append(self.pipe(**call, generator=generators, output_type="latent", return_dict=False)[0])
        return torch.cat(parts).flatten(1)

    def errors(self, scheduler, steps: int, name: str = "report") -> np.ndarray:
        labels, seeds, reference = self.sets[name]
        found = self.ends(scheduler, steps, labels, seeds)
        return ((found - reference).norm(dim=1) / reference.norm(dim=1)).numpy()

    def peers(self, steps: int, points: list[float]) -> dict[str, dict[str, object]]:
        """By solver and grid a scheduler of diffusers for this number of calls; `points` is a calibrated grid."""
        found: dict[str, dict[str, object]] = {}
        known = {key: value for key, value in self.config.items() if not key.startswith("_") and value is not None}
        for name, (scheduler_class, options) in PEERS.items():
            grids = found.setdefault(name, {})
            if self.model == "flow":
                own = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
                for shift in SHIFTS:
                    for flag in (None, *SIGMA_GRIDS):
                        extra = {} if flag is None else {flag: True}
                        grids[f"shift {shift:g} {flag or ''}"] = scheduler_class(**own, **extra, flow_shift=shift)
            else:
                theirs = {key: known[key] for key in ("beta_start", "beta_end", "beta_schedule") if key in known}
                for spacing in SPACINGS:
                    grids[spacing] = scheduler_class(**theirs, **options, timestep_spacing=spacing)
                for flag in SIGMA_GRIDS:
                    grids[flag] = scheduler_class(**theirs, **options, **{flag: True})
                if scheduler_class is DPMSolverMultistepScheduler:
                    grids["calibrated"] = Given(scheduler_class(**theirs, **options), points)
                grids |= {
                    f"ours {grid}": Given(scheduler_class(**theirs, **options), None, GenieScheduler.from_config(
                        self.config, time_grid=grid)) for grid in ()
                }
        if self.model == "flow":
            for name, scheduler_class in FLOW_PEERS.items():
                found[name] = {f"shift {shift:g}": scheduler_class(shift=shift) for shift in SHIFTS}
            sigmas = [point / 1000 for point in points]
            found["Euler"]["calibrated"] = WithSigmas(FlowMatchEulerDiscreteScheduler(), sigmas)
            found["UniPC-2"]["calibrated"] = WithSigmas(found["UniPC-2"]["shift 1 "], sigmas)
            found["UniPC-3"]["calibrated"] = WithSigmas(found["UniPC-3"]["shift 1 "], sigmas)
        return found

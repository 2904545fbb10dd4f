"""
What calibration brings: a sampler learned inside a pipeline's calls, against diffusers' solvers on their best grids.

    python benchmarks/calibration.py                # the packaged variance-preserving checkpoint
    python benchmarks/calibration.py --model flow   # the packaged flow transformer
    python benchmarks/calibration.py --model flow --pretrained runs/flow-cifar10-32   # another one
    python benchmarks/calibration.py --curves       # against paths, recorded calls, damping, guidance scales, sizes
    python benchmarks/calibration.py --cost         # time and memory, beside plain runs of the pipeline

Errors are relative distances to the converged solution of the same noise, on noises that nothing was fitted to or
chosen on, mean and standard error. Each peer is, for each number of calls, on the best of its grids, chosen on other
noises: diffusers' own, those of solver_error.py, on flows all shifts, and the calibrated one. Where the packaged
classifier knows pictures of the model's size, their Fréchet distance to real ones is stated too, as in quality.py.
Writes `benchmarks/results/calibration_{model}.json` and `.md`, or `calibration_curves_{model}.json`, `.md` and `.png`;
of a `--pretrained` model the folder's name takes the place of `{model}`.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
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
from genie_diffusers.calibration import Calibration, fitting
from genie_diffusers.calibration.recording import recording_points
from genie_diffusers.metrics import QualityDistance
from solver_error import GRIDS, PEERS, peer

ROOT = Path(__file__).parent
CHECKPOINTS = ROOT.parent / "genie_diffusers" / "checkpoints"
MODELS = {"vp": (GeniePipeline, "ddpm-cifar10-16"), "flow": (GenieDiTPipeline, "flow-cifar10-16")}
SCALES = {"vp": [1.0, 3.0, 7.5], "flow": [1.0, 3.0, 5.0]}
VP_PEERS = ("DEIS-3", "DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC-2", "UniPC-3")
FLOW_PEERS = {
    "FlowMatchEuler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "FlowMatchHeun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
    "DEIS-3": lambda shift: flow_solver(DEISMultistepScheduler, 3, shift),
    "DPM-Solver++(2M)": lambda shift: flow_solver(DPMSolverMultistepScheduler, 2, shift),
    "DPM-Solver++(3M)": lambda shift: flow_solver(DPMSolverMultistepScheduler, 3, shift),
    "UniPC-2": lambda shift: flow_solver(UniPCMultistepScheduler, 2, shift),
    "UniPC-3": lambda shift: flow_solver(UniPCMultistepScheduler, 3, shift),
}
SHIFTS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
#: of the solver that errors are stated against
REFERENCE_CALLS = 200
#: curves, the model calls of their samplers, and the guidance scales that they know
CURVES = ("paths", "recorded", "damping", "scales", "sizes")
CURVE_CALLS, CURVE_SCALES = 8, (1.0, 3.0, 7.5)


def flow_solver(scheduler_class, order: int, shift: float):
    return scheduler_class(
        solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


class Bench:
    """A model at one guidance scale: noises with their converged solutions."""

    def __init__(self, args: argparse.Namespace, scale: float, size: int | None = None):
        pipeline_class, folder = MODELS[args.model]
        self.pipe = pipeline_class.from_pretrained(args.pretrained or CHECKPOINTS / folder)
        self.pipe.to(args.device, torch.float32)
        self.denoiser = getattr(self.pipe, "unet", None) or self.pipe.transformer
        self.model, self.scale, self.device = args.model, scale, args.device
        self.size = size or self.denoiser.config.sample_size
        config = {**self.pipe.scheduler.config, "clip_sample": False, "thresholding": False}
        self.pipe.scheduler = GenieScheduler.from_config(config)
        self.config = self.pipe.scheduler.config
        self.converged = GenieScheduler.from_config(self.config)
        points = recording_points(self.converged.process, 1.0, REFERENCE_CALLS).tolist()
        self.converged.set_timesteps(timesteps=points)
        self.sets, self.references = {}, {}
        for name, count, seed in (("choice", args.choice_noises, 50_000), ("report", args.noises, 60_000)):
            self.sets[name] = self.noises(count, seed)
            self.references[name] = self.ends(self.converged, *self.sets[name]).flatten(1)

    def noises(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` noises, each with a seed of its own, and classes in turn."""
        shape = (3, self.size, self.size)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(self.device), torch.arange(count, device=self.device) % 10

    def predict(self, sample: torch.Tensor, timestep, labels: torch.Tensor) -> torch.Tensor:
        """The guided prediction."""
        if self.scale != 1:
            labels, sample = torch.cat([torch.full_like(labels, 10), labels]), torch.cat([sample, sample])
        timesteps = torch.as_tensor(timestep, device=self.device).expand(len(sample))
        output = self.denoiser(sample, timesteps, class_labels=labels).sample
        if self.scale == 1:
            return output
        null, conditional = output.chunk(2)
        return null + self.scale * (conditional - null)

    @torch.no_grad()
    def ends(self, scheduler, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Where the run of a prepared scheduler ends."""
        scheduler = copy.deepcopy(scheduler)  # which stays prepared for another run
        sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # diffusers' schedulers of flows have none
        for timestep in scheduler.timesteps:
            output = self.predict(scheduler_input(scheduler, sample, timestep), timestep, labels)
            sample = scheduler.step(output, timestep, sample).prev_sample
        return sample

    def errors(self, scheduler, name: str = "report") -> np.ndarray:
        reference = self.references[name]
        ends = self.ends(scheduler, *self.sets[name]).flatten(1)
        return ((ends - reference).norm(dim=1) / reference.norm(dim=1)).cpu().numpy()

    def prepared(self, solver: str, grid: str, calls: int, points: list[float]):
        """A peer, on a grid; `None` where it has no such run."""
        if self.model == "vp":
            if grid != "calibrated":
                return peer(solver, self.config, grid, calls)
            scheduler = PEERS[solver]({**self.config, "clip_sample": False, "thresholding": False})
            scheduler.set_timesteps(calls)
            gammas = GenieScheduler.from_config(self.config).process.gamma(np.array(points))
            return placed(scheduler, points, [*gammas, float(scheduler.sigmas[-1])])
        if solver == "FlowMatchHeun":
            if calls % 2 == 0 or grid == "calibrated":
                return None
            scheduler = FLOW_PEERS[solver](float(grid.split()[1]))
            scheduler.set_timesteps((calls + 1) // 2)
            return scheduler
        scheduler = FLOW_PEERS[solver](1.0 if grid == "calibrated" else float(grid.split()[1]))
        scheduler.set_timesteps(calls)
        if grid == "calibrated":
            sigmas = np.minimum(np.array(points) / 1000, 1 - 1e-6)  # as diffusers' solvers do: log 0 is no number
            return placed(scheduler, points, [*sigmas, 0.0])
        return scheduler

    def best(self, solver: str, calls: int, points: list[float]) -> tuple[str, Any] | None:
        """A peer on the grid that is best on the noises of the choice."""
        grids = (*GRIDS, "calibrated") if self.model == "vp" else (*(f"shift {s:g}" for s in SHIFTS), "calibrated")
        found = {}
        for grid in grids:
            scheduler = self.prepared(solver, grid, calls, points)
            if scheduler is not None:
                found[grid] = float(np.nan_to_num(self.errors(scheduler, "choice").mean(), nan=np.inf))
        if not found:
            return None
        grid = min(found, key=found.__getitem__)
        return grid, self.prepared(solver, grid, calls, points)

    def calibrated(self, steps, paths: int, **options) -> tuple[Calibration, GenieScheduler]:
        """The learned sampler of `paths` paths of classes in turn."""
        labels = [i % 10 for i in range(paths)]
        inputs = {"class_labels": labels, "guidance_scale": self.scale, **options}
        calibration = Calibration(self.pipe, steps, **inputs)
        return calibration, calibration.run()

    def errors_of(self, scheduler: GenieScheduler, calls: int) -> np.ndarray:
        return self.errors(with_calls(scheduler, calls))


def scheduler_input(scheduler, sample: torch.Tensor, timestep) -> torch.Tensor:
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def with_calls(scheduler: GenieScheduler, calls: int) -> GenieScheduler:
    """One of its own, which others do not prepare for another number."""
    scheduler = GenieScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(calls)
    return scheduler


def placed(scheduler, timesteps, sigmas):
    """A scheduler of diffusers that calls the model at points of our choice."""
    scheduler.timesteps = torch.tensor(timesteps, dtype=scheduler.timesteps.dtype)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.set_begin_index(0)
    return scheduler


def measure(args: argparse.Namespace, path: Path):
    """By guidance scale, sampler and number of calls; scales that an earlier run has measured stay."""
    report: dict = json.loads(path.read_text()) if path.exists() else {}
    for scale in args.guidance_scales or SCALES[args.model]:
        bench = Bench(args, scale)
        distances = Distances(bench, args.num_samples) if args.num_samples else None
        rows = Rows(bench, distances)
        cost, points = {}, {}
        for name, options in (
            ("calibrated", {}),
            ("calibrated, rows one after the other", {"refinements": 0}),
        ):
            begun = time.perf_counter()
            calibration, learned = bench.calibrated(args.calls, args.paths, **options)
            cost[name] = {"calls": calibration.calls, "seconds": round(time.perf_counter() - begun)}
            rows.add(name, {n: (calibration.fits[n].grid, with_calls(learned, n)) for n in args.calls})
            points = points or {n: learned.config.tables[str(n)]["timesteps"] for n in args.calls}
        plain = GenieScheduler.from_config(bench.config)
        rows.add("GenieScheduler, nothing attached", {n: (None, with_calls(plain, n)) for n in args.calls})
        for solver in VP_PEERS if args.model == "vp" else FLOW_PEERS:
            found = {n: bench.best(solver, n, points[n]) for n in args.calls}
            rows.add(solver, {n: sampler for n, sampler in found.items() if sampler is not None})
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
        report[f"{scale:g}"] = {"errors": rows.found, "cost": cost, "device": device}
        if distances is not None:
            report[f"{scale:g}"] |= {"converged": distances(bench.converged), "pictures": args.num_samples}
        report = {scale: report[scale] for scale in sorted(report, key=float)}
        path.write_text(json.dumps(report, indent=2) + "\n")
        path.with_suffix(".md").write_text(text_of(report, args))


class Rows:
    """What is measured of samplers, by name and number of calls, printed as it comes."""

    def __init__(self, bench: Bench, distances: "Distances | None"):
        self.bench, self.distances = bench, distances
        self.found: dict[str, dict[str, dict]] = {}

    def add(self, name: str, samplers: dict[int, tuple[str | None, Any]]):
        """Of schedulers, each with the name of its grid if it has been chosen."""
        row = self.found[name] = {}
        for calls, (grid, scheduler) in samplers.items():
            errors = self.bench.errors(scheduler)
            row[str(calls)] = {
                "error": float(errors.mean()),
                "standard_error": float(errors.std(ddof=1) / len(errors) ** 0.5),
                **({} if grid is None else {"grid": grid}),
                **({} if self.distances is None else self.distances(scheduler)),
            }
        print(self.bench.scale, name, {n: round(cell["error"], 4) for n, cell in row.items()}, flush=True)


class Distances:
    """Fréchet distances of the pictures of a sampler to real ones, of the same noises for all samplers."""

    def __init__(self, bench: Bench, num_samples: int):
        self.bench, self.distance = bench, QualityDistance.from_pretrained(device=bench.device)
        self.noise, self.labels = bench.noises(num_samples, 70_000)

    def __call__(self, scheduler) -> dict[str, float]:
        batches = zip(self.noise.split(500), self.labels.split(500), strict=True)
        pictures = torch.cat([self.bench.ends(scheduler, *batch) for batch in batches])
        found = self.distance(pictures)["frechet_distance"]
        return {"frechet_distance": found.value, "frechet_distance_error": found.standard_error}


def text_of(report: dict, args: argparse.Namespace) -> str:
    """The tables of a report."""
    peers = VP_PEERS if args.model == "vp" else tuple(FLOW_PEERS)
    parts = [
        f"Written by `python benchmarks/calibration.py {args.command}`: mean relative error to the converged "
        f"solution over {args.noises} noises, its standard error, and in brackets the ratio to the best peer's. "
        f"Fitted to {args.paths} paths; peers on their best grids, chosen on {args.choice_noises} other noises."
    ]
    for scale, found in report.items():
        rows = found["errors"]
        best = {n: min(rows[p][n]["error"] for p in peers if n in rows.get(p, {})) for n in map(str, args.calls)}
        lines = ["| Model calls | " + " | ".join(map(str, args.calls)) + " |", "|---" * (len(args.calls) + 1) + "|"]
        for name, row in rows.items():
            cells = []
            for n in map(str, args.calls):
                cell = row.get(n)
                text = "" if cell is None else f"{cell['error']:.4f} ± {cell['standard_error']:.4f}"
                cells.append(text + (f" ({cell['error'] / best[n]:.2f})" if cell and name not in peers else ""))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        cost = "; ".join(
            f"{name}: {c['calls']} calls of a batch, {c['seconds']} s" for name, c in found["cost"].items()
        )
        parts.append(f"## w = {scale}\n\n" + "\n".join(lines) + f"\n\n{cost} ({found['device']}).")
        if "converged" in found:
            del lines[2:]
            for name, row in rows.items():
                cells = [distance_of(row[n]) if n in row else "" for n in map(str, args.calls)]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            parts.append(
                f"Fréchet distance of {found['pictures']:,} pictures to real ones (converged solution: "
                f"{distance_of(found['converged'])}):\n\n" + "\n".join(lines)
            )
    return "\n\n".join(parts) + "\n"


def distance_of(cell: dict) -> str:
    return f"{cell['frechet_distance']:.3f} ± {cell['frechet_distance_error']:.3f}"


def curves(args: argparse.Namespace, path: Path):
    """Errors of `CURVE_CALLS` calls, by what is varied, setting and value; written as they come."""
    found: dict = json.loads(path.read_text()) if path.exists() else {}

    def measured(what: str, row: str, value: str, error: float):
        found.setdefault(what, {}).setdefault(row, {})[value] = float(error)
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(what, row, value, round(float(error), 4), flush=True)

    benches = {scale: Bench(args, scale) for scale in CURVE_SCALES}

    def error(scale: float, paths: int = 8, **options) -> float:
        bench = benches[scale]
        return bench.errors_of(bench.calibrated(CURVE_CALLS, paths, **options)[1], CURVE_CALLS).mean()

    if "paths" in args.curves:
        for scale in (1.0, 3.0):
            for paths in (1, 2, 4, 8, 16, 32, 64):
                measured("paths", f"w = {scale:g}", str(paths), error(scale, paths))
    if "recorded" in args.curves:
        for scale in (1.0, 3.0):
            for count in (15, 20, 30, 60, 120):
                measured("recorded calls", f"w = {scale:g}", str(count), error(scale, teacher_steps=count))
    if "damping" in args.curves:
        for scale in CURVE_SCALES:
            measured("damping", f"w = {scale:g}", "no step", error(scale, refinements=0))
            for fitting.DAMPING in (0.01, 0.1, 1.0):
                measured("damping", f"w = {scale:g}", str(fitting.DAMPING), error(scale))
        fitting.DAMPING = 0.1
    if "scales" in args.curves:
        learned = {f"{scale:g}": bench.calibrated(CURVE_CALLS, 8)[1] for scale, bench in benches.items()}
        every = tuple(CURVE_SCALES)
        learned["all of them"] = benches[every[0]].calibrated(CURVE_CALLS, 8, guidance_scale=every)[1]
        for name, scheduler in learned.items():
            for scale, bench in benches.items():
                measured(
                    "guidance scale", f"fitted at {name}", f"{scale:g}", bench.errors_of(scheduler, CURVE_CALLS).mean()
                )
    if "sizes" in args.curves:
        at_16 = benches[3.0].calibrated(CURVE_CALLS, 8)[1]
        for size in (16, 24, 32):
            bench = Bench(args, 3.0, size)
            measured("side in pixels", "learned at 16", str(size), bench.errors_of(at_16, CURVE_CALLS).mean())
            plain = GenieScheduler.from_config(bench.config)
            measured("side in pixels", "nothing attached", str(size), bench.errors_of(plain, CURVE_CALLS).mean())
    write_curves(found, path, args)


def write_curves(found: dict, path: Path, args: argparse.Namespace):
    figure = Figure(figsize=(3.4 * len(found), 3.2), layout="constrained")
    command = f"python benchmarks/calibration.py --model {args.model} --curves"
    lines = [f"Written by `{command}`: mean relative error of {CURVE_CALLS} calls, {args.noises} noises.", ""]
    for axes, (what, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for name, row in rows.items():
            axes.plot(list(row), list(row.values()), marker="o", label=name)
        axes.set(xlabel=what, ylabel="relative error", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
        columns = list(next(iter(rows.values())))
        lines += [f"| {what} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{row[c]:.4f}" for c in columns) + " |" for name, row in rows.items()]
        lines.append("")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    path.with_suffix(".md").write_text("\n".join(lines))


def cost(args: argparse.Namespace) -> dict:
    """Seconds, model calls and peak memory of a calibration and of drawing the same paths once, a process each."""
    found = {}
    for what in ("import", "60 calls", "calibration", "calibration, one path at a time"):
        command = [sys.executable, __file__, "--model", args.model, "--cost_of", what]
        found[what] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(what, found[what], flush=True)
    return found


def cost_of(what: str, model: str):
    """What one process takes, as a line of JSON."""
    pipeline_class, folder = MODELS[model]
    pipe = pipeline_class.from_pretrained(CHECKPOINTS / folder).to(torch.float32)
    inputs = {"class_labels": list(range(8)), "guidance_scale": 3.0}
    pipe.set_progress_bar_config(disable=True)
    begun, calls = time.perf_counter(), 0
    if what == "60 calls":
        pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
        pipe(**inputs, num_inference_steps=60, output_type="latent")
        calls = 60
    elif what != "import":
        size = 1 if "one path" in what else None
        calibration = Calibration(pipe, (4, 6, 8, 10), max_batch_size=size, **inputs)
        calibration.run()
        calls = calibration.calls
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": round(time.perf_counter() - begun, 1), "calls": calls, "peak_mib": round(peak)}))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vp")
    parser.add_argument("--pretrained", help="Folder of another pipeline of that kind. Default: the packaged one.")
    parser.add_argument(
        "--curves", nargs="*", choices=CURVES, metavar="NAME", help=f"Of {', '.join(CURVES)}; default: all."
    )
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--cost_of", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=lambda text: [int(n) for n in text.split(",")], default=[4, 5, 6, 8, 10])
    parser.add_argument("--guidance_scales", type=float, nargs="+")
    parser.add_argument("--paths", type=int, default=8)
    parser.add_argument("--noises", type=int, default=128)
    parser.add_argument("--choice_noises", type=int, default=16)
    parser.add_argument("--num_samples", type=int, default=0, help="Pictures for Fréchet distances; 0: none.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    args.command = " ".join(sys.argv[1:] if argv is None else argv)
    diffusers.utils.logging.set_verbosity_error()
    if args.cost_of is not None:
        cost_of(args.cost_of, args.model)
        return
    torch.backends.cudnn.allow_tf32 = False  # ten bits are more than some of the errors
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = args.model if args.pretrained is None else Path(args.pretrained).name
    if args.cost:
        (args.output_dir / "calibration_cost.json").write_text(json.dumps(cost(args), indent=2) + "\n")
        return
    if args.curves is not None:
        args.curves = args.curves or CURVES
        curves(args, args.output_dir / f"calibration_curves_{name}.json")
    else:
        measure(args, args.output_dir / f"calibration_{name}.json")


if __name__ == "__main__":
    main()

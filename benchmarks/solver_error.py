"""
How far each solver lands from the converged solution of the same network's ODE, at equal numbers of model calls.

    python benchmarks/solver_error.py

draws from the packaged checkpoint, class-conditional and unguided, with every solver on every grid, chooses each
solver's best grid for each number of calls on one set of noises, and states the error on another. Writes
`benchmarks/results/solver_error.json`, `solver_error.md` and `solver_error.png`; docs/benchmarks.md says what is
measured.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from matplotlib import colormaps
from matplotlib.figure import Figure

from genie_diffusers import ExactSlope, GenieScheduler, GenieUNet2DModel, GGDMScheduler, QuasiTaylorScheduler
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.core.time_grids import distinct_integers, time_grid
from genie_diffusers.learning.fitting import TablesAlone
from genie_diffusers.learning.paths import Noises, draw, draw_guided, in_batches, predict, relative_error, solver_of

ROOT = Path(__file__).parent
HEAD = Path(PACKAGED_MODEL).parent / "genie-head-cifar10-16"
GGDM = Path(PACKAGED_MODEL).parent / "ggdm-cifar10-16"
#: 0.0002 from the solution with all 1000 timesteps, 0.0004 at guidance scale 7.5
REFERENCE_CALLS = 400
#: the checkpoint's own timesteps, and grids that end with a call at the smallest timestep or (−) one step before it
GRIDS = ("default", *(f"{name}{end}" for name in ("uniform_lambda", "quadratic", "karras", "linear") for end in "+-"))

PEERS: dict[str, Callable] = {
    "DDIM": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=1),
    "DEIS-3": lambda config: DEISMultistepScheduler.from_config(config, solver_order=3),
    "DPM-Solver++(2M)": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=2),
    "DPM-Solver++(3M)": lambda config: DPMSolverMultistepScheduler.from_config(config, solver_order=3),
    "DPM-Solver++(2S)": lambda config: DPMSolverSinglestepScheduler.from_config(config, solver_order=2),
    "UniPC-2": lambda config: UniPCMultistepScheduler.from_config(config, solver_order=2),
    "UniPC-3": lambda config: UniPCMultistepScheduler.from_config(config, solver_order=3),
    "PNDM": lambda config: PNDMScheduler.from_config(config, skip_prk_steps=True),
    "Heun": lambda config: HeunDiscreteScheduler.from_config(config),
    "DDPM": lambda config: DDPMScheduler.from_config({**config, "timestep_spacing": "trailing"}),
}
OWN = {
    "GENIE, head-free": {"method": "hermite"},
    "GENIE order 2, head-free": {"method": "hermite", "interpolation_order": 2},
    "GENIE Taylor, head-free": {"method": "taylor"},
    "GENIE Taylor + derivative head": {"method": "taylor", "source": "derivative head"},
    "GENIE Hermite + derivative head": {"method": "hermite", "source": "derivative head"},
    "GENIE Taylor + exact slope": {"method": "taylor", "source": "exact"},
    "GENIE Hermite + exact slope": {"method": "hermite", "source": "exact"},
    "GENIE, tables alone": {"source": "tables"},
    "GENIE, step head": {"source": "step head"},
    "GGDM": {"class": GGDMScheduler},
    "Quasi-Taylor ODE 1": {"class": QuasiTaylorScheduler, "method": "ode", "taylor_order": 1},
    "Quasi-Taylor ODE 2": {"class": QuasiTaylorScheduler, "method": "ode", "taylor_order": 2},
    "Quasi-Taylor SDE 2": {"class": QuasiTaylorScheduler, "method": "sde", "taylor_order": 2, "time_grid": "trailing"},
}
#: what draws noise has no error here, see quality.py
STOCHASTIC = ("DDPM", "Quasi-Taylor SDE 2")
SOLVERS = [name for name in (*PEERS, *OWN) if name not in STOCHASTIC]


def peer(name: str, config, grid: str, calls: int):
    """A scheduler of diffusers whose run makes `calls` model calls on `grid`; `None` where it has no such run."""
    diffusers.utils.logging.set_verbosity_error()  # they warn of keys that are ours
    flags = {"clip_sample": False, "thresholding": False}
    if name == "Heun":
        if calls % 2 == 0 or grid not in ("default", "karras+", "uniform_lambda+"):
            return None
        options = {"use_karras_sigmas": grid == "karras+", "use_exponential_sigmas": grid == "uniform_lambda+"}
        scheduler = HeunDiscreteScheduler.from_config(config, **flags, **options)
        scheduler.set_timesteps((calls + 1) // 2)
        return scheduler
    if name == "PNDM":
        if grid != "default":  # its weights are those of equal steps
            return None
        scheduler = PEERS[name]({**config, **flags})
        scheduler.set_timesteps(calls - 1)  # its second call repeats the first timestep
        return scheduler
    scheduler = PEERS[name]({**config, **flags})
    scheduler.set_timesteps(calls)
    if grid != "default":
        if name == "DEIS-3" and grid[-1] == "+":  # it always ends at the smallest timestep, without a call there
            return None
        process = GenieScheduler.from_config(config).process
        points = time_grid(process, grid[:-1], calls + (grid[-1] == "-"))[:calls]
        points = distinct_integers(points, process.num_train_timesteps - 1).astype(np.float64)
        scheduler.timesteps = torch.from_numpy(points).long()
        scheduler.sigmas = torch.from_numpy(np.append(process.gamma(points), scheduler.sigmas[-1])).float()
        scheduler.set_begin_index(0)
    return scheduler


def own(name: str, config, grid: str, calls: int, sources: dict):
    """A scheduler of this package with its source attached; `None` where it has no such run."""
    options = dict(OWN[name])
    source = sources[options.pop("source", None)]
    tables = getattr(getattr(source, "slope_source", source), "tables", None)
    if tables is not None and (grid != "default" or str(calls) not in tables):  # a table has a grid of its own
        return None
    kind = options.pop("class", GenieScheduler)
    if kind is GGDMScheduler:
        scheduler = kind.from_pretrained(GGDM)
        if grid != "default" or str(calls) not in scheduler.config.tables:
            return None
    elif kind is QuasiTaylorScheduler:
        if grid[-1] == "-":  # its grids end with a call at the smallest timestep
            return None
        scheduler = kind.from_config(
            {**config, "clip_sample": False, "thresholding": False, "time_grid": None}, **options
        )
        if grid != "default":
            scheduler.register_to_config(time_grid=grid[:-1])
    else:
        # The checkpoint's timesteps are those that the peers know of: its `time_grid` is another one of the grids.
        of_grid = {"time_grid": grid[:-1], "denoising_step": grid[-1] == "+"}
        options |= {"time_grid": None} if grid == "default" else of_grid
        scheduler = solver_of(config, **{"method": "hermite", **options})
    scheduler.attach(source)
    scheduler.set_timesteps(calls)
    return scheduler


def scheduler_of(name: str, config, grid: str, calls: int, sources: dict):
    """A scheduler of [`PEERS`] or [`OWN`], prepared for a run; `None` where it has no such run."""
    return peer(name, config, grid, calls) if name in PEERS else own(name, config, grid, calls, sources)


def sources_of(unet: GenieUNet2DModel) -> dict:
    """What a step head offers the schedulers of [`OWN`]."""
    return {None: None, "step head": unet, "tables": TablesAlone(unet.derivative_head.config.tables)}


def run(unet: GenieUNet2DModel, scheduler, noises: Noises, **options) -> torch.Tensor:
    """The pictures of a prepared scheduler; the loop of diffusers' pipelines."""
    sample = noises.noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(
            predict(unet, model_input, timestep, noises), timestep, sample, **options
        ).prev_sample.float()
    return sample


def converged(unet, config, noises: Noises) -> torch.Tensor:
    """Where the ODE ends: at the smallest noise level, and at clean data; shape `(noises, 2, ...)`."""
    scheduler = solver_of(config, time_grid="uniform_lambda", denoising_step=True)

    def solve(batch: Noises) -> torch.Tensor:
        scheduler.set_timesteps(REFERENCE_CALLS)
        sample = batch.noise
        for timestep in scheduler.timesteps:
            noisy = sample
            sample = scheduler.step(predict(unet, noisy, timestep, batch), timestep, noisy).prev_sample
        return torch.stack([noisy, sample], dim=1)

    return in_batches(solve, noises, 64, torch.device("cpu"))


def errors_of(unet, make: Callable, noises: Noises, reference: torch.Tensor) -> np.ndarray | None:
    """Relative error of each picture, or `None` if there is no such run."""
    scheduler = make()
    if scheduler is None:
        return None
    pictures = in_batches(lambda batch: run(unet, make(), batch), noises, 64, torch.device("cpu"))
    ends_clean = not hasattr(scheduler, "sigmas") or scheduler.sigmas[-1] == 0
    return relative_error(pictures, reference[:, int(ends_clean)]).numpy()


def packaged() -> tuple[dict, dict, dict]:
    """The packaged checkpoint with both heads: UNets and slope sources as [`OWN`] calls them, the configuration."""
    plain = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float().eval()
    with_derivative_head = GenieUNet2DModel.from_unet(plain, HEAD)
    unets = dict.fromkeys((None, "step head", "tables", "exact"), plain) | {"derivative head": with_derivative_head}
    sources = sources_of(plain) | {"derivative head": with_derivative_head, "exact": ExactSlope(plain)}
    return unets, sources, GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")


def noises_of(unet: GenieUNet2DModel, count: int, seed: int, guidance_scale: float | None) -> Noises:
    """`count` noises: unguided, a tenth of them of the null class, or all guided with one scale."""
    if guidance_scale is None:
        return draw(unet, count, seed, label_dropout=0.1)
    return draw_guided(unet, count, seed, guidance_scale)


def measure(results: dict, args: argparse.Namespace, guidance_scale: float | None = None):
    """By solver and model calls: the mean error, its standard error and the grid, which is chosen on other noises."""
    unets, sources, config = packaged()
    sets = {}
    for name, count, seed in (("choice", args.choice_noises, args.seed), ("report", args.noises, args.seed + 1)):
        noises = noises_of(unets[None], count, seed, guidance_scale)
        sets[name] = noises, converged(unets[None], config, noises)
    for name in args.solvers:
        results[name] = {}
        source = OWN.get(name, {}).get("source")
        for calls in args.calls:
            # An exact slope costs several calls; what is left of them is not more than asked for.
            steps = int(calls / args.exact_slope_cost) if source == "exact" else calls
            if steps < 2:
                continue

            def make(grid: str, name=name, steps=steps):
                return scheduler_of(name, config, grid, steps, sources)

            chosen = {}
            for grid in GRIDS:
                errors = errors_of(unets[source], lambda grid=grid: make(grid), *sets["choice"])
                if errors is not None:
                    chosen[grid] = float(errors.mean())
            if not chosen:
                continue
            grid = min(chosen, key=chosen.__getitem__)
            errors = errors_of(unets[source], lambda grid=grid: make(grid), *sets["report"])
            results[name][str(calls)] = {
                "error": float(errors.mean()),
                "standard_error": float(errors.std(ddof=1) / len(errors) ** 0.5),
                "grid": grid,
                "steps": steps,
            }
            print(f"{name}, {calls} calls: {errors.mean():.4f} on {grid}", flush=True)


def explanation(command: str, settings: dict) -> str:
    return (
        f"Written by `{command}`: mean relative error to the converged solution over {settings['noises']} noises and "
        "its standard error, in brackets the ratio to the best peer's. Grids are chosen on "
        f"{settings['choice_noises']} other noises."
    )


def table_of(results: dict, calls: list[int]) -> str:
    peers = [results[name] for name in PEERS if name in results]
    best = {n: min([row[n]["error"] for row in peers if n in row], default=np.nan) for n in map(str, calls)}
    lines = ["| Model calls | " + " | ".join(map(str, calls)) + " |", "|---" * (len(calls) + 1) + "|"]
    for name, row in results.items():
        cells = []
        for n in map(str, calls):
            cell = row.get(n)
            if cell is None:
                cells.append("")
                continue
            text = f"{cell['error']:.4f} ± {cell['standard_error']:.4f}"
            if name not in PEERS:
                text += f" ({cell['error'] / best[n]:.2f})"
            cells.append(f"**{text}**" if name in PEERS and cell["error"] == best[n] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict, path: Path):
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = [name for name in results if results[name] and "exact" not in name]  # those are far above all others
    peers, ours = [name for name in shown if name in PEERS], [name for name in shown if name not in PEERS]
    styles = {
        name: {"color": f"C{i}", "linewidth": 0.9, "linestyle": "--", "marker": "."} for i, name in enumerate(peers)
    }
    styles |= {
        name: {"color": colormaps["turbo"](i / len(ours)), "linewidth": 1.8, "marker": "s"}
        for i, name in enumerate(ours)
    }
    for name, style in styles.items():
        row = results[name]
        axes.loglog([int(n) for n in row], [cell["error"] for cell in row.values()], label=name, markersize=5, **style)
    ticks = sorted({int(n) for row in results.values() for n in row})
    axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="model calls", ylabel="relative error to the converged solution")
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=150)


def parser_of(description: str, calls: list[int], solvers: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=lambda text: [int(n) for n in text.split(",")], default=calls)
    parser.add_argument(
        "--solvers",
        nargs="+",
        choices=SOLVERS,
        default=solvers,
        metavar="NAME",
        help="Measure these; the others stay as they are in the results.",
    )
    parser.add_argument("--noises", type=int, default=128, help="Noises that errors are stated on.")
    parser.add_argument("--choice_noises", type=int, default=16, help="Other noises, on which grids are chosen.")
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    return parser


def begin(args: argparse.Namespace, command: str, name: str) -> dict:
    """The report as far as it is known: errors of an earlier run stay if their settings are the same."""
    settings = {"noises": args.noises, "choice_noises": args.choice_noises, "seed": args.seed}
    cost = json.loads((ROOT / "results" / "cost.json").read_text())
    args.exact_slope_cost = cost["packaged ddpm-cifar10-16"]["exact_slope_step_per_forward"]
    settings |= {"exact_slope_cost": args.exact_slope_cost, "grids": list(GRIDS)}
    path = args.output_dir / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    args.output_dir.mkdir(exist_ok=True)
    return {
        "command": command,
        "settings": settings,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "errors": earlier["errors"] if earlier.get("settings") == settings else {},
    }


def in_order(errors: dict) -> dict:
    return {name: errors[name] for name in SOLVERS if errors.get(name)}


def main(argv: list[str] | None = None):
    args = parser_of(__doc__, [5, 8, 10, 15, 20, 50], SOLVERS).parse_args(argv)
    # Rows that stay are of the same settings: the whole is what one run of all solvers gives.
    report = begin(args, "python benchmarks/solver_error.py", "solver_error")
    measure(report["errors"], args)
    report["errors"] = in_order(report["errors"])
    (args.output_dir / "solver_error.json").write_text(json.dumps(report, indent=2) + "\n")
    text = explanation(report["command"], report["settings"]) + "\n\n" + table_of(report["errors"], args.calls) + "\n"
    (args.output_dir / "solver_error.md").write_text(text)
    plot(report["errors"], args.output_dir / "solver_error.png")
    print(text)


if __name__ == "__main__":
    main()

"""
The solvers of `ExponentialMultistepScheduler` beside each other, each on its best grid.

    python benchmarks/solvers.py             # --help lists problems, solvers, calls and sizes
    python benchmarks/solvers.py --orders    # measured orders of convergence alone

Three tables. Orders of convergence are those of the drift, in float64 on a Gaussian mixture, from runs of n, 2n and 4n
steps. Errors are mean relative distances to the converged solution of the same noise, of the deterministic solvers
(of some others with `eta=0`), on mixtures whose denoiser is known in closed form, on both paths, and on the packaged
models of noise and of flows. What the stochastic ones draw is stated as the Fréchet distance between the mean and
covariance of draws and those of the mixtures, which are known; exact draws are a row of their own, since so few draws
have a distance too. For each solver and number of calls the grid is chosen on other noises. Writes
`benchmarks/results/solvers.json` and `solvers.md`.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch

from genie_diffusers import ExponentialMultistepScheduler, GenieDiTPipeline, GeniePipeline, GenieScheduler
from genie_diffusers.core import Parametrisation, run
from genie_diffusers.core.table import Levels, build
from genie_diffusers.core.time_grids import TIME_GRIDS
from genie_diffusers.metrics import frechet_distance
from genie_diffusers.schedulers.scheduling_exponential_multistep import MULTISTEP_SOLVERS
from head_free import Mixture, mixtures

ROOT = Path(__file__).parent
CHECKPOINTS = ROOT.parent / "genie_diffusers" / "checkpoints"
PACKAGED = {"ddpm-cifar10-16": (GeniePipeline, "unet"), "flow-cifar10-16": (GenieDiTPipeline, "transformer")}
CALLS = [5, 8, 10, 15, 20]
#: of the solution that errors are stated against
REFERENCE_CALLS = 400
#: γ between which orders are measured, and steps of the shortest run
ORDER_SPAN, ORDER_STEPS = (8.0, 0.25), 80
FLOW = {"prediction_type": "flow_prediction"}

#: by row of the tables: the scheduler and what it is made with
ERRORS = {
    **{name: {"solver": name} for name, kind in MULTISTEP_SOLVERS.items() if kind.eta == 0 and "er_sde" not in name},
    **{f"{name}, eta=0": {"solver": name, "eta": 0.0} for name in ("sa_solver_2", "sa_solver_3")},
}
DRAWS = {
    **{name: {"solver": name} for name, kind in MULTISTEP_SOLVERS.items() if kind.eta > 0 or "er_sde" in name},
    **{f"{name}, eta=1": {"solver": name, "eta": 1.0} for name in ("ddim", "res_2m", "res_3m")},
    "unipc_2": {"solver": "unipc_2"},  # without noise, beside them
}
#: beside them in the errors
HERMITE = "GenieScheduler, hermite"


@dataclasses.dataclass
class Problem:
    """
    Something to sample from.

    Args:
        config (`dict`): Of its schedulers.
        predict (`Callable`): `predict(sample, timestep, alpha, sigma, numbers)` → the model's output.
        noise (`Callable`): `noise(numbers)` → standard normal noise, the same for the same numbers.
        mixture ([`Mixture`], *optional*): The data, if they are known.
    """

    config: dict
    predict: Callable
    noise: Callable
    mixture: Mixture | None = None

    @torch.no_grad()
    def sample(self, scheduler, numbers: range) -> torch.Tensor:
        """The run of a prepared scheduler."""
        sample = self.noise(numbers)
        generator = torch.Generator().manual_seed(1_000_000 + numbers.start)
        for index, timestep in enumerate(scheduler.timesteps):
            levels = scheduler.table.model_level(index)
            output = self.predict(sample, timestep, *map(float, levels), numbers)
            sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        return sample.flatten(1)


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Problem]]:
    """By name, in the order of the tables."""
    for number, (name, mixture, dimension, _) in enumerate(mixtures()):
        yield name, on_path(mixture, dimension, args, {})
        if number % 2 == 0:
            yield f"{name}, as a flow", on_path(mixture, dimension, args, FLOW)
    for folder, (pipeline_class, denoiser) in PACKAGED.items():
        if args.problem in f"packaged {folder}":
            yield f"packaged {folder}", packaged(folder, pipeline_class, denoiser, args)


def numbered(numbers: range, shape: tuple, dtype: torch.dtype, device) -> torch.Tensor:
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=dtype) for number in numbers]
    return torch.stack(drawn).to(device)


def on_path(mixture: Mixture, dimension: int, args: argparse.Namespace, config: dict) -> Problem:
    conversion = Parametrisation(config.get("prediction_type", "epsilon"))
    mixture.means, mixture.logits = mixture.means.to(args.device), mixture.logits.to(args.device)

    def predict(sample, timestep, alpha, sigma, numbers):
        return conversion.output(mixture(sample, alpha, sigma, timestep), sample, alpha, sigma)

    def noise(numbers):
        return numbered(numbers, (dimension,), torch.float64, args.device)

    return Problem(config, predict, noise, mixture)


def packaged(folder: str, pipeline_class, denoiser: str, args: argparse.Namespace) -> Problem:
    """Class-conditional and unguided; noise n is of class n modulo ten."""
    pipe = pipeline_class.from_pretrained(CHECKPOINTS / folder).to(args.device, torch.float32)
    model = getattr(pipe, denoiser)
    shape = (model.config.in_channels, *[model.config.sample_size] * 2)

    def predict(sample, timestep, alpha, sigma, numbers):
        labels = torch.tensor([number % 10 for number in numbers], device=args.device)
        return model(sample, timestep.to(args.device).expand(len(sample)), class_labels=labels).sample

    def noise(numbers):
        return numbered(numbers, shape, torch.float32, args.device)

    return Problem(dict(pipe.scheduler.config), predict, noise)


def prepared(problem: Problem, name: str, grid: str, calls: int):
    """A scheduler of a row on a grid, whose sign says whether the last call is at the smallest timestep."""
    of_grid = {"time_grid": None} if grid == "default" else {"time_grid": grid[:-1], "denoising_step": grid[-1] == "+"}
    options = {"clip_sample": False, "thresholding": False, "tables": None, **of_grid}
    kind, own = ExponentialMultistepScheduler, {**ERRORS, **DRAWS}.get(name)
    if own is None:
        kind, own = GenieScheduler, {"method": "hermite"}
    scheduler = kind.from_config(problem.config, **options, **own)
    scheduler.set_timesteps(calls)
    return scheduler


def converged(problem: Problem, numbers: range) -> torch.Tensor:
    return problem.sample(prepared(problem, HERMITE, "uniform_lambda+", REFERENCE_CALLS), numbers)


def best(problem: Problem, name: str, calls: int, args: argparse.Namespace, measure: Callable) -> dict:
    """What `measure(samples, which noises)` says of a row on the grid that is best on the noises of the choice."""
    found = {}
    for grid in args.grids:
        scheduler = prepared(problem, name, grid, calls)
        found[grid] = float(measure(problem.sample(scheduler, args.choice), "choice").mean())
    grid = min((grid for grid in found if np.isfinite(found[grid])), key=found.__getitem__)
    values = measure(problem.sample(prepared(problem, name, grid, calls), args.report), "report").double()
    cell = {"value": float(values.mean()), "grid": grid}
    if len(values) > 1:
        cell["standard_error"] = float(values.std() / len(values) ** 0.5)
    return cell


def measured(problem: Problem, names: list[str], args: argparse.Namespace, measure: Callable) -> dict:
    rows: dict[str, dict] = {}
    for name in names:
        rows[name] = {str(calls): best(problem, name, calls, args, measure) for calls in args.calls}
        print(f"  {name}: " + " ".join(f"{cell['value']:.4f}" for cell in rows[name].values()), flush=True)
    return rows


def errors(problem: Problem, args: argparse.Namespace) -> dict:
    ends = {"choice": converged(problem, args.choice), "report": converged(problem, args.report)}

    def error(sample: torch.Tensor, which: str) -> torch.Tensor:
        return (sample - ends[which]).norm(dim=1) / ends[which].norm(dim=1)

    return measured(problem, selected([*ERRORS, HERMITE], args), args, error)


def draws(problem: Problem, args: argparse.Namespace) -> dict:
    args = argparse.Namespace(**{**vars(args), "choice": args.choice_draws, "report": args.report_draws})
    shares, means = problem.mixture.logits.softmax(0), problem.mixture.means
    mean = shares @ means
    offsets = means - mean
    covariance = offsets.T @ (shares[:, None] * offsets)
    covariance = covariance + problem.mixture.std**2 * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def distance(sample: torch.Tensor, which: str) -> torch.Tensor:
        return frechet_distance(sample.cpu(), mean.cpu(), covariance.cpu())[None]

    rows = measured(problem, selected([*DRAWS], args), args, distance)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(shares.cpu(), len(args.report), replacement=True, generator=generator)
    spread = torch.randn(len(chosen), len(mean), generator=generator, dtype=torch.float64)
    exact = float(distance(means.cpu()[chosen] + problem.mixture.std * spread, "report"))
    return rows | {"exact draws": {str(calls): {"value": exact} for calls in args.calls}}


def selected(names: list[str], args: argparse.Namespace) -> list[str]:
    return [name for name in names if not args.solvers or name.partition(",")[0] in args.solvers]


# --- orders of convergence -------------------------------------------------------------------------------------------


def steps_between(steps: int) -> np.ndarray:
    """γ even neither in γ nor in λ, after three steps so short that they do not count: little is known in them."""
    most, least = ORDER_SPAN
    first = most * np.exp(-np.arange(3) / steps**2)
    return np.append(first, np.linspace((first[-1] ** 2 / first[-2]) ** (1 / 3), least ** (1 / 3), steps - 2) ** 3)


def order(name: str, path: str) -> float:
    """log₂ of the ratio of the changes by halving the steps twice."""
    _, mixture, dimension, _ = next(mixtures())
    scheduler = ExponentialMultistepScheduler(solver=name, lower_order_final=False)
    start = ORDER_SPAN[0] * numbered(range(16), (dimension,), torch.float64, "cpu")
    ends = []
    for steps in (ORDER_STEPS, 2 * ORDER_STEPS, 4 * ORDER_STEPS):
        gammas = steps_between(steps)
        alphas = 1 / (1 + gammas) if path == "flow" else 1 / np.sqrt(1 + gammas**2)
        # timesteps are where SA-Solver asks whether it adds noise
        levels = Levels(np.full(steps, 500.0), alphas, gammas * alphas)
        table = build(levels, scheduler.row, scheduler.correction)
        rows = [{term: weight for term, weight in row.items() if term[0] != "noise"} for row in table]
        table = dataclasses.replace(table, rows=tuple(rows), timesteps=np.arange(steps))

        def model(sample, index, levels=levels):
            return mixture(sample, levels.alphas[index], levels.sigmas[index], index)

        ends.append(run(table, model, alphas[0] * start) / alphas[-1])
    coarse, middle, fine = ends
    return float(torch.log2((coarse - middle).norm() / (middle - fine).norm()))


def orders(args: argparse.Namespace) -> dict:
    names = selected([*MULTISTEP_SOLVERS], args)
    return {name: {path: order(name, path) for path in ("vp", "flow")} for name in names}


# --- the report ------------------------------------------------------------------------------------------------------


def table_of(rows: dict, calls: list[int]) -> str:
    lines = ["| Model calls | " + " | ".join(map(str, calls)) + " |", "|---" * (len(calls) + 1) + "|"]
    least = {n: min(row[n]["value"] for name, row in rows.items() if name != "exact draws") for n in map(str, calls)}
    for name, row in rows.items():
        cells = []
        for n in map(str, calls):
            text = f"{row[n]['value']:.4f}"
            text = f"**{text}**" if row[n]["value"] == least[n] else text
            cells.append(f"{text} {row[n]['grid']}" if "grid" in row[n] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_of(report: dict) -> str:
    lines = [f"Written by `{report['command']}`. Grids end with a call at the smallest timestep (+) or before (-).\n"]
    lines += ["## Orders of convergence of the drift\n", "| | vp | flow |", "|---|---|---|"]
    lines += [f"| {name} | {row['vp']:.2f} | {row['flow']:.2f} |" for name, row in report["orders"].items()]
    for what, title in (("errors", "Relative error"), ("draws", "Fréchet distance of draws")):
        for problem, rows in report.get(what, {}).items():
            lines += [f"\n## {title}: {problem}\n", table_of(rows, report["settings"]["calls"])]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grids = ["default", *(f"{name}{end}" for name in TIME_GRIDS for end in "+-")]
    parser.add_argument("--orders", action="store_true", help="Measure the orders alone.")
    parser.add_argument(
        "--problem", default="", help="Those whose name has this in it, such as 'plane' or 'packaged'."
    )
    parser.add_argument("--solvers", nargs="+", choices=MULTISTEP_SOLVERS, metavar="NAME", help="These alone.")
    parser.add_argument("--grids", nargs="+", choices=grids, default=grids, metavar="GRID")
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--noises", type=int, default=128, help="Noises that errors are stated on.")
    parser.add_argument("--choice_noises", type=int, default=16, help="Other noises, on which grids are chosen.")
    parser.add_argument("--draws", type=int, default=4096, help="Draws of the stochastic solvers, for each of both.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()  # they warn of grids that are ours
    args.choice, args.report = range(50_000, 50_000 + args.choice_noises), range(60_000, 60_000 + args.noises)
    args.choice_draws, args.report_draws = range(100_000, 100_000 + args.draws), range(300_000, 300_000 + args.draws)
    keys = ("calls", "noises", "choice_noises", "draws", "device")
    report: dict = {
        "command": shlex.join(["python", "benchmarks/solvers.py", *(sys.argv[1:] if argv is None else argv)]),
        "what": "by problem, solver and model calls, each on the grid that is best on other noises",
        "settings": {key: getattr(args, key) for key in keys},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "orders": orders(args),
    }
    if not args.orders:
        report |= {"errors": {}, "draws": {}}
        for name, problem in problems(args):
            if args.problem not in name:
                continue
            print(name, flush=True)
            report["errors"][name] = errors(problem, args)
            if problem.mixture is not None:
                report["draws"][name] = draws(problem, args)
    text = text_of(report)
    if not args.orders:
        args.output_dir.mkdir(exist_ok=True)
        (args.output_dir / "solvers.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.output_dir / "solvers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

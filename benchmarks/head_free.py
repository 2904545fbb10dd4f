"""
How close solvers without a head come to the converged solution, on exact denoisers and on the packaged checkpoint.

    python benchmarks/head_free.py

draws with `GenieScheduler`, with its rule for long steps and without it (polynomials through the last predictions),
and with the multistep solvers of diffusers. Every solver's grid is chosen for each number of calls on other noises
than its error is stated on. Five problems are Gaussian mixtures, whose denoiser is known in closed form, in the
plane, around the digits of scikit-learn and around random points; three of them are solved as flows too. Errors on
one grid at every number of calls from 5 to 30 show whether they jump. Writes `benchmarks/results/head_free.json` and
`head_free.md`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from sklearn.datasets import load_digits

from genie_diffusers import GenieScheduler
from genie_diffusers.schedulers.interpolation import exponential_moments, interpolation_weights

ROOT = Path(__file__).parent
sys.path.append(str(ROOT))
import solver_error  # noqa: E402

CALLS, FLOW_CALLS, CURVE_CALLS = (5, 8, 10, 15, 20), (5, 8, 10, 20, 40, 80), range(5, 31)
SHIFTS = (1.0, 3.0)
GRIDS = [
    {"time_grid": name, "denoising_step": end}
    for name in ("uniform_lambda", "power_lambda", "quadratic", "karras", "linear")
    for end in (False, True)
]
#: each solver on the packaged model costs as much as on a hundred mixtures
GRIDS_OF_MODEL = [grid for grid in GRIDS if grid["time_grid"] in ("uniform_lambda", "quadratic")]

PEERS: dict[str, Callable] = {
    "DDIM": lambda: DPMSolverMultistepScheduler(solver_order=1),
    "DPM-Solver++(2M)": lambda: DPMSolverMultistepScheduler(solver_order=2),
    "DPM-Solver++(3M)": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "DEIS-2": lambda: DEISMultistepScheduler(solver_order=2),
    "DEIS-3": lambda: DEISMultistepScheduler(solver_order=3),
    "UniPC-2": lambda: UniPCMultistepScheduler(solver_order=2),
    "UniPC-3": lambda: UniPCMultistepScheduler(solver_order=3),
    "UniPC-2, bh1": lambda: UniPCMultistepScheduler(solver_order=2, solver_type="bh1"),
    "UniPC-3, bh1": lambda: UniPCMultistepScheduler(solver_order=3, solver_type="bh1"),
}
#: Their last step has no limit at clean data: they end at the smallest noise level, and are compared there.
END_NOISY = ("DEIS-2", "DEIS-3", "UniPC-2, bh1", "UniPC-3, bh1")


class Polynomials(GenieScheduler):
    """The rule switched off: the polynomial through the same predictions, in steps of any length."""

    def row(self, index: int, known: int):
        if self.noise_stds[index + 1] == 0:
            return super().row(index, known)
        row = {("sample", 0): float(self.noise_stds[index + 1] / self.noise_stds[index])}
        points = range(index, index - min(known, self._order), -1)
        return row | {("prediction", index - point): weight for point, weight in self._weights(index, points)}

    def correction(self, index: int, known: int):
        if known == 1:
            return {}
        points = (index, index - 1, index - 2)[: min(known, 3)]
        correction = {("prediction", index - point): weight for point, weight in self._weights(index - 1, points)}
        for (what, lag), weight in self.table[index - 1].items():
            if what != "sample":
                correction[what, lag + 1] = correction.get((what, lag + 1), 0.0) - weight
        return correction

    def _weights(self, start: int, points):
        nodes = [self.lambdas[point] - self.lambdas[start] for point in points]
        step = self.lambdas[start + 1] - self.lambdas[start]
        weights = interpolation_weights(nodes, [0] * len(nodes), exponential_moments(step, len(nodes), rate=1.0))
        weights *= self.noise_stds[start + 1] * np.exp(self.lambdas[start])
        return [(point, float(weight)) for point, weight in zip(points, weights, strict=True)]


OWN: dict[str, Callable] = {
    "GENIE, head-free": GenieScheduler,
    "GENIE, head-free, order 3": lambda **config: GenieScheduler(interpolation_order=3, **config),
    "polynomials of order 2": lambda **config: Polynomials(interpolation_order=2, **config),
    "polynomials of order 3": lambda **config: Polynomials(interpolation_order=3, **config),
    "polynomials of order 4": lambda **config: Polynomials(interpolation_order=4, **config),
}


class Mixture:
    """Data Σ_k p_k N(μ_k, s²), p_k even if not given."""

    def __init__(self, means: torch.Tensor, std: float, probabilities: list[float] | None = None):
        self.means, self.std = means.double(), std
        shares = probabilities or [1 / len(means)] * len(means)
        self.logits = torch.tensor(shares, dtype=torch.float64).log()

    def __call__(self, sample: torch.Tensor, alpha: float, sigma: float, timestep) -> torch.Tensor:
        variance = (alpha * self.std) ** 2 + sigma**2
        distances = alpha**2 * (self.means**2).sum(1) - 2 * alpha * sample @ self.means.T
        posterior = (self.logits - distances / (2 * variance)).softmax(1)
        return sigma * (sample - alpha * (posterior @ self.means)) / variance


@dataclass
class Noises:
    """Where runs start, the ε that the model predicts for them, and where the ODE ends: at noise and at clean data."""

    noise: torch.Tensor
    predict: Callable
    ends: tuple[torch.Tensor, torch.Tensor] | None = None

    def error(self, sample: torch.Tensor, ends_clean: bool = True) -> float:
        end = self.ends[int(ends_clean)].flatten(1)
        return float(((sample.flatten(1) - end).norm(dim=1) / end.norm(dim=1)).mean())


def mixtures() -> Iterator[tuple[str, Mixture, int, int]]:
    """Name, denoiser, dimension and how many noises."""
    plane = torch.tensor([[1.2, 0.3], [-0.7, 1.0], [-0.4, -1.1]])
    yield "plane, std 0.4", Mixture(plane, 0.4, [0.5, 0.3, 0.2]), 2, 256
    digits = torch.from_numpy(load_digits().data / 8 - 1)
    for std in (0.5, 0.25, 0.1):
        yield f"digits, std {std}", Mixture(digits, std), 64, 48
    means = torch.randn(20, 32, generator=torch.Generator().manual_seed(3))
    yield "20 points in 32 dimensions, std 0.2", Mixture(means, 0.2), 32, 128


def draw(scheduler, levels: GenieScheduler, noises: Noises) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample before the last step and after it; the model is told the noise levels of `levels`."""
    sample = noises.noise
    for index, timestep in enumerate(scheduler.timesteps):
        before, (alpha, sigma) = sample, levels._levels(index)
        prediction = noises.predict(before, alpha, sigma, timestep)
        if scheduler.config.prediction_type == "flow_prediction":
            prediction = prediction - (before - sigma * prediction) / alpha
        sample = scheduler.step(prediction, timestep, before, return_dict=False)[0].double()
    return before, sample


def with_ends(noises: Noises, calls: int, **config) -> Noises:
    scheduler = GenieScheduler(**config)
    scheduler.set_timesteps(calls)
    noises.ends = draw(scheduler, scheduler, noises)
    return noises


def error_of(name: str, grid: dict, calls: int, noises: Noises) -> float | None:
    """The error of a solver on a grid, or `None` where it has no such run."""
    if name in OWN:
        scheduler = OWN[name](**grid)
        scheduler.set_timesteps(calls)
        return noises.error(draw(scheduler, scheduler, noises)[1])
    ends_noisy = name in END_NOISY
    if ends_noisy and grid["denoising_step"]:  # the end would be where the last call is
        return None
    # with a noisy end `time_grid` has its last but one point where it has its last call otherwise
    levels = GenieScheduler(**grid, final_sigmas_type="sigma_min" if ends_noisy else "zero")
    levels.set_timesteps(calls)
    scheduler = PEERS[name]()
    scheduler.set_timesteps(calls)
    scheduler.timesteps, scheduler.sigmas = levels.timesteps, levels.sigmas.float()
    scheduler.set_begin_index(0)
    return noises.error(draw(scheduler, levels, noises)[1], ends_clean=not ends_noisy)


def best_grids(names, grids: list[dict], choice: Noises, report: Noises) -> dict:
    """By solver and model calls: the error and the grid, which is chosen on other noises."""
    results: dict[str, dict] = {}
    for name in names:
        results[name] = {}
        for calls in CALLS:
            chosen = [(error_of(name, grid, calls, choice), index) for index, grid in enumerate(grids)]
            _, index = min((error, index) for error, index in chosen if error is not None and np.isfinite(error))
            grid = grids[index]
            label = grid["time_grid"] + "-+"[grid["denoising_step"]]
            results[name][str(calls)] = {"error": error_of(name, grid, calls, report), "grid": label}
        print(f"  {name}: " + " ".join(f"{cell['error']:.4f}" for cell in results[name].values()), flush=True)
    return results


def on_mixtures(results: dict, seed: int):
    reference = {"time_grid": "uniform_lambda", "denoising_step": True}
    for name, mixture, dimension, count in mixtures():
        print(name, flush=True)
        sets = []
        for offset, share in ((0, 2), (1, 1)):
            generator = torch.Generator().manual_seed(seed + offset)
            noise = torch.randn(count // share, dimension, generator=generator, dtype=torch.float64)
            sets.append(with_ends(Noises(noise, mixture), 600, **reference))
        results["best grid"][name] = best_grids((*PEERS, *OWN), GRIDS, *sets)
        results["every number of calls"][name] = {
            solver: [error_of(solver, GRIDS[0], calls, sets[1]) for calls in CURVE_CALLS]
            for solver in ("GENIE, head-free", "polynomials of order 3", "UniPC-2")
        }


def on_flows(results: dict, seed: int):
    flow = {"prediction_type": "flow_prediction"}
    for index, (name, mixture, dimension, count) in enumerate(mixtures()):
        if index % 2:
            continue
        generator = torch.Generator().manual_seed(seed + 1)
        noise = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
        noises = with_ends(Noises(noise, mixture), 800, **flow, time_grid="uniform_lambda", denoising_step=True)
        for shift in SHIFTS:
            rows: dict[str, list[float]] = {}
            for calls in FLOW_CALLS:
                for order in (2, 3):
                    peer = UniPCMultistepScheduler(**flow, solver_order=order, use_flow_sigmas=True, flow_shift=shift)
                    peer.set_timesteps(calls)
                    levels = GenieScheduler(**flow)
                    levels.alphas, levels.noise_stds = (1 - peer.sigmas).numpy(), peer.sigmas.numpy()
                    rows.setdefault(f"UniPC-{order}", []).append(noises.error(draw(peer, levels, noises)[1]))
                for solver, make in OWN.items():
                    scheduler = make(**flow, flow_shift=shift)
                    scheduler.set_timesteps(calls)
                    rows.setdefault(solver, []).append(noises.error(draw(scheduler, scheduler, noises)[1]))
            results["flows"][f"{name}, shift {shift:g}"] = rows


def on_packaged_model(results: dict, args: argparse.Namespace):
    unets, _, _ = solver_error.packaged()
    unet, sets = unets[None], []
    for count, seed in ((args.choice_noises, args.seed), (args.noises, args.seed + 1)):
        drawn = solver_error.noises_of(unet, count, seed, None)

        def predict(sample, alpha, sigma, timestep, drawn=drawn):
            with torch.inference_mode():
                return solver_error.predict(unet, sample.float(), timestep, drawn).double()

        noises = Noises(drawn.noise.double(), predict)
        sets.append(with_ends(noises, 250, time_grid="uniform_lambda", denoising_step=True))
    names = [name for name in (*PEERS, *OWN) if "bh1" not in name and name != "polynomials of order 4"]
    print("packaged model", flush=True)
    results["best grid"]["packaged ddpm-cifar10-16"] = best_grids(names, GRIDS_OF_MODEL, *sets)


def ratios(rows: dict, solver: str) -> list[float]:
    """The error of a solver in units of the best peer's, by number of calls."""
    peers = [row for name, row in rows.items() if name in PEERS]
    return [rows[solver][str(n)]["error"] / min(row[str(n)]["error"] for row in peers) for n in CALLS]


def tables_of(results: dict) -> str:
    lines = []
    for problem, rows in results["best grid"].items():
        lines += [f"\n### {problem}\n", "| Model calls | " + " | ".join(map(str, CALLS)) + " |", "|---" * 6 + "|"]
        for name, row in rows.items():
            cells = [f"{cell['error']:.4f}" for cell in row.values()]
            if name in OWN:
                cells = [f"{cell} ({ratio:.2f})" for cell, ratio in zip(cells, ratios(rows, name), strict=True)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["\n### Geometric mean of the ratios to the best peer, and the largest one\n"]
    lines += ["| Model calls | " + " | ".join(map(str, CALLS)) + " |", "|---" * 6 + "|"]
    for solver in OWN:
        found = np.array([ratios(rows, solver) for rows in results["best grid"].values() if solver in rows])
        pairs = zip(np.exp(np.log(found).mean(0)), found.max(0), strict=True)
        lines.append(f"| {solver} | " + " | ".join(f"{mean:.2f} ({worst:.2f})" for mean, worst in pairs) + " |")
    lines += ["\n## Flows, timesteps even in σ before they are shifted\n"]
    for problem, rows in results["flows"].items():
        lines += [f"\n### {problem}\n", "| Model calls | " + " | ".join(map(str, FLOW_CALLS)) + " |", "|---" * 7 + "|"]
        lines += [f"| {name} | " + " | ".join(f"{error:.5f}" for error in row) + " |" for name, row in rows.items()]
    lines += ["\n## Largest ratio of the error with n + 1 calls to that with n, n = 6 … 29, on `uniform_lambda`\n"]
    first = next(iter(results["every number of calls"].values()))
    lines += ["| | " + " | ".join(first) + " |", "|---" * (len(first) + 1) + "|"]
    for problem, rows in results["every number of calls"].items():
        jumps = [max(np.divide(row[2:], row[1:-1])) for row in rows.values()]
        lines.append(f"| {problem} | " + " | ".join(f"{jump:.2f}" for jump in jumps) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=48, help="Noises of the packaged model.")
    parser.add_argument("--choice_noises", type=int, default=8, help="Other noises, on which its grids are chosen.")
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--mixtures_only", action="store_true", help="Leave out the packaged model.")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()  # they warn of grids that are ours
    results: dict[str, dict] = {"best grid": {}, "every number of calls": {}, "flows": {}}
    on_mixtures(results, args.seed)
    on_flows(results, args.seed)
    if not args.mixtures_only:
        on_packaged_model(results, args)
    command = "python benchmarks/head_free.py"
    report = {
        "command": command,
        "what": "mean relative error to the converged solution, by problem, solver and model calls",
        "settings": {"noises": args.noises, "choice_noises": args.choice_noises, "seed": args.seed},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        **results,
    }
    args.output_dir.mkdir(exist_ok=True)
    (args.output_dir / "head_free.json").write_text(json.dumps(report, indent=2) + "\n")
    text = (
        f"Written by `{command}`: mean relative error to the converged solution, in brackets the ratio to the best "
        "peer's. Every solver is on its best grid, which is chosen on other noises.\n\n## Best grids\n"
    )
    (args.output_dir / "head_free.md").write_text(text + tables_of(results) + "\n")
    print(tables_of(results))


if __name__ == "__main__":
    main()

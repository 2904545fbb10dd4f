"""
What one call of a neural operator is worth: in calls of its teacher, in error and in quality, and what it costs.

    python benchmarks/dsno.py --plain runs/plain-cifar10-16

compares the packaged operator with its teacher by the best solver of this package, and with a plain regression of the
picture on the noise (the folder after `--plain`; training/README.md has its command). Writes
`benchmarks/results/dsno.json`, `dsno.md`, `dsno.png` and `dsno_trajectories.png`; docs/dsno.md says what is measured.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.figure import Figure

from genie_diffusers import DSNOPipeline, DSNOUNet2DModel, GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.operators import HELD_OUT
from genie_diffusers.learning.paths import Noises, in_batches, relative_error
from genie_diffusers.learning.solutions import Teacher, add_teacher_arguments
from genie_diffusers.metrics import QualityDistance
from quality import choose_pictures, number, to_json, write_json

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PACKAGED_OPERATOR = Path(PACKAGED_MODEL).parent / "dsno-cifar10-16"
#: the paper's solver: DDIM, even in √t
PAPER = ("GDDIMScheduler", 512, {"time_grid": "quadratic", "denoising_step": True, "multistep_order": 1})
CONVERGED = 200
CPU = torch.device("cpu")


def teacher_of(model: str, scheduler: str, steps: int, options: dict, points: int, label_dropout: float) -> Teacher:
    named = {"pretrained_model_name_or_path": model, "scheduler": scheduler, "num_inference_steps": steps}
    named |= {"scheduler_options": json.dumps(options), "num_time_points": points, "label_dropout": label_dropout}
    parser = argparse.ArgumentParser()
    add_teacher_arguments(parser)
    args = parser.parse_args([str(part) for name, value in named.items() for part in (f"--{name}", value)])
    return Teacher(args, CPU)


def operator_states(unet: DSNOUNet2DModel, noises: Noises) -> torch.Tensor:
    return in_batches(lambda batch: unet(batch.noise, batch.labels).trajectory, noises, 64, CPU)


def errors(states: torch.Tensor, reference: torch.Tensor) -> list[dict[str, float]]:
    """Mean relative error at each time point, and its standard error; of the last points if there are fewer."""
    found = []
    for state, wanted in zip(states.unbind(1), reference[:, -states.shape[1] :].unbind(1), strict=True):
        each = relative_error(state, wanted)
        found.append({"error": float(each.mean()), "standard_error": float(each.std() / len(each) ** 0.5)})
    return found


def cpu_seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median processor time of each function, measured in turn."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds = time.process_time() - start
            if repeat:  # the first is a warm-up
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure_cost(unet: DSNOUNet2DModel, teacher: GenieUNet2DModel, batch_size: int, repeats: int) -> dict[str, Any]:
    """Seconds for one image, of one call of the operator and of its teacher."""
    noise = torch.randn(batch_size, *(unet.config.in_channels, unet.config.sample_size, unet.config.sample_size))
    labels = None if unet.config.num_class_embeds is None else torch.zeros(batch_size, dtype=torch.long)
    with torch.no_grad():
        seconds = cpu_seconds(
            {
                "operator": lambda: unet(noise, labels),
                "teacher": lambda: teacher(noise, torch.tensor(500), class_labels=labels),
            },
            repeats,
        )
    ratio = seconds["operator"] / seconds["teacher"]
    return {name: value / batch_size for name, value in seconds.items()} | {"ratio": ratio, "batch_size": batch_size}


def equivalent_calls(value: float, by_calls: dict[int, float]) -> float:
    """The solver's calls with this error or distance, by interpolation of both logarithms; nan beyond."""
    calls = sorted(by_calls)
    for few, more in pairwise(calls):
        high, low = by_calls[few], by_calls[more]
        if high >= value >= low:
            share = (torch.tensor(high).log() - torch.tensor(value).log()) / (torch.tensor(high / low).log())
            return float(few * (more / few) ** share)
    return float("nan")


def write_tables(results: dict[str, Any], path: Path):
    points = results["solution_timesteps"]
    lines = [f"Written by `{results['command']}`.", "", "## Solvers for the training data", ""]
    lines += [f"Mean relative error over {results['settings']['teacher_noises']} noises to {CONVERGED} calls.", ""]
    lines += [
        "| Solver | Calls | " + " | ".join(f"t = {t:g}" for t in points) + " |",
        "|---" * (len(points) + 2) + "|",
    ]
    for row in results["teachers"]:
        lines += [
            f"| {row['solver']} | {row['calls']} | " + " | ".join(f"{e['error']:.4f}" for e in row["errors"]) + " |"
        ]
    lines += ["", "## One call", ""]
    lines += [f"Mean relative error to {CONVERGED} calls over {results['settings']['noises']} held-out noises.", ""]
    lines += ["| | " + " | ".join(f"t = {t:g}" for t in points) + " |", "|---" * (len(points) + 1) + "|"]
    for name, entries in results["errors"].items():
        cells = [""] * (len(points) - len(entries)) + [
            f"{e['error']:.4f} ± {e['standard_error']:.4f}" for e in entries
        ]
        lines += [f"| {name} | " + " | ".join(cells) + " |"]
    lines += ["", "## Quality", ""]
    lines += [f"{results['settings']['num_samples']:,} pictures, standard errors by jackknife.", ""]
    lines += ["| | Calls | Fréchet distance | Kernel distance, × 1000 |", "|---|---|---|---|"]
    for row in results["quality"]:
        frechet, kernel = (row[name] for name in ("frechet_distance", "kernel_distance"))
        lines += [
            f"| {row['label']} | {row['calls']} | {frechet['value']:.3f} ± {frechet['standard_error']:.3f} | "
            f"{1e3 * kernel['value']:.2f} ± {1e3 * kernel['standard_error']:.2f} |"
        ]
    cost, worth = results["cost"], results["worth"]
    lines += ["", "## Cost and worth", "", "| | |", "|---|---|"]
    lines += [
        f"| One call of the operator / one of the teacher, batches of {cost['batch_size']} | {cost['ratio']:.2f} |"
    ]
    lines += [f"| Processor time for an image, operator | {1e3 * cost['operator']:.2f} ms |"]
    lines += [f"| Processor time for an image, one call of the teacher | {1e3 * cost['teacher']:.2f} ms |"]
    for name, calls in worth.items():
        entries = "more than any measured" if calls != calls else f"{calls:.1f}"
        lines += [f"| Calls of the solver with its {name} | {entries} |"]
    path.write_text("\n".join(lines) + "\n")


def plot(results: dict[str, Any], path: Path):
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    solver = {int(name.split()[-2]): e[-1]["error"] for name, e in results["errors"].items() if name.endswith("calls")}
    left.loglog(list(solver), list(solver.values()), marker="o", label="teacher, best solver")
    quality = {row["calls"]: row["frechet_distance"] for row in results["quality"] if row["label"] == "teacher"}
    values = [entry["value"] for entry in quality.values()]
    right.errorbar(
        list(quality), values, [entry["standard_error"] for entry in quality.values()], marker="o", capsize=2
    )
    right.set(xscale="log", yscale="log")
    styles = {"operator": ("tab:red", "--"), "plain regression": ("tab:green", ":")}
    for name, (color, line) in styles.items():
        if name not in results["errors"]:
            continue
        left.axhline(results["errors"][name][-1]["error"], color=color, linestyle=line, label=f"{name}, one call")
        row = next(row for row in results["quality"] if row["label"] == name)
        right.axhline(row["frechet_distance"]["value"], color=color, linestyle=line)
    left.set(xlabel="model calls", ylabel="relative error of the picture")
    right.set(xlabel="model calls", ylabel="Fréchet distance")
    for axes in (left, right):
        axes.set_xticks(list(solver if axes is left else quality))
        axes.set_xticklabels([str(calls) for calls in (solver if axes is left else quality)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)


def draw_trajectories(
    reference: torch.Tensor, states: torch.Tensor, points: list[float], path: Path, columns: int = 10
):
    """The teacher's states and the operator's from the same noises, a pair of rows for each time point."""
    figure = Figure(figsize=(0.7 * columns + 1.4, 1.4 * len(points)), layout="constrained")
    axes = iter(figure.subplots(2 * len(points), 1, subplot_kw={"xticks": [], "yticks": []}))
    for m, t in enumerate(points):
        for name, of in (("teacher", reference), ("operator", states)):
            row = next(axes)
            row.set_ylabel(f"t = {t:g}\n{name}", rotation=0, ha="right", va="center", fontsize=8)
            pixels = (torch.cat(of[:columns, m].unbind(), dim=-1).clamp(-1, 1) + 1) / 2
            row.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED_MODEL, help="The teacher: folder or Hub id of a pipeline.")
    parser.add_argument("--operator", default=str(PACKAGED_OPERATOR), help="Folder or Hub id of a `DSNOPipeline`.")
    parser.add_argument("--plain", help="That of a plain regression, trained with one time point and no modes.")
    parser.add_argument("--noises", type=int, default=128, help="Held-out noises that errors are stated on.")
    parser.add_argument("--teacher_noises", type=int, default=64, help="Noises that solvers are compared on.")
    parser.add_argument("--teacher_calls", type=int, nargs="+", default=[15, 20, 25, 30], help="Of our solver there.")
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 3, 4, 5, 8, 20], help="Of the solver.")
    parser.add_argument("--quality_calls", type=int, nargs="+", default=[1, 2, 4, 8, 20])
    parser.add_argument("--num_samples", type=int, default=1000, help="Pictures of each quality.")
    parser.add_argument("--repeats", type=int, default=11, help="Timings of each call.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()  # of schedulers, about keys that are ours
    unet = DSNOPipeline.from_pretrained(args.operator).unet.float().eval()
    plain = None if args.plain is None else DSNOPipeline.from_pretrained(args.plain).unet.float().eval()
    points = unet.config.solution_timesteps
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/dsno.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "settings": {name: getattr(args, name) for name in ("noises", "teacher_noises", "num_samples")},
        "solution_timesteps": points,
        "parameters": {"operator": unet.num_parameters()},
    }
    results["parameters"]["temporal layers"] = sum(p.numel() for p in unet.temporal_layers.parameters())
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def solver(steps: int, scheduler: str = "GenieScheduler", options: dict | None = None, states: int = 0) -> Teacher:
        dropout = 0.1 if unet.config.num_class_embeds is not None else 0.0
        return teacher_of(args.model, scheduler, steps, options or {}, states or len(points), dropout)

    def solve(teacher: Teacher, noises: Noises) -> torch.Tensor:
        return in_batches(teacher.solve, noises, 64, CPU)

    converged = solver(CONVERGED)
    noises = converged.draw([HELD_OUT + 10**6 + i for i in range(args.noises)], 0)
    reference = solve(converged, noises)

    few, few_reference = noises[: args.teacher_noises], reference[: args.teacher_noises]
    results["teachers"] = []
    for scheduler, steps, options in (PAPER, *(("GenieScheduler", calls, {}) for calls in args.teacher_calls)):
        found = errors(solve(solver(steps, scheduler, options), few), few_reference)
        results["teachers"].append({"solver": scheduler, "calls": steps, "errors": found})
        print(scheduler, steps, *(f"{entry['error']:.4f}" for entry in found), flush=True)

    states = operator_states(unet, noises)
    results["errors"] = {"operator": errors(states, reference)}
    if plain is not None:
        results["errors"]["plain regression"] = errors(operator_states(plain, noises), reference)
    for calls in args.calls:
        # few calls are not around all time points; the picture is what is compared
        found = errors(solve(solver(calls, states=1), noises), reference)
        results["errors"][f"teacher, {calls} calls"] = found
    for name, entries in results["errors"].items():
        print(name, *(f"{entry['error']:.4f}" for entry in entries), flush=True)

    distance = QualityDistance.from_pretrained()
    pictures = choose_pictures(converged.unet, args.num_samples, seed=100_000)
    drawn = {("operator", 1): lambda: operator_states(unet, pictures)[:, -1]}
    if plain is not None:
        drawn["plain regression", 1] = lambda: operator_states(plain, pictures)[:, -1]
    for calls in args.quality_calls:
        drawn["teacher", calls] = lambda calls=calls: solve(solver(calls, states=1), pictures)[:, -1]
    results["quality"] = []
    for (label, calls), images in drawn.items():
        estimates = distance(images())
        print(f"{label}, {calls} calls:", *(f"{name} {number(x)}" for name, x in estimates.items()), flush=True)
        results["quality"].append({"label": label, "calls": calls} | {n: to_json(e) for n, e in estimates.items()})

    results["cost"] = measure_cost(unet, converged.unet, 64, args.repeats)
    by_error = {calls: results["errors"][f"teacher, {calls} calls"][-1]["error"] for calls in args.calls}
    by_distance = {
        row["calls"]: row["frechet_distance"]["value"] for row in results["quality"] if row["label"] == "teacher"
    }
    results["worth"] = {
        "error": equivalent_calls(results["errors"]["operator"][-1]["error"], by_error),
        "Fréchet distance": equivalent_calls(results["quality"][0]["frechet_distance"]["value"], by_distance),
    }
    write_json(results, args.output_dir / "dsno.json")
    write_tables(results, args.output_dir / "dsno.md")
    plot(results, args.output_dir / "dsno.png")
    draw_trajectories(reference, states, points, args.output_dir / "dsno_trajectories.png")


if __name__ == "__main__":
    main()

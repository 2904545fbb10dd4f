"""
How far the pictures of each sampler are from real ones, at equal numbers of model calls and of pictures.

    python benchmarks/quality.py

samples the packaged checkpoint, class-conditional and unguided, from the same noises and classes with every sampler of
solver_error.py, on the grid that was its best there, and writes `benchmarks/results/quality.json`, `quality.md` and
`quality.png`. The first is written after every cell; `--resume` then goes on, and measures again what was drawn with
weights that have changed since.
docs/benchmarks.md says what is measured.
"""

import argparse
import json
import re
import shlex
import sys
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from genie_diffusers import GenieScheduler, GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.metrics import PACKAGED_CLASSIFIER, Estimate, QualityDistance, frechet_estimate
from genie_diffusers.models.derivative_head import fingerprint
from solver_error import GGDM, OWN, PEERS, STOCHASTIC, Noises, in_batches, run, scheduler_of, sources_of

RESULTS = Path(__file__).parent / "results"
DISTANCES = {"frechet_distance": "Fréchet distance", "kernel_distance": "Kernel distance"}
SAMPLERS = ["DDIM", "DEIS-3", "DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC-2", "UniPC-3"]
SAMPLERS += ["GENIE, head-free", "GENIE, tables alone", "GENIE, step head", "GGDM"]
SAMPLERS += ["Quasi-Taylor ODE 1", "Quasi-Taylor ODE 2", "DDPM", "Quasi-Taylor SDE 2"]
#: where all deterministic samplers converge to
CONVERGED = ("GENIE, head-free", "uniform_lambda+", 100)

Cells = dict[str, dict[str, Any]]


def choose_pictures(unet: GenieUNet2DModel, num_samples: int, seed: int) -> Noises:
    """`num_samples` noises with uniformly drawn classes, the null class left out."""
    generator = torch.Generator().manual_seed(seed)
    size, classes = unet.config.sample_size, unet.config.num_class_embeds
    noise = torch.randn((num_samples, unet.config.in_channels, size, size), generator=generator)
    labels = None if classes is None else torch.randint(classes - 1, (num_samples,), generator=generator)
    return Noises(noise, labels, None)


def sample(unet: GenieUNet2DModel, config, name: str, grid: str, calls: int, noises: Noises, batch_size: int):
    """Pictures in [−1, 1] but for overshoots, and how often the model was called for them."""
    sources, counted = sources_of(unet), []
    options = {"generator": torch.Generator(unet.device).manual_seed(0)} if name in STOCHASTIC else {}

    def one_batch(batch: Noises) -> torch.Tensor:
        return run(unet, scheduler_of(name, config, grid, calls, sources), batch, **options)

    hook = unet.register_forward_pre_hook(lambda module, args: counted.append(None))
    try:
        pictures = in_batches(one_batch, noises, batch_size, unet.device)
    finally:
        hook.remove()
    return pictures, len(counted) // -(-len(noises) // batch_size)


def to_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "replicates": [float(f"{replicate:.7g}") for replicate in estimate.replicates],
    }


def from_json(entry: Mapping[str, Any]) -> Estimate:
    return Estimate(entry["value"], np.array(entry["replicates"]))


def weights_used(unet: GenieUNet2DModel, name: str) -> list[float]:
    """Tells the weights apart that a cell was measured with."""
    if name == "GGDM":
        return [*fingerprint(unet), float(zlib.crc32((GGDM / "scheduler_config.json").read_bytes()))]
    return fingerprint(unet) + (fingerprint(unet.derivative_head) if OWN.get(name, {}).get("source") else [])


def comparisons(cells: Cells, steps: list[int]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Estimate]]]:
    """Own cells, the peer closest to real pictures at the next larger number of calls, and the differences."""
    pairs = []
    for calls, more_calls in pairwise(steps):
        peers = [cell for cell in cells.values() if cell["calls"] == more_calls and not cell["own"]]
        for cell in cells.values():
            if cell["calls"] == calls and cell["own"] and peers:
                best = min(peers, key=lambda other: other["frechet_distance"]["value"])
                pairs.append((cell, best, {name: from_json(cell[name]) - from_json(best[name]) for name in DISTANCES}))
    return pairs


def number(estimate: Estimate, scale: float = 1.0) -> str:
    return f"{scale * estimate.value:.3f} ± {scale * estimate.standard_error:.3f}"


def write_json(results: dict[str, Any], path: Path):
    text = json.dumps(results, indent=2)
    path.write_text(re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n")


def write_tables(results: dict[str, Any], steps: list[int], path: Path):
    """Both distances by sampler and calls, and own samplers against the best peer with more calls."""
    cells, settings = results["cells"], results["settings"]
    labels = list(dict.fromkeys(cell["label"] for cell in cells.values()))
    calls = sorted({cell["calls"] for cell in cells.values()})
    lines = [f"Written by `{results['command']}`: {settings['num_samples']:,} pictures, standard errors by jackknife."]
    for name, title in DISTANCES.items():
        scale, unit = (1e3, ", × 1000") if name == "kernel_distance" else (1.0, "")
        lines += ["", f"## {title}{unit}", "", "| Model calls | " + " | ".join(map(str, calls)) + " |"]
        lines += ["|---" * (len(calls) + 1) + "|"]
        for label in labels:
            row = {cell["calls"]: from_json(cell[name]) for cell in cells.values() if cell["label"] == label}
            entries = [number(row[n], scale) if n in row else "" for n in calls]
            lines += [f"| {label} | " + " | ".join(entries) + " |"]
        lines += ["", f"Converged solution: {number(from_json(results['converged'][name]), scale)}."]
        if name in results["real"]:
            lines += [f"As many real pictures: {number(from_json(results['real'][name]), scale)}."]
    lines += ["", "## Against the best peer with more calls", "", "Negative: closer to real pictures.", ""]
    lines += [
        "| Sampler, calls | Peer, calls | "
        + "Fréchet distance, difference | Kernel distance × 1000, difference"
        + " |"
    ]
    lines += ["|---" * (2 + len(DISTANCES)) + "|"]
    for *pair, differences in comparisons(cells, steps):
        entries = [f"{cell['label']}, {cell['calls']}" for cell in pair]
        entries += [number(x, scale) for x, scale in zip(differences.values(), (1.0, 1e3), strict=True)]
        lines += ["| " + " | ".join(entries) + " |"]
    path.write_text("\n".join(lines) + "\n")


def plot(results: dict[str, Any], path: Path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = list(dict.fromkeys(cell["label"] for cell in results["cells"].values()))
    for axes, (name, title) in zip(panels, DISTANCES.items(), strict=True):
        for i, label in enumerate(labels):
            row = [cell for cell in results["cells"].values() if cell["label"] == label]
            style = {"marker": "s" if row[0]["own"] else ".", "linestyle": "-" if row[0]["own"] else "--"}
            points = sorted((cell["calls"], cell[name]["value"], cell[name]["standard_error"]) for cell in row)
            calls, values, errors = zip(*points, strict=True)
            axes.errorbar(
                calls,
                values,
                errors,
                capsize=2,
                linewidth=1,
                markersize=5,
                color=colormaps["tab20"](i % 20),
                label=label,
                **style,
            )
        axes.axhline(results["converged"][name]["value"], color="gray", linestyle="--", label="converged solution")
        if name in results["real"]:
            axes.axhline(results["real"][name]["value"], color="gray", linestyle=":", label="real pictures")
        ticks = sorted({cell["calls"] for cell in results["cells"].values()})
        axes.set(xscale="log", yscale="log", xlabel="model calls", ylabel=title)
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--classifier", default=PACKAGED_CLASSIFIER, help="Folder with a classifier and its reference."
    )
    parser.add_argument("--model", default=PACKAGED_MODEL, help="Folder or Hub id of a pipeline.")
    parser.add_argument("--samplers", nargs="+", choices=[*PEERS, *OWN], default=SAMPLERS, metavar="NAME")
    parser.add_argument("--grids", type=Path, default=RESULTS / "solver_error.json", help="Where best grids are read.")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20], help="Numbers of model calls.")
    parser.add_argument("--num_samples", type=int, help="Default: 2,000 on a CPU, 10,000 on an accelerator.")
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=100_000, help="Of the first picture; the next one has the next.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="Keep the cells that are there and still hold.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    num_samples = args.num_samples or (2_000 if args.device == "cpu" else 10_000)
    chosen = json.loads(args.grids.read_text())["errors"]
    unet = GenieUNet2DModel.from_pretrained(args.model, subfolder="unet").float().eval().to(args.device)
    config = GenieScheduler.load_config(args.model, subfolder="scheduler")
    distance = QualityDistance.from_pretrained(args.classifier, args.device)
    noises = choose_pictures(unet, num_samples, args.seed)
    settings = {
        "model": Path(args.model).name,
        "classifier": Path(args.classifier).name,
        "num_samples": num_samples,
        "seed": args.seed,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "quality.json"
    earlier = json.loads(path.read_text()) if args.resume and path.exists() else {"settings": settings, "cells": {}}
    if earlier["settings"] != settings:
        raise ValueError(f"`--resume` needs the settings of {path.name}, {earlier['settings']}, got {settings}.")

    real = distance.reference.features[:num_samples]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/quality.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": args.device},
        "settings": settings,
        "real": {},
        "converged": earlier.get("converged", {}),
        "cells": {},
    }
    if len(real) == num_samples:  # no kernel distance: these pictures are its own reference
        floor = frechet_estimate(real, distance.reference.mean, distance.reference.covariance)
        results["real"] = {"frechet_distance": to_json(floor)}

    def measure(name: str, grid: str, calls: int, known: dict[str, Any] | None) -> dict[str, Any]:
        weights = weights_used(unet, name)
        if known and known["weights"] == weights and known["grid"] == grid:
            return known
        images, counted = sample(unet, config, name, grid, calls, noises, args.batch_size)
        estimates = distance(images)
        print(f"{name}, {counted} calls:", *(f"{title} {number(x)}" for title, x in estimates.items()), flush=True)
        cell = {"label": name, "calls": counted, "own": name in OWN, "grid": grid, "weights": weights}
        return cell | {title: to_json(estimate) for title, estimate in estimates.items()}

    keys = {
        f"{name}@{calls}": (name, "default" if name in STOCHASTIC else chosen[name][str(calls)]["grid"], calls)
        for name in args.samplers
        for calls in args.steps
        if name in STOCHASTIC or str(calls) in chosen[name]
    }
    results["cells"] = {key: earlier["cells"][key] for key in keys if key in earlier["cells"]}
    for key, cell in keys.items():
        results["cells"][key] = measure(*cell, results["cells"].get(key))
        write_json(results, path)
    results["converged"] = measure(*CONVERGED, results["converged"])
    write_json(results, path)
    write_tables(results, args.steps, args.output_dir / "quality.md")
    plot(results, args.output_dir / "quality.png")


if __name__ == "__main__":
    main()

"""
What learning a sampler costs in memory, and what learned samplers are worth on seeds and features they never saw.

    python benchmarks/ggdm.py memory
    python benchmarks/ggdm.py quality --learned "GGDM, kernel=runs/ggdm-kernel" "GGDM, trajectory=runs/ggdm-trajectory"

`memory` counts, to the byte, what the chain of steps keeps for its backward pass, with gradient rematerialisation and
without, and writes `benchmarks/results/ggdm_memory.json` and `.png`. `quality` measures the distances of quality.py,
on the same noises and the features of several networks, and writes `benchmarks/results/ggdm_quality.json` and `.md`.
docs/ggdm.md discusses both.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from matplotlib.figure import Figure

from genie_diffusers import GenieScheduler, GenieUNet2DModel, GGDMScheduler, ImageClassifier
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.data import load_pictures
from genie_diffusers.learning.features import features_of_data
from genie_diffusers.learning.paths import in_batches, solver_of
from genie_diffusers.learning.tables import LearnedTable, sample_by
from genie_diffusers.metrics import PACKAGED_CLASSIFIER, QualityDistance, ReferenceFeatures
from quality import DISTANCES, choose_pictures, number, sample, to_json, write_json
from solver_error import run

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
#: what the paper compares with; the rest of quality.py's samplers are compared with besides
BASELINES = ["DDPM", "DDIM", "DEIS-3", "DPM-Solver++(2M)", "DPM-Solver++(3M)", "UniPC-2", "UniPC-3"]
BASELINES += ["GENIE, head-free", "GENIE, tables alone", "GENIE, step head"]


def stored_bytes(unet, learned: LearnedTable, noises, prediction_type: str, rematerialise: bool) -> int:
    """What a run keeps for its backward pass, each piece of memory counted once."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pictures = sample_by(unet, learned, noises, None, prediction_type, rematerialise=rematerialise)
    assert pictures.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    return sum(size for place, (size, _) in kept.items() if place not in parameters)


def measure_memory(args: argparse.Namespace) -> None:
    unet = GenieUNet2DModel.from_pretrained(args.model, subfolder="unet").float().eval().requires_grad_(False)
    scheduler = solver_of(GenieScheduler.load_config(args.model, subfolder="scheduler"), time_grid="uniform_lambda")
    noises = choose_pictures(unet, args.batch_size, seed=0)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/ggdm.py", *sys.argv[1:]]),
        "batch_size": args.batch_size,
        "bytes_of_a_state": noises.noise.nbytes,
        "bytes": {"with rematerialisation": {}, "without": {}},
    }
    for steps in args.steps:
        origin = GGDMScheduler.from_scheduler(scheduler, steps).config.tables[str(steps)]
        for name, by_step in results["bytes"].items():
            learned = LearnedTable(origin, scheduler.process, ["states", "history", "time"])
            by_step[str(steps)] = stored_bytes(
                unet, learned, noises, scheduler.config.prediction_type, name.startswith("with r")
            )
    growth = {
        name: (sizes[str(args.steps[-1])] - sizes[str(args.steps[0])]) / (args.steps[-1] - args.steps[0])
        for name, sizes in results["bytes"].items()
    }
    results["states_per_step"] = {name: grown / noises.noise.nbytes for name, grown in growth.items()}
    write_json(results, args.output_dir / "ggdm_memory.json")
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, sizes in results["bytes"].items():
        axes.plot(args.steps, [size / 2**20 for size in sizes.values()], marker="o", label=name)
    axes.set(xlabel="model calls", ylabel=f"MiB kept for {args.batch_size} pictures", yscale="log")
    axes.legend()
    figure.savefig(args.output_dir / "ggdm_memory.png", dpi=120)
    print(json.dumps(results["states_per_step"]))


def random_features(args: argparse.Namespace, unet) -> QualityDistance:
    """The features of a network that was never trained, and those of the real pictures of the test split."""
    torch.manual_seed(0)
    size = unet.config.sample_size
    network = ImageClassifier(size, block_out_channels=(32, 64, 64), layers_per_block=1).eval().requires_grad_(False)
    pictures = load_pictures(args.dataset_name, size, 3, dataset_split="test", image_column=args.image_column)
    features = features_of_data(network.features, pictures, size, 3, torch.device("cpu"), 500)
    mean, covariance = features.double().mean(dim=0), features.double().T.cov()
    return QualityDistance(network.features, ReferenceFeatures(mean, covariance, features))


def measure_quality(args: argparse.Namespace) -> None:
    unet = GenieUNet2DModel.from_pretrained(args.model, subfolder="unet").float().eval()
    config = GenieScheduler.load_config(args.model, subfolder="scheduler")
    noises = choose_pictures(unet, args.num_samples, args.seed)
    networks = {Path(folder).name: QualityDistance.from_pretrained(folder) for folder in args.networks}
    if args.dataset_name:
        networks["random weights"] = random_features(args, unet)
    chosen = json.loads((RESULTS / "solver_error.json").read_text())["errors"]
    path = args.output_dir / "ggdm_quality.json"
    earlier = json.loads(path.read_text())["cells"] if args.resume and path.exists() else {}
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/ggdm.py", *sys.argv[1:]]),
        "environment": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "settings": {"num_samples": args.num_samples, "seed": args.seed, "networks": list(networks)},
        "cells": earlier,
    }
    learned = dict(pair.split("=", 1) for pair in args.learned)
    for calls in args.steps:
        for name in (*learned, *args.samplers):
            key = f"{name}@{calls}"
            if key in results["cells"]:
                continue
            if name in learned:
                scheduler = GGDMScheduler.from_pretrained(learned[name])
                if str(calls) not in scheduler.config.tables:
                    continue

                def one_batch(batch, scheduler=scheduler, calls=calls):
                    scheduler.set_timesteps(calls)
                    return run(unet, scheduler, batch)

                torch.manual_seed(0)
                pictures = in_batches(one_batch, noises, args.batch_size, torch.device("cpu"))
                grid = "learned"
            else:
                grid = "default" if name == "DDPM" else chosen[name][str(calls)]["grid"]
                pictures, _ = sample(unet, config, name, grid, calls, noises, args.batch_size)
            cell: dict[str, Any] = {"label": name, "calls": calls, "grid": grid}
            for network, distance in networks.items():
                estimates = distance(pictures)
                cell[network] = {title: to_json(estimate) for title, estimate in estimates.items()}
                shown = (f"{title} {number(estimate)}" for title, estimate in estimates.items())
                print(f"{name}, {calls} calls, {network}:", *shown, flush=True)
            results["cells"][key] = cell
            write_json(results, path)
    write_tables(results, args.steps, args.output_dir / "ggdm_quality.md")


def write_tables(results: dict[str, Any], steps: list[int], path: Path) -> None:
    cells, settings = results["cells"], results["settings"]
    lines = [f"Written by `{results['command']}`: {settings['num_samples']:,} pictures, standard errors by jackknife."]
    for network in settings["networks"]:
        for title, text in DISTANCES.items():
            # features of random weights hardly differ
            scale = 1e3 if title == "kernel_distance" or network == "random weights" else 1.0
            unit = ", × 1000" if scale > 1 else ""
            lines += ["", f"## {text}{unit}, features of {network}", ""]
            lines += ["| Model calls | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
            for label in dict.fromkeys(cell["label"] for cell in cells.values()):
                entries = []
                for calls in steps:
                    cell = cells.get(f"{label}@{calls}", {}).get(network)
                    error = cell and scale * cell[title]["standard_error"]
                    entries.append(f"{scale * cell[title]['value']:.3f} ± {error:.3f}" if cell else "")
                lines.append(f"| {label} | " + " | ".join(entries) + " |")
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    memory = kinds.add_parser("memory")
    memory.set_defaults(measure=measure_memory)
    memory.add_argument("--steps", type=int, nargs="+", default=[2, 5, 10, 15, 20])
    memory.add_argument("--batch_size", type=int, default=16)
    quality = kinds.add_parser("quality")
    quality.set_defaults(measure=measure_quality)
    quality.add_argument("--learned", nargs="+", default=[], metavar="NAME=FOLDER", help="Learned samplers.")
    quality.add_argument("--samplers", nargs="*", default=BASELINES, metavar="NAME", help="Of quality.py.")
    quality.add_argument("--networks", nargs="+", default=[PACKAGED_CLASSIFIER], help="Classifiers with references.")
    quality.add_argument("--dataset_name", help="CIFAR-10, to measure on the features of random weights as well.")
    quality.add_argument("--image_column", default="img")
    quality.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    quality.add_argument("--num_samples", type=int, default=1000)
    quality.add_argument("--batch_size", type=int, default=125)
    quality.add_argument("--seed", type=int, default=100_000)
    quality.add_argument("--resume", action="store_true", help="Keep the cells that are there.")
    for kind in (memory, quality):
        kind.add_argument("--model", default=PACKAGED_MODEL, help="Folder or Hub id of a pipeline.")
        kind.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.measure(args)


if __name__ == "__main__":
    main()

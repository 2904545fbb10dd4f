"""
Real pictures to noise and back: how far they come back from where they were, at equal numbers of model calls.

    python benchmarks/round_trip.py --dataset_name path/or/hub-id/of/cifar10

encodes pictures of the test split with the packaged class-conditional checkpoint, without guidance, and decodes them
with as many calls. Every pair of encoder and decoder has its options chosen on some pictures, for each number of
calls, and its error stated on others. Writes `benchmarks/results/round_trip.json` and `round_trip.md`.
"""

import argparse
import itertools
import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
)

from genie_diffusers import GenieInverseScheduler, GenieScheduler, GenieUNet2DModel
from genie_diffusers.cli import PACKAGED_MODEL
from genie_diffusers.learning.data import load_pictures
from genie_diffusers.learning.paths import Noises, in_batches, predict, relative_error

ROOT = Path(__file__).parent
HEAD = Path(PACKAGED_MODEL).parent / "genie-head-cifar10-16"
ENCODER = Path(PACKAGED_MODEL).parent / "genie-inverse-cifar10-16"
PEERS = ("DDIM", "DPM-Solver++")

SPACINGS = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]
SIGMAS = [{"timestep_spacing": "linspace", f"use_{name}_sigmas": True} for name in ("karras", "exponential")]
ENDS = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]
OWN_ENDS = [{**end, "analytical_first_step": free} for end in ENDS for free in (False, True)]
OWN_GRIDS = [
    {"time_grid": name, "denoising_step": False} for name in ("uniform_lambda", "power_lambda", "karras", "leading")
]


def products(*choices: list[dict]) -> list[dict]:
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*choices)]


#: for each pair the options that it chooses from
VARIANTS: dict[str, list[dict]] = {
    "DDIM": products(SPACINGS[1:], [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]),
    "DPM-Solver++": products(SPACINGS + SIGMAS, [{"solver_order": order} for order in (1, 2, 3)], ENDS),
    "GENIE": products(OWN_GRIDS, OWN_ENDS),
    "GENIE Taylor": products(OWN_GRIDS, OWN_ENDS, [{"method": "taylor"}]),
    "GENIE + derivative head": products(OWN_GRIDS, OWN_ENDS),
    "GENIE Taylor + derivative head": products(OWN_GRIDS, OWN_ENDS, [{"method": "taylor"}]),
    "GENIE + step head": [{"time_grid": "uniform_lambda"}],  # its points are those of its tables
    "GENIE, learned encoding": [{}],
}


def pair_of(name: str, config: dict, options: dict, source=None) -> tuple:
    """Encoder and decoder."""
    if name == "DDIM":
        return DDIMInverseScheduler.from_config(config, **options), DDIMScheduler.from_config(config, **options)
    if name == "DPM-Solver++":
        encoder_options = {key: value for key, value in options.items() if key != "final_sigmas_type"}
        return (
            DPMSolverMultistepInverseScheduler.from_config(config, **encoder_options),
            DPMSolverMultistepScheduler.from_config(config, **options),
        )
    if name == "GENIE, learned encoding":
        encoder = GenieInverseScheduler.from_pretrained(ENCODER)
    else:
        encoder = GenieInverseScheduler.from_config({**config, "time_grid": None}, **options)
    pair = encoder, GenieScheduler.from_config(encoder.config)
    for scheduler in pair:
        scheduler.attach(source)
    return pair


def round_trip(unet: GenieUNet2DModel, pair: tuple, calls: int, pictures: Noises) -> torch.Tensor:
    """The pictures that come back; the loops of diffusers' pipelines."""
    sample = pictures.noise
    for scheduler in pair:
        scheduler.set_timesteps(calls)
        if len(scheduler.timesteps) != calls:
            raise ValueError(f"{type(scheduler).__name__} takes {len(scheduler.timesteps)} calls instead of {calls}.")
        sample = sample * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(predict(unet, model_input, timestep, pictures), timestep, sample).prev_sample
    return sample


def errors_of(unet, name: str, config: dict, options: dict, source, calls: int, pictures: Noises) -> np.ndarray | None:
    """Relative error of each picture, or `None` where diffusers' schedulers have no such run."""
    pair = pair_of(name, config, options, source)
    try:
        found = in_batches(
            lambda batch: round_trip(unet, pair, calls, batch), pictures, len(pictures), torch.device("cpu")
        )
    except IndexError:
        if name not in PEERS:
            raise
        return None  # timesteps that coincide
    return relative_error(found, pictures.noise).numpy()


def test_pictures(args: argparse.Namespace, size: int) -> Noises:
    rows = load_pictures(args.dataset_name, size, 3, dataset_split="test", label_column="label")
    rows = rows.select(range(args.choice_pictures + args.pictures))
    pixels = np.frombuffer(b"".join(rows["pixels"]), dtype=np.uint8).reshape(-1, size, size, 3)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)) / 127.5 - 1.0
    return Noises(images, torch.tensor(rows["label"]), None)


def measure(args: argparse.Namespace) -> dict:
    diffusers.utils.logging.set_verbosity_error()  # they warn of keys that are ours
    plain = GenieUNet2DModel.from_pretrained(PACKAGED_MODEL, subfolder="unet").float().eval()
    derivative = GenieUNet2DModel.from_unet(plain, HEAD)
    models = {name: (plain, None) for name in VARIANTS}
    models |= {name: (derivative, derivative) for name in VARIANTS if "derivative head" in name}
    models["GENIE + step head"] = plain, plain
    config = dict(GenieScheduler.load_config(PACKAGED_MODEL, subfolder="scheduler")) | {"clip_sample": False}
    pictures = test_pictures(args, plain.config.sample_size)
    choice, report = pictures[: args.choice_pictures], pictures[args.choice_pictures :]
    path = args.output_dir / "round_trip.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(name) == getattr(args, name) for name in ("pictures", "choice_pictures"))
    results: dict[str, dict] = {name: {} for name in VARIANTS}
    if same:  # what is not measured now stays
        results |= {name: row for name, row in earlier["results"].items() if name not in args.pairs}
    for name in args.pairs:
        variants = VARIANTS[name]
        unet, source = models[name]
        for calls in args.calls:
            chosen = []
            for options in variants:
                errors = errors_of(unet, name, config, options, source, calls, choice)
                if errors is not None:
                    chosen.append((float(errors.mean()), options))
            _, options = min(chosen, key=lambda pair: pair[0] if np.isfinite(pair[0]) else np.inf)
            errors = errors_of(unet, name, config, options, source, calls, report)
            results.setdefault(name, {})[str(calls)] = {
                "error": float(errors.mean()),
                "standard_error": float(errors.std(ddof=1) / len(errors) ** 0.5),
                "options": options,
            }
            print(f"{name}, {calls} calls each way: {errors.mean():.5f} with {options}", flush=True)
    return {name: row for name, row in results.items() if row}


def table_of(results: dict, calls: list[int]) -> str:
    best = {n: min(results[name][n]["error"] for name in PEERS) for n in map(str, calls)}
    lines = ["| Model calls each way | " + " | ".join(map(str, calls)) + " |", "|---" * (len(calls) + 1) + "|"]
    for name, row in results.items():
        cells = []
        for n in map(str, calls):
            text = f"{row[n]['error']:.5f} ± {row[n]['standard_error']:.5f}"
            cells.append(text if name in PEERS else f"{text} ({row[n]['error'] / best[n]:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="CIFAR-10: Hub id, or a folder in its layout.")
    parser.add_argument("--calls", type=lambda text: [int(n) for n in text.split(",")], default=[10, 20, 50])
    parser.add_argument("--pictures", type=int, default=64, help="Pictures that errors are stated on.")
    parser.add_argument("--choice_pictures", type=int, default=16, help="Other pictures, on which options are chosen.")
    parser.add_argument(
        "--pairs",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help="Measure these; the others stay as they are in the results.",
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    results = measure(args)
    command = "python benchmarks/round_trip.py --dataset_name path/or/hub-id/of/cifar10"
    report = {
        "command": command,
        "what": "mean relative error of pictures after encoding and decoding, by pair and model calls each way",
        "pictures": args.pictures,
        "choice_pictures": args.choice_pictures,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "results": results,
    }
    args.output_dir.mkdir(exist_ok=True)
    (args.output_dir / "round_trip.json").write_text(json.dumps(report, indent=2) + "\n")
    text = (
        f"Written by `{command}`: mean relative error of {args.pictures} test pictures after encoding and decoding, "
        f"and its standard error, in brackets the ratio to the best pair of diffusers. Options are chosen on "
        f"{args.choice_pictures} other pictures.\n\n"
    )
    (args.output_dir / "round_trip.md").write_text(text + table_of(results, args.calls) + "\n")


if __name__ == "__main__":
    main()

"""
Write solutions of a diffusion model's probability-flow ODE, as shards of safetensors for `train_dsno.py`.

From noise, a solver in `--num_inference_steps` model calls, and the states at the time points of a neural operator.
Every solution is a pure function of `--seed` and its number, and a shard has its name only when it is complete: a run
that was killed is repeated with the same command, and neither repeats nor loses a solution, on any number of
processes. See README.md here for examples.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from genie_diffusers.learning.solutions import (
    FACTS_FILE,
    DamagedShardError,
    Teacher,
    add_teacher_arguments,
    check_shard,
    shard_path,
    shard_rows,
    write_shard,
)

logger = get_logger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write solutions of the probability-flow ODE of a diffusion model.")
    add_teacher_arguments(parser)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="Folder for the shards.")
    add("--num_trajectories", type=int, required=True, help="Solutions in all. More may be asked for later.")
    add("--shard_size", type=int, default=1000, help="Solutions in a shard.")
    add("--batch_size", type=int, default=64, help="Solutions at a time, per process.")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    if min(args.num_trajectories, args.shard_size, args.batch_size) < 1:
        raise ValueError(
            "`--num_trajectories`, `--shard_size` and `--batch_size` must be at least 1, got "
            f"{args.num_trajectories}, {args.shard_size} and {args.batch_size}."
        )
    teacher = Teacher(args, accelerator.device)
    facts = teacher.facts(args) | {"seed": args.seed, "shard_size": args.shard_size}
    facts_path = args.output_dir / FACTS_FILE
    if facts_path.exists():
        earlier = json.loads(facts_path.read_text())
        different = sorted(name for name, value in facts.items() if earlier[name] != value)
        if different:
            raise ValueError(
                f"`--output_dir` holds solutions with other {', '.join(different)}: "
                f"{[earlier[name] for name in different]} there, got {[facts[name] for name in different]}."
            )
    facts["num_trajectories"] = args.num_trajectories
    missing = []
    for index, rows in enumerate(shard_rows(facts)):
        path = shard_path(args.output_dir, index)
        try:
            check_shard(path, rows)
        except DamagedShardError as error:
            if path.exists():
                logger.warning(f"Drawn again: {error}")
            missing.append((index, rows))
    accelerator.wait_for_everyone()  # all have seen the same shards
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        partial = facts_path.with_suffix(".partial")
        partial.write_text(json.dumps(facts, indent=2) + "\n")
        os.replace(partial, facts_path)
    accelerator.wait_for_everyone()
    own = missing[accelerator.process_index :: accelerator.num_processes]
    total = sum(math.ceil(rows / args.batch_size) for _, rows in own)
    with tqdm(total=total, desc="Batches", disable=not accelerator.is_local_main_process) as progress:
        for index, rows in own:
            parts = []
            for start in range(0, rows, args.batch_size):
                first = index * args.shard_size + start
                numbers = list(range(first, first + min(args.batch_size, rows - start)))
                noises = teacher.draw(numbers, args.seed)
                parts.append((noises, teacher.solve(noises.to(accelerator.device)).cpu()))
                progress.update()
            tensors = {
                "noise": torch.cat([noises.noise for noises, _ in parts]),
                "trajectory": torch.cat([states for _, states in parts]),
            }
            if teacher.classes is not None:
                tensors["labels"] = torch.cat([noises.labels for noises, _ in parts])
            write_shard(shard_path(args.output_dir, index), tensors)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(parse_args())

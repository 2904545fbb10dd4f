"""
Learn a sampler for few model calls by differentiating through it (DDSS, Watson et al., 2022).

The numbers of a `GGDMScheduler`, some hundred, are moved down the gradient of what its pictures are worth, through
the whole chain of steps and the frozen denoiser. `--objective kernel` is the paper's: the distance of the pictures'
features from those of real ones. `--objective trajectory` is the distance of each picture from the converged solution
of the denoiser's ODE from the same noise, which needs no data. The result is a folder with `scheduler_config.json` and
a card; see README.md here for examples.
"""

import argparse
from pathlib import Path

import torch

from genie_diffusers import GenieScheduler
from genie_diffusers.learning.arguments import base_of, hub_id, repository_of, source_of
from genie_diffusers.learning.run import Run
from genie_diffusers.learning.samplers import (
    ORIGINS,
    Objective,
    Sampler,
    SamplerLearning,
    gathered,
    load_denoiser,
    parse_args,
    plot_tables,
)
from genie_diffusers.learning.tables import learned_scheduler


def main(args: argparse.Namespace) -> None:
    run = Run(args, alike=True)
    unet = load_denoiser(args).to(run.device)
    scheduler_config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    sampler = Sampler(unet, scheduler_config, args)
    with run.accelerator.main_process_first():
        learning = SamplerLearning(args, sampler, scheduler_config)
    objective = Objective(args, unet, run.device)
    # What the origin is worth is the unit of the loss, so that every number of model calls counts the same.
    units = learning.start(objective)
    tables, counts = learning.tables, args.num_inference_steps
    run.learn(*tables.values(), prepare=False)  # of which one is used in each step, and called many times

    def loss(step: int, part: int) -> torch.Tensor:
        steps, rows = counts[step % len(counts)], []
        noises, fresh, targets = learning.draw(step, steps, run.total_batch_size)
        for batch in range(args.gradient_accumulation_steps):
            own = run.share(torch.arange(len(noises)), batch)
            with run.accelerator.autocast():
                added = None if fresh is None else fresh[:, own].to(run.device)
                pictures = sampler(tables[steps], noises[own].to(run.device), added)
                rows.append(objective.of_each(pictures, None if targets is None else targets[own].to(run.device)))
        # All batches at once, since a distance between sets is no mean.
        return objective.of_all(gathered(torch.cat(rows), run.accelerator)) / units[steps]

    def validate(step: int) -> None:
        with run.averaged():
            run.accelerator.log(learning.validate(objective, step, units), step=step)

    what = f"{sum(parameter.numel() for parameter in run.parameters)} numbers of tables for {counts} model calls"
    run.fit(loss, what, of_all_batches=True, every=args.validation_steps, then=validate)
    if run.is_main:
        learned = {str(steps): table.as_table() for steps, table in tables.items()}
        worths = learning.report(objective)
        learned_scheduler(scheduler_config, learning.origin | learned).save_pretrained(args.output_dir)
        plot_tables(
            {steps: learning.origin[steps] for steps in learned},
            learned,
            sampler.process,
            args.output_dir / "tables.png",
        )
        write_card(run, objective, list(learning.origin | learned), list(learned), worths)
    run.end()


def write_card(run: Run, objective: Objective, all_steps: list[str], learned: list[str], worths: dict) -> None:
    args = run.args
    facts = {
        "Base model": source_of(args.pretrained_model_name_or_path),
        "Model calls": ", ".join(sorted(all_steps, key=int)),
        "Family": ", ".join(args.family) + (", marginals kept" if args.keep_marginals else ""),
        "Origin": f"{args.origin}, {args.time_grid}" if args.origin in ORIGINS else "an earlier result",
        "Objective": objective.name,
        "Guidance scale": f"{args.guidance_scale:g}",
        "Training": f"{args.max_train_steps:,} steps of {args.train_batch_size} × {args.gradient_accumulation_steps} "
        "paths a process",
    }
    if objective.network is not None:
        facts["Feature network"] = hub_id(args.feature_network) or Path(args.feature_network).name
    for name, values in worths.items():
        facts[f"Held-out {objective.name}, {name}"] = ", ".join(f"{n}: {worth:.5g}" for n, worth in values.items())
    names, with_head = "GeniePipeline, GGDMScheduler", ""
    if args.derivative_head is not None:
        head = hub_id(args.derivative_head) or "path/to/derivative-head"
        names = "GeniePipeline, GenieUNet2DModel, GGDMScheduler"
        with_head = (
            f'pipeline.unet = GenieUNet2DModel.from_unet(pipeline.unet, derivative_head="{head}")\n'
            "pipeline.scheduler.attach(pipeline.unet)\n"
        )
    run.publish(
        f"A sampler for {base_of(args)} with {' or '.join(learned)} model calls, learned with genie_diffusers by "
        "differentiating through it. It is a table of numbers in `scheduler_config.json`; the model stays as it is.",
        usage=(
            f"from genie_diffusers import {names}\n\n"
            f'pipeline = GeniePipeline.from_pretrained("{base_of(args)}")\n'
            f'pipeline.scheduler = GGDMScheduler.from_pretrained("{repository_of(args)}")\n'
            f"{with_head}"
            f"images = pipeline(num_inference_steps={min(map(int, learned))}).images"
        ),
        facts=facts,
        pictures={"tables.png": "Timesteps, and how far the weights of states and predictions are from the origin's."},
        unit="1 is the origin",
    )


if __name__ == "__main__":
    main(parse_args())

"""
Learn how to encode: the rows of a `GenieInverseScheduler` that its decoder best finds back to the pictures from.

What is off after a round trip is not the error of encoder and decoder, but what the one does that the other does not
undo. Here the weights of the encoder, some hundred numbers, are moved down the gradient of the round trip's error on
real pictures, through encoder, decoder and the frozen denoiser. The decoder is a plain `GenieScheduler`. The result is
a folder with `scheduler_config.json` and a card; see README.md here.
"""

import argparse

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from genie_diffusers import GenieInverseScheduler, GenieScheduler, GenieUNet2DModel, VariancePreserving
from genie_diffusers.model_card import create_model_card
from genie_diffusers.schedulers.scheduling_ggdm import as_table
from learned_tables import LearnedTable, mean_products, sample_by
from ode_paths import Noises, relative_error, solver_of
from training_utils import (
    RunLog,
    TrainingStream,
    adamw,
    add_data_arguments,
    add_training_arguments,
    check_labels,
    hub_id,
    launch_command,
    load_checkpoint,
    load_pictures,
    push_to_hub,
    save_checkpoint,
    start_accelerator,
    total_batch_size,
    training_batches,
)

logger = get_logger(__name__)

#: what a round trip is closest with, see `GenieInverseScheduler`
OPTIONS = {"time_grid": "uniform_lambda", "final_sigmas_type": "sigma_min", "analytical_first_step": True}

#: what else a decoder follows from
DECODER_OPTIONS = ("method", "interpolation_order", "prediction_type", "clip_sample", "thresholding")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn how to encode pictures, by the error of the round trip.")
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="The denoiser: Hub id or folder of a pipeline with a `UNet2DModel` and a scheduler.",
    )
    add(
        "--num_inference_steps",
        type=lambda text: sorted({int(number) for number in text.split(",")}),
        default=[10, 20],
        help="Numbers of model calls, each way, such as `10,20`.",
    )
    add(
        "--origin",
        help="Folder or Hub id of an earlier result: where learning goes on, and whose other rows are kept.",
    )
    add("--validation_samples", type=int, default=64, help="Pictures that are not learned from.")
    add("--solve_batch_size", type=int, default=64, help="Batch size where nothing is learned.")
    add("--no_rematerialisation", action="store_true", help="Keep all calls of the denoiser for the backward pass.")
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(train_batch_size=16, learning_rate=0.1, lr_warmup_steps=10, adam_weight_decay=0.0)
    parser.set_defaults(ema_max_decay=0.9)
    return parser.parse_args(argv)


class RoundTrip:
    """
    Encoder and decoder for one number of model calls, the encoder's rows with free numbers.

    Args:
        encoder ([`GenieInverseScheduler`]): Where learning starts.
        steps (`int`): Model calls each way.
        device (`torch.device`): Where the denoiser is.
    """

    def __init__(self, encoder: GenieInverseScheduler, steps: int, device: torch.device):
        decoder = GenieScheduler.from_config(encoder.config)
        self.prediction_type = encoder.config.prediction_type
        tables = []
        for scheduler in (encoder, decoder):
            scheduler.set_timesteps(steps)
            rows = [scheduler.corrected_row(index) for index in range(steps)]
            tables.append(as_table(scheduler._host_timesteps, rows, scheduler.data_form))
        self.encoder = LearnedTable(tables[0], encoder.process, ["history"]).to(device)
        self.decoder = LearnedTable(tables[1], decoder.process, []).requires_grad_(False).to(device)
        self.sigmas, self.noise_stds = encoder.sigmas, encoder.noise_stds[1:]
        self.options = {name: encoder.config[name] for name in DECODER_OPTIONS}
        self.noise_scale = decoder.init_noise_sigma

    def __call__(self, unet: GenieUNet2DModel, pictures: Noises, rematerialise: bool = True) -> torch.Tensor:
        """The squared relative error of each picture."""
        options = {"fresh": None, "prediction_type": self.prediction_type, "rematerialise": rematerialise}
        noise = sample_by(unet, self.encoder, pictures, **options)
        start = Noises(noise * self.noise_scale, pictures.labels, None)
        found = sample_by(unet, self.decoder, start, **options)
        return relative_error(found.float(), pictures.noise).square()

    def whiten(self, unet: GenieUNet2DModel, pictures: Noises, error: float) -> None:
        """Coordinates of the rows, of which a unit of all moves a state by this share of the noise that is in it."""
        grams = mean_products(unet, self.encoder, pictures, None, self.prediction_type)
        share = error / len(self.encoder.weights) ** 0.5
        self.encoder.whiten(grams, (share * self.noise_stds).tolist())

    def rows(self) -> dict:
        """The entry of the configuration key `encoding`."""
        table = self.encoder.as_table()
        rows = [[*table["sample"][i], *table["prediction"][i]] for i in range(len(self.encoder))]
        return {"sigmas": self.sigmas.tolist(), "options": self.options, "weights": rows}


def main(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(args)
    set_seed(args.seed)
    device, name = accelerator.device, args.pretrained_model_name_or_path
    unet = GenieUNet2DModel.from_pretrained(name, subfolder="unet").float().eval().requires_grad_(False).to(device)
    classes = unet.config.num_class_embeds
    null = args.label_dropout > 0
    if null and classes is None:
        raise ValueError(f"`--label_dropout` must be 0 for a model without classes, got {args.label_dropout}.")
    if args.validation_samples < 2 or min(args.num_inference_steps) < 1:
        raise ValueError(
            "`--validation_samples` must be at least 2 and `--num_inference_steps` positive, got "
            f"{args.validation_samples} and {args.num_inference_steps}."
        )
    solver = solver_of(GenieScheduler.load_config(name, subfolder="scheduler"))
    origin = {} if args.origin is None else GenieInverseScheduler.load_config(args.origin).get("encoding") or {}
    encoder = GenieInverseScheduler.from_config(solver.config, **OPTIONS, encoding=origin)
    if not isinstance(encoder.process, VariancePreserving):
        raise ValueError("`--pretrained_model_name_or_path` must be a variance-preserving model, not one of flows.")
    if args.resolution not in (None, unet.config.sample_size):
        raise ValueError(f"`--resolution` must be the model's {unet.config.sample_size}, got {args.resolution}.")
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    with accelerator.main_process_first():
        pictures = load_pictures(
            args.dataset_name,
            unet.config.sample_size,
            unet.config.in_channels,
            dataset_config_name=args.dataset_config_name,
            dataset_split=args.dataset_split,
            image_column=args.image_column,
            label_column=None if classes is None else args.label_column,
            cache_dir=args.cache_dir,
        )
    if len(pictures) <= args.validation_samples:
        raise ValueError(
            f"`--validation_samples` must leave some of the {len(pictures)} pictures, got {args.validation_samples}."
        )
    if classes is not None:
        check_labels(pictures.unique("label"), classes - null)
    pictures = pictures.shuffle(seed=args.seed)
    null_class = None if classes is None else classes - 1

    def stream(chosen, dropout: float = 0.0, flip: bool = False) -> TrainingStream:
        return TrainingStream(chosen, shape, shape, args.seed, flip, dropout, null_class)

    def paths(batch: dict[str, torch.Tensor]) -> Noises:
        return Noises(batch["images"], batch.get("labels"), None).to(device)

    held_out = stream(pictures.select(range(args.validation_samples)))
    validation = paths(held_out.__getitems__(list(range(args.validation_samples))))
    training = stream(
        pictures.select(range(args.validation_samples, len(pictures))), args.label_dropout, args.random_flip
    )

    @torch.no_grad()
    def worth(trip: RoundTrip) -> float:
        """The mean relative error of the round trip of the held-out pictures."""
        parts = torch.arange(len(validation)).split(args.solve_batch_size)
        return float(torch.cat([trip(unet, validation[part]) for part in parts]).sqrt().mean())

    trips = {steps: RoundTrip(encoder, steps, device) for steps in args.num_inference_steps}
    before = {}
    for steps, trip in trips.items():
        before[steps] = worth(trip)
        trip.whiten(unet, validation[: args.solve_batch_size], before[steps])
        for buffer in trip.encoder.buffers():
            buffer.copy_(broadcast(buffer))
        logger.info(f"{steps} model calls each way: relative error {before[steps]:.5f}")

    parameters = [parameter for trip in trips.values() for parameter in trip.encoder.parameters()]
    optimizer = accelerator.prepare(adamw(args, parameters))
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    ema = EMAModel(parameters, decay=args.ema_max_decay)
    # The rows are not prepared: their gradients are averaged by hand, and each is used every few steps only.
    accelerator.register_for_checkpointing(*(trip.encoder for trip in trips.values()), lr_scheduler, ema)
    first_step = load_checkpoint(accelerator, args)
    ema.to(device)
    log = RunLog(accelerator, args, first_step)
    logger.info(
        f"{sum(parameter.numel() for parameter in parameters)} numbers, {total_batch_size(args, accelerator)} "
        f"pictures a step, steps {first_step + 1} to {args.max_train_steps}"
    )
    batches = training_batches(training, args, accelerator, first_step)
    progress = tqdm(
        initial=first_step, total=args.max_train_steps, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for step in range(first_step + 1, args.max_train_steps + 1):
        trip = trips[args.num_inference_steps[step % len(trips)]]
        step_loss = torch.zeros((), device=device)
        for _ in range(args.gradient_accumulation_steps):
            with accelerator.autocast():
                errors = trip(unet, paths(next(batches)), not args.no_rematerialisation)
            # Errors differ much between pictures, and their squares would leave the few worst to count; the unit is
            # that of the start, so that every number of model calls counts the same.
            loss = errors.sqrt().mean() / before[len(trip.encoder)]
            accelerator.backward(loss)  # which divides by the number of accumulated batches
            step_loss += loss.detach() / args.gradient_accumulation_steps
        for parameter in trip.encoder.parameters():
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        accelerator.clip_grad_norm_(trip.encoder.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        ema.step(parameters)
        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        log.write(step, mean_loss, learning_rate)
        progress.update()
        progress.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            save_checkpoint(accelerator, args, step)
    progress.close()

    if accelerator.is_main_process:
        ema.copy_to(parameters)
        after = {steps: worth(trip) for steps, trip in trips.items()}
        # What learning has not made better stays as it was.
        better = {str(steps): trip.rows() for steps, trip in trips.items() if after[steps] < before[steps]}
        finish(args, encoder, origin | better, before, after, log)
    accelerator.end_training()


def finish(
    args: argparse.Namespace,
    encoder: GenieInverseScheduler,
    encoding: dict[str, dict],
    before: dict[int, float],
    after: dict[int, float],
    log: RunLog,
) -> None:
    """Save the encoder with a card, and publish it if asked."""
    GenieInverseScheduler.from_config(encoder.config, encoding=encoding).save_pretrained(args.output_dir)
    base = hub_id(args.pretrained_model_name_or_path) or "path/to/base-model"
    repository = args.hub_model_id or args.output_dir.name
    facts = {
        "Base model": hub_id(args.pretrained_model_name_or_path) or "a local folder",
        "Data": hub_id(args.dataset_name) or "a local folder",
        "Model calls": ", ".join(encoding) or "none: nothing was learned",
        "Training": f"{args.max_train_steps:,} steps of {args.train_batch_size} × {args.gradient_accumulation_steps} "
        "pictures a process",
        "Final loss": f"{log.plot(args.output_dir / 'loss.png'):.4f} (mean over the last fiftieth of the run; 1 is "
        "where learning starts)",
    }
    for name, errors in {"solver" if args.origin is None else "origin": before, "learned": after}.items():
        facts[f"Held-out relative error of the round trip, {name}"] = ", ".join(
            f"{steps}: {error:.5f}" for steps, error in errors.items()
        )
    card = create_model_card(
        repository,
        f"Weights that encode pictures with {base}, made with genie_diffusers, learned by the error of the round trip "
        "to noise and back. They are a table of numbers in `scheduler_config.json`; the model stays as it is.",
        usage=(
            "from genie_diffusers import GenieInverseScheduler, GeniePipeline, GenieScheduler\n\n"
            f'pipe = GeniePipeline.from_pretrained("{base}")\n'
            f'pipe.scheduler = GenieInverseScheduler.from_pretrained("{repository}")\n'
            "pipe.scheduler.attach(None)  # these rows are for a sampler without a head\n"
            f'noise = pipe(latents=pictures, num_inference_steps={min(after)}, output_type="latent").images\n'
            "pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)\n"
            "pipe.scheduler.attach(None)\n"
            f"again = pipe(latents=noise, num_inference_steps={min(after)}).images"
        ),
        facts=facts,
        command=launch_command(),
        pictures={"loss.png": "Training loss and its running mean; 1 is where learning starts."},
        base_model=hub_id(args.pretrained_model_name_or_path),
    )
    card.save(args.output_dir / "README.md")
    if args.push_to_hub:
        push_to_hub(args)


if __name__ == "__main__":
    main(parse_args())

"""Encoders: the round trip of pictures to noise and back, through rows with free numbers."""

import argparse

import datasets
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast

from genie_diffusers import GenieInverseScheduler, GenieScheduler, GenieUNet2DModel, Table, VariancePreserving
from genie_diffusers.learning.arguments import add_data_arguments, add_training_arguments, numbers
from genie_diffusers.learning.data import TrainingStream, check_labels
from genie_diffusers.learning.paths import Noises, relative_error, solver_of
from genie_diffusers.learning.tables import LearnedTable, mean_products, sample_by

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
        type=numbers,
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
            tables.append(scheduler.table.fold())
        self.encoder = LearnedTable(tables[0], encoder.process, ["history"]).to(device)
        self.decoder = LearnedTable(tables[1], decoder.process, []).requires_grad_(False).to(device)
        self.noise_stds = encoder.noise_stds[1:]
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
        """The entry of the configuration key `tables`."""
        return {**self.encoder.as_table(), "learned_for": self.options}


def check(args: argparse.Namespace, unet: GenieUNet2DModel) -> None:
    if args.label_dropout > 0 and unet.config.num_class_embeds is None:
        raise ValueError(f"`--label_dropout` must be 0 for a model without classes, got {args.label_dropout}.")
    if args.validation_samples < 2 or min(args.num_inference_steps) < 1:
        raise ValueError(
            "`--validation_samples` must be at least 2 and `--num_inference_steps` positive, got "
            f"{args.validation_samples} and {args.num_inference_steps}."
        )
    if args.resolution not in (None, unet.config.sample_size):
        raise ValueError(f"`--resolution` must be the model's {unet.config.sample_size}, got {args.resolution}.")


def encoder_of(args: argparse.Namespace) -> GenieInverseScheduler:
    """Where learning starts: the solver of the model, with the rows of `--origin` if there is one."""
    config = GenieScheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
    solver, tables = solver_of(config), {}
    if args.origin is not None:
        origin = GenieInverseScheduler.from_pretrained(args.origin).config.tables or {}
        tables = {
            steps: Table.from_dict(entry, solver.process, int(steps)).to_dict() for steps, entry in origin.items()
        }
    encoder = GenieInverseScheduler.from_config(solver.config, **OPTIONS, tables=tables)
    if not isinstance(encoder.process, VariancePreserving):
        raise ValueError("`--pretrained_model_name_or_path` must be a variance-preserving model, not one of flows.")
    return encoder


def streams(args: argparse.Namespace, unet, pictures: datasets.Dataset) -> tuple[TrainingStream, TrainingStream]:
    """The training pictures, and those held out of them."""
    count, classes = args.validation_samples, unet.config.num_class_embeds
    if len(pictures) <= count:
        raise ValueError(f"`--validation_samples` must leave some of the {len(pictures)} pictures, got {count}.")
    if classes is not None:
        check_labels(pictures.unique("label"), classes - (args.label_dropout > 0))
    pictures = pictures.shuffle(seed=args.seed)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    null_class = None if classes is None else classes - 1
    rest = pictures.select(range(count, len(pictures)))
    return (
        TrainingStream(rest, shape, shape, args.seed, args.random_flip, args.label_dropout, null_class),
        TrainingStream(pictures.select(range(count)), shape, shape, args.seed),
    )


class RoundTrips(dict[int, RoundTrip]):
    """
    Number of model calls → the round trip that is learned for it.

    Args:
        args (`argparse.Namespace`): The arguments of the recipe.
        unet ([`GenieUNet2DModel`]): The denoiser, frozen.
        encoder ([`GenieInverseScheduler`]): Where learning starts.
        held_out ([`TrainingStream`]): What errors are stated on.
    """

    def __init__(self, args: argparse.Namespace, unet, encoder: GenieInverseScheduler, held_out: TrainingStream):
        super().__init__({steps: RoundTrip(encoder, steps, unet.device) for steps in args.num_inference_steps})
        self.args, self.unet = args, unet
        self.validation = self._paths(held_out.__getitems__(list(range(args.validation_samples))))

    @property
    def tables(self) -> list[LearnedTable]:
        """What is learned."""
        return [trip.encoder for trip in self.values()]

    def start(self) -> dict[int, float]:
        """Choose the coordinates of the rows, alike in all processes; returns the errors before learning."""
        errors = {}
        for steps, trip in self.items():
            errors[steps] = self._worth(trip)
            trip.whiten(self.unet, self.validation[: self.args.solve_batch_size], errors[steps])
            for buffer in trip.encoder.buffers():
                buffer.copy_(broadcast(buffer))
            logger.info(f"{steps} model calls each way: relative error {errors[steps]:.5f}")
        return errors

    def errors(self, steps: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The squared relative error of each picture of a batch, differentiable in the rows."""
        return self[steps](self.unet, self._paths(batch), not self.args.no_rematerialisation)

    def worths(self) -> dict[int, float]:
        """The mean relative error of the held-out pictures."""
        return {steps: self._worth(trip) for steps, trip in self.items()}

    @torch.no_grad()
    def _worth(self, trip: RoundTrip) -> float:
        parts = torch.arange(len(self.validation)).split(self.args.solve_batch_size)
        return float(torch.cat([trip(self.unet, self.validation[part]) for part in parts]).sqrt().mean())

    def _paths(self, batch: dict[str, torch.Tensor]) -> Noises:
        return Noises(batch["images"], batch.get("labels"), None).to(self.unet.device)

"""Sample a diffusion checkpoint in few steps, compare samplers on it, say what it is."""

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import make_image_grid
from PIL import Image

from . import (
    DerivativeHead,
    ExponentialMultistepScheduler,
    GeniePipeline,
    GenieScheduler,
    GenieUNet2DModel,
    QuasiTaylorScheduler,
    StepHead,
    VariancePreserving,
)
from .core.time_grids import TIMESTEP_SPACINGS
from .schedulers.scheduling_exponential_multistep import MULTISTEP_SOLVERS
from .schedulers.scheduling_gaussian_diffusion import SIGMA_FLAGS

INSTALL = "pip install 'genie-diffusers[cli]'"
try:
    import typer
except ModuleNotFoundError:
    raise SystemExit(f"Error: the command line needs typer: {INSTALL}") from None

PACKAGED_MODEL = str(Path(__file__).parent / "checkpoints" / "ddpm-cifar10-16")
PIPELINES = ("GeniePipeline", "DDPMPipeline", "DDIMPipeline")
UNETS = ("GenieUNet2DModel", "UNet2DModel")

#: short name → (name in pictures, class), those of this package
OWN = {
    "genie": ("GENIE", GenieScheduler),
    "genie-history": ("GENIE", GenieScheduler),
    "quasi-taylor": ("Quasi-Taylor", QuasiTaylorScheduler),
    # DDIM is diffusers', below: one name has one meaning
    **{name: (name, ExponentialMultistepScheduler) for name in MULTISTEP_SOLVERS if name != "ddim"},
}
#: and those of diffusers
PEERS = {
    "ddim": ("DDIM", diffusers.DDIMScheduler),
    "ddpm": ("DDPM", diffusers.DDPMScheduler),
    "deis": ("DEIS", diffusers.DEISMultistepScheduler),
    "dpm++": ("DPM-Solver++", diffusers.DPMSolverMultistepScheduler),
    "dpm++single": ("DPM-Solver++ singlestep", diffusers.DPMSolverSinglestepScheduler),
    "dpm++sde": ("DPM-Solver++ SDE", diffusers.DPMSolverSDEScheduler),
    "dpm2": ("DPM-Solver-2", diffusers.KDPM2DiscreteScheduler),
    "dpm2-ancestral": ("DPM-Solver-2 ancestral", diffusers.KDPM2AncestralDiscreteScheduler),
    "euler": ("Euler", diffusers.EulerDiscreteScheduler),
    "euler-ancestral": ("Euler ancestral", diffusers.EulerAncestralDiscreteScheduler),
    "heun": ("Heun", diffusers.HeunDiscreteScheduler),
    "lms": ("LMS", diffusers.LMSDiscreteScheduler),
    "pndm": ("PNDM", diffusers.PNDMScheduler),
    "unipc": ("UniPC", diffusers.UniPCMultistepScheduler),
}
SCHEDULERS = {**OWN, **PEERS}
#: These of diffusers add fresh noise in every step: they do not approximate the solution that the others converge to.
STOCHASTIC = ("ddpm", "dpm++sde", "dpm2-ancestral", "euler-ancestral")

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

MODEL_HELP = "Folder or Hub id of a pipeline of a UNet2DModel and a scheduler. [default: the packaged checkpoint]"
CLASSES_HELP = "Classes, separated by commas: one for each picture, or one for all. [default: 0,1,2,…]"
NAMES_HELP = f"NAME is {', '.join(OWN)}, or one of diffusers' own: {', '.join(PEERS)}."
GRID_HELP = (
    "Time grid of those without one in their name: karras, beta57, ays and all others of `time_grid`; for diffusers' "
    "own, those that they have of karras, exponential, beta, linspace, leading, trailing."
)
SAMPLER_HELP = (
    "NAME[:GRID][?KEY=VALUE[&KEY=VALUE…]], such as genie:beta57 or unipc:karras?solver_order=3; keys are those of the "
    f"scheduler's configuration. {NAMES_HELP}"
)
ROWS_HELP = (
    "Rows NAME[:GRID][?KEY=VALUE…][@STEPS], separated by commas, as for `sample --scheduler`. Without @STEPS: each of "
    f"--steps. {NAMES_HELP}"
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next one has the next seed.")]
Classes = Annotated[str | None, typer.Option(help=CLASSES_HELP)]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Number of pictures. [default: that of --classes, or 8]")]
Guidance = Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")]
Grid = Annotated[str | None, typer.Option(help=GRID_HELP)]
Head = Annotated[str | None, typer.Option(help="Folder or Hub id of a head for the UNet.")]
Device = Annotated[str | None, typer.Option(help="Where to sample. [default: cuda if there is one, else cpu]")]
Output = Annotated[Path, typer.Option(help="The .png file to write.")]


class Sampler(NamedTuple):
    """A scheduler's short name, its time grid (`None` as configured), its `num_inference_steps` and other options."""

    name: str
    grid: str | None
    steps: int
    options: Mapping[str, Any] = {}


class Drawn(NamedTuple):
    """
    What was drawn.

    Args:
        label (`str`): The scheduler's name for people.
        latents (`torch.Tensor`): The samples in [−1, 1].
        calls (`int`): How often the UNet was called for them.
        noisy (`bool`): Whether fresh noise was added on the way.
    """

    label: str
    latents: torch.Tensor
    calls: int
    noisy: bool


class Pictures(NamedTuple):
    """What to draw: the classes (`None` for a model without them), a seed for each picture, the guidance scale."""

    labels: list[int] | None
    seeds: list[int]
    guidance: float


@contextmanager
def short_errors() -> Iterator[None]:
    """What this package and diffusers raise about their input are sentences: show those, without the traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


@app.command()
@short_errors()
def sample(
    model: Model = PACKAGED_MODEL,
    scheduler: Annotated[str, typer.Option(help=SAMPLER_HELP)] = "genie",
    steps: Annotated[int, typer.Option(min=1, help="The scheduler's `num_inference_steps`.")] = 10,
    seed: Seed = 0,
    classes: Classes = None,
    batch_size: BatchSize = None,
    guidance: Guidance = 1.0,
    grid: Grid = None,
    derivative_head: Head = None,
    device: Device = None,
    output: Output = Path("grid.png"),
):
    """Draw pictures and write them as one."""
    check_output(output)
    samplers = parse_samplers(scheduler, [steps], grid, "--scheduler")
    if len(samplers) > 1:
        raise bad_option("--scheduler", f"must be one, got {scheduler!r}; `compare` takes several.")
    pipe = load_pipeline(model, derivative_head, device)
    pictures = choose(pipe, classes, batch_size, seed, guidance)
    label, latents, calls, _ = draw(pipe, pipe.scheduler.config, samplers[0], pictures)
    picture_grid(pipe.image_processor.postprocess(latents, output_type="pil")).save(output)
    typer.echo(f"{output}: {len(latents)} pictures, {label}, {calls} model calls")


@app.command()
@short_errors()
def compare(
    model: Model = PACKAGED_MODEL,
    schedulers: Annotated[str, typer.Option(help=ROWS_HELP)] = "ddim,genie,ddim@100",
    steps: Annotated[str, typer.Option(help="`num_inference_steps`, one or more separated by commas.")] = "10",
    seed: Seed = 0,
    classes: Classes = None,
    batch_size: BatchSize = None,
    guidance: Guidance = 1.0,
    grid: Grid = None,
    reference_steps: Annotated[int, typer.Option(min=1, help="Model calls for the converged solution.")] = 200,
    derivative_head: Head = None,
    device: Device = None,
    output: Output = Path("compare.png"),
):
    """
    Compare samplers from the same noise, as one labelled picture.

    Distances are ‖x − x*‖/‖x*‖, averaged over the pictures, with x* the converged solution of the probability-flow
    ODE from a fine run of genie-history. A guided call counts once. Clipping is off for all.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(f"`compare` needs matplotlib: {INSTALL}") from None
    check_output(output)
    samplers = parse_samplers(schedulers, parse_integers(steps, "--steps"), grid, "--schedulers")
    pipe = load_pipeline(model, derivative_head, device)
    pictures = choose(pipe, classes, batch_size, seed, guidance)
    config = pipe.scheduler.config
    unclipped = {"clip_sample": False, "thresholding": False}
    # All rows first: what is wrong with one shows before the long reference run.
    rows = [draw(pipe, config, sampler, pictures, **unclipped) for sampler in samplers]
    reference = draw(pipe, config, Sampler("genie-history", "linear", reference_steps), pictures, **unclipped).latents
    width, count = max(len(label) for label, *_ in rows), len(pictures.seeds)
    figure = Figure(figsize=(1 + 0.1 * width + 1.3 * count, 0.4 + 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for column, axis in enumerate(axes[0]):
        name = f", class {pictures.labels[column]}" if pictures.labels else ""
        axis.set_title(f"seed {pictures.seeds[column]}{name}", fontsize=9)
    for (label, latents, calls, noisy), row in zip(rows, axes, strict=True):
        known = "stochastic" if noisy else f"distance {relative_distance(latents, reference):.3f}"
        typer.echo(f"{label:<{width}}  {calls:>4} calls  {known}")
        text = f"{label}, {calls} calls\n{known}"
        row[0].set_ylabel(text, rotation="horizontal", ha="right", va="center", fontsize=12)
        for axis, image in zip(row, pipe.image_processor.postprocess(latents, output_type="pil"), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    figure.savefig(output, dpi=150)
    typer.echo(f"Written to {output}")


@app.command()
@short_errors()
def info(model: Model = PACKAGED_MODEL, derivative_head: Head = None):
    """Say what a checkpoint is."""
    pipe = load_pipeline(model, derivative_head, "cpu")
    unet, config = pipe.unet, pipe.scheduler.config
    head = getattr(unet, "derivative_head", None)
    head_size = sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0
    unet_size = sum(parameter.numel() for parameter in unet.parameters()) - head_size
    process = VariancePreserving.from_config(config)
    ends = process.log_snr(np.array([process.timestep_max, process.timestep_min]))
    classes, size = unet.config.num_class_embeds, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    betas = "trained betas" if config.get("trained_betas") else f"{config.get('beta_schedule')} betas"
    facts = {
        "UNet": f"{type(unet).__name__}, {unet_size:,} parameters",
        "Sample": f"{unet.config.in_channels} × {height} × {width} (channels × height × width)",
        "Classes": "none" if classes is None else f"{classes}, the last one taken as the null class",
        "Prediction": config.get("prediction_type", "epsilon"),
        "Schedule": f"{betas}, {process.num_train_timesteps} timesteps, log(α/σ) from {ends[0]:.2f} to {ends[1]:.2f}",
        "Scheduler": type(pipe.scheduler).__name__,
        "Head": "none",
    }
    if head is not None:
        origin = "unknown" if head.config.fingerprint is None else "these" if head.matches(unet) else "other"
        size = f"width {head.config.width}, {head_size:,} parameters ({head_size / unet_size:.1%} of the UNet's)"
        facts["Head"] = f"{type(head).__name__}, {size}, distilled from {origin} weights"
        if isinstance(head, StepHead):
            facts["Tables"] = f"for {', '.join(sorted(head.config.tables, key=int))} model calls"
    for name, value in facts.items():
        typer.echo(f"{name:<17}{value}")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    help="Learn a sampler for few calls of a pipeline: `genie-diffusers calibrate --help`.",
)
@short_errors()
def calibrate(context: typer.Context):
    # one definition of the arguments, that `accelerate launch -m genie_diffusers.calibration` has too
    from .calibration.launch import main

    main(context.args, "genie-diffusers calibrate")


def load_pipeline(model: str, derivative_head: str | None, device: str | None) -> GeniePipeline:
    """The pipeline in a folder or on the Hub, as a [`GeniePipeline`]; refuses what that cannot sample."""
    if model == PACKAGED_MODEL and not Path(model).is_dir():
        raise ValueError(f"The packaged checkpoint is not in {model}; name a MODEL.")
    index = load_config(diffusers.DiffusionPipeline, model, "pipeline")
    name, unet = index["_class_name"], index.get("unet", (None, "other model"))[1]
    if name not in PIPELINES or unet not in UNETS:
        raise ValueError(
            f"{model} is a {name} of a {unet}; MODEL must be a {' or '.join(PIPELINES)} of a UNet2DModel."
        )
    diffusers.utils.logging.disable_progress_bar()
    pipe = GeniePipeline.from_pretrained(model)
    if "beta_schedule" not in pipe.scheduler.config:
        raise ValueError(f"{model} has a {type(pipe.scheduler).__name__}, which has no `beta_schedule`.")
    if derivative_head is not None:
        config = load_config(DerivativeHead, derivative_head, "head")
        if config.get("_class_name") not in ("DerivativeHead", "StepHead"):
            raise ValueError(
                f"{derivative_head} is a {config.get('_class_name')}, neither a DerivativeHead nor a StepHead."
            )
        pipe = GeniePipeline(GenieUNet2DModel.from_unet(pipe.unet, derivative_head), pipe.scheduler)
    try:
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # no such device; torch built without it
        raise bad_option("--device", f"{device!r} cannot be used: {str(error).splitlines()[0]}.") from None


def load_config(component: type[ConfigMixin], name: str, kind: str) -> dict[str, Any]:
    try:
        return component.load_config(name)
    except OSError:
        file = component.config_name
        raise ValueError(f"{name} is neither a folder with a {file} nor a {kind} to load from the Hub.") from None


def draw(pipe: GeniePipeline, config: Mapping[str, Any], sampler: Sampler, pictures: Pictures, **options) -> Drawn:
    """Draw the pictures with a sampler made from the configuration and `options`."""
    label, scheduler_class = SCHEDULERS[sampler.name]
    notes = [sampler.grid] if sampler.grid else []
    notes += [f"{key}={value}" for key, value in sampler.options.items()]
    # Others' keys would be warned about, and `None` is not every scheduler's word for its default.
    known = {*signature(scheduler_class).parameters, "_class_name", "_use_default_values"}
    config = {key: value for key, value in config.items() if key in known and value is not None}
    if scheduler_class is ExponentialMultistepScheduler:
        options["solver"] = sampler.name
    options |= {**grid_options(scheduler_class, sampler.grid), **sampler.options}
    pipe.scheduler = scheduler_class.from_config(config, **options)
    if scheduler_class is GenieScheduler:
        head = getattr(pipe.unet, "derivative_head", None) if sampler.name == "genie" else None
        if isinstance(head, StepHead) and sampler.grid:
            raise ValueError("A step head has timesteps of its own: leave out the grid, or use genie-history.")
        pipe.scheduler.attach(None if head is None else pipe.unet)
        notes.insert(0, "history" if head is None else "step head" if isinstance(head, StepHead) else "head")
    label += f" ({', '.join(notes)})" if notes else ""
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)
    calls: list[None] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
    try:
        latents = pipe(
            batch_size=len(pictures.seeds),
            class_labels=pictures.labels,
            guidance_scale=pictures.guidance,
            num_inference_steps=sampler.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in pictures.seeds],
            output_type="latent",
            return_dict=False,
        )[0]
    finally:
        hook.remove()
    table = getattr(pipe.scheduler, "table", None)
    noisy = sampler.name in STOCHASTIC or (table is not None and any(row.get(("noise", 0)) for row in table.rows))
    return Drawn(label, latents, len(calls), noisy)


def grid_options(scheduler_class: type, grid: str | None) -> dict[str, Any]:
    """The configuration that makes a scheduler call the model on this time grid."""
    if grid is None:
        return {}
    known = signature(scheduler_class).parameters
    if "time_grid" in known:
        return {"time_grid": grid, "tables": None}  # which have timesteps of their own
    flags = {name: flag for flag, name in reversed(SIGMA_FLAGS.items()) if flag in known}
    spacings = TIMESTEP_SPACINGS if "timestep_spacing" in known else ()
    if grid in spacings:
        return {**dict.fromkeys(flags.values(), False), "timestep_spacing": grid}
    if grid not in flags:
        there = ", ".join([*flags, *spacings]) or "none"
        raise ValueError(f"{scheduler_class.__name__} of diffusers has no time grid {grid!r}; those it has: {there}.")
    return {**dict.fromkeys(flags.values(), False), flags[grid]: True}


def choose(pipe: GeniePipeline, classes: str | None, batch_size: int | None, seed: int, guidance: float) -> Pictures:
    num_classes = pipe.unet.config.num_class_embeds
    labels = None if classes is None else parse_integers(classes, "--classes")
    count = batch_size or (len(labels) if labels else 8)
    if labels is None and num_classes is not None:
        labels = [i % max(1, num_classes - 1) for i in range(count)]  # all but the null class
    elif labels is not None and len(labels) == 1:
        labels = labels * count
    return Pictures(labels, list(range(seed, seed + count)), guidance)


def relative_distance(samples: torch.Tensor, reference: torch.Tensor) -> float:
    return float(((samples - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean())


def picture_grid(images: list[Image.Image]) -> Image.Image:
    """The images in rows, enlarged by a whole factor until each has at least 128 pixels a side."""
    factor = math.ceil(128 / min(images[0].size))
    images = [image.resize([factor * side for side in image.size], Image.Resampling.NEAREST) for image in images]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new(images[0].mode, images[0].size, "white")
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows, columns)


def parse_integers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise bad_option(option, f"must be integers separated by commas, such as 1,2,3; got {text!r}.") from None


def parse_samplers(text: str, steps: Sequence[int], grid: str | None, option: str) -> list[Sampler]:
    """
    `"genie:quadratic?interpolation_order=2@10,ddim"` → samplers; `steps` and `grid` are for those that do not say.
    """
    samplers = []
    for part in re.split(r",(?![^(]*\))", text):  # not at the comma of beta(0.5,0.7)
        match = re.fullmatch(r"([^:?@]+)(?::([^:?@]+))?(?:\?([^:?@]+))?(?:@(\d+))?", part.strip())
        if match is None:
            form = "NAME[:GRID][?KEY=VALUE][@STEPS], such as genie:quadratic?method=taylor@10"
            raise bad_option(option, f"must be {form}; got {part!r}.")
        name, own_grid, options, own_steps = match.groups()
        if name not in SCHEDULERS:
            raise bad_option(option, f"must be one of {', '.join(SCHEDULERS)}; got {name!r}.")
        counts = [int(own_steps)] if own_steps else steps
        chosen = parse_options(options or "", SCHEDULERS[name][1], option)
        samplers += [Sampler(name, own_grid or grid, count, chosen) for count in counts]
    return samplers


def parse_options(text: str, scheduler_class: type, option: str) -> dict[str, Any]:
    """`"solver_order=3&lower_order_final=false"` → configuration keys of a scheduler and their values."""
    known, options = signature(scheduler_class).parameters, {}
    for pair in filter(None, text.split("&")):
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            name = scheduler_class.__name__
            raise bad_option(option, f"must have KEY=VALUE of {name} after ?: {', '.join(known)}; got {pair!r}.")
        words = {"true": True, "false": False, "none": None}
        try:
            options[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def check_output(output: Path):
    if output.suffix != ".png" or not output.parent.is_dir():
        raise bad_option("--output", f"must be a .png file in a folder that exists; got {output}.")


def bad_option(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)

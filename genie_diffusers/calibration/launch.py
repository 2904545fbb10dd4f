"""
Calibrate a pipeline of the Hub or of a folder, in one process or several.

    genie-diffusers calibrate MODEL --prompts prompts.txt --steps 4,6,8,10 --set guidance_scale=5 --output_dir sampler
    accelerate launch -m genie_diffusers.calibration MODEL ...

Each process draws its share of the prompts, and all of them solve the same systems: the sampler does not depend on how
many there are. A run that was killed goes on from what is in `--output_dir`.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder
from packaging.version import Version

import genie_diffusers

from ..model_card import create_model_card, standalone_usage
from ..schedulers.scheduling_genie import GenieScheduler
from .calibrator import MAX_NUMBERS, Calibration
from .recording import SCALES, per_path, split_inputs
from .report import PEERS, held_out_errors, pictures, plot, table_of_errors

#: columns of a data set that prompts are looked for in
PROMPT_COLUMNS = ("prompt", "text", "caption", "Prompt")


def parser() -> argparse.ArgumentParser:
    """The arguments of both commands."""
    found = argparse.ArgumentParser(
        prog="genie-diffusers calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("model", help="Folder or Hub id of a pipeline.")
    add(
        "--prompts",
        help="A text file with a prompt on each line, or a data set with a column of them: one for a path.",
    )
    add(
        "--num_paths",
        type=int,
        help="Use the first of the prompts; without prompts, draw so many. Default: all, or 8.",
    )
    add("--held_out", type=int, default=4, help="Do not fit the last of the paths, state errors on them; 0 for none.")
    add("--steps", type=integers, default=[4, 6, 8, 10], help="Numbers of model calls, separated by commas.")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="An input of the pipeline's call, as JSON or text: guidance_scale=5. A list has one for each path.",
    )
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add("--variant", help="Of the weights' files, as in `from_pretrained`: fp16.")
    add("--offload", choices=["model", "sequential"], help="Keep on the device only what is at work.")
    add("--seed", type=int, default=0, help="Of the noise of the first path; the next one has the next seed.")
    add("--teacher_steps", type=int, default=60, help="Model calls of the recorded run.")
    add(
        "--refinements",
        type=int,
        default=1,
        help="How often all rows are moved together; 0 takes a quarter of the time.",
    )
    add("--max_batch_size", type=int, help="The most paths in a call of the pipeline. Default: all.")
    add(
        "--max_numbers",
        type=int,
        default=MAX_NUMBERS,
        help="Record a random part of so many numbers of a larger sample.",
    )
    add("--output_dir", type=Path, default=Path("sampler"), help="Where the sampler, its card and the recording go.")
    add("--standalone", action="store_true", help="Write a sampler that loads without genie_diffusers too.")
    add("--push_to_hub", action="store_true", help="Publish the sampler and its card.")
    add("--hub_model_id", help="Where to. Default: the name of `--output_dir`.")
    return found


def integers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main(argv: Sequence[str] | None = None, program: str = "accelerate launch -m genie_diffusers.calibration"):
    """Run the command; `ValueError` for what cannot be."""
    from accelerate import Accelerator

    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(arguments)
    accelerator = Accelerator()
    inputs = inputs_of(args)
    pipe = load(args, accelerator)
    fitted, held_out, num_paths = split(pipe, inputs, args.num_paths, args.held_out)
    calibration = Calibration(
        pipe,
        args.steps,
        seed=args.seed,
        num_paths=num_paths,
        teacher_steps=args.teacher_steps,
        refinements=args.refinements,
        max_batch_size=args.max_batch_size,
        max_numbers=args.max_numbers,
        output_dir=args.output_dir,
        accelerator=accelerator,
        **fitted,
    )
    scheduler = calibration.run()
    if accelerator.is_main_process:
        command = " ".join([program, *(shlex.quote(publishable(one)) for one in arguments)])
        publish(calibration, scheduler, held_out, args, command)
    accelerator.end_training()
    return scheduler


def publishable(argument: str) -> str:
    """Folders of this computer are shown by name only."""
    return f"path/to/{Path(argument).name}" if Path(argument).is_absolute() else argument


def inputs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The inputs that the command line names."""
    inputs: dict[str, Any] = {}
    for given in args.set:
        name, separator, value = given.partition("=")
        if not separator:
            raise ValueError(f"`--set` must be NAME=VALUE, got {given!r}.")
        try:
            inputs[name] = json.loads(value)
        except json.JSONDecodeError:
            inputs[name] = value
    if args.prompts is not None:
        if "prompt" in inputs:
            raise ValueError("`prompt` must come from `--prompts` or from `--set`, not from both.")
        inputs["prompt"] = prompts_of(args.prompts, args.num_paths)
    return inputs


def prompts_of(name: str, count: int | None) -> list[str]:
    """The prompts in a text file or a data set, the first `count` of them."""
    if Path(name).is_file():
        prompts = [line.strip() for line in Path(name).read_text().splitlines() if line.strip()]
    else:
        if Path(name).suffix in (".txt", ".csv", ".json") or name.startswith((".", "/")):
            raise ValueError(f"`--prompts` must be a text file that exists or a data set, got {name!r}.")
        try:
            from datasets import load_dataset
        except ModuleNotFoundError:
            raise ValueError(
                f"`--prompts` must be a text file with a prompt on each line, got {name!r}; to read a data set, "
                "install the extra `train`."
            ) from None
        data = load_dataset(name, split="train")
        column = next((one for one in PROMPT_COLUMNS if one in data.column_names), None)
        if column is None:
            raise ValueError(
                f"`--prompts` must have a column of {', '.join(PROMPT_COLUMNS)}, {name!r} has {data.column_names}."
            )
        prompts = list(data[:count][column]) if count else list(data[column])
    if count is not None and len(prompts) < count:
        raise ValueError(
            f"`--prompts` must have {count} prompts for `--num_paths={count}`, {name!r} has {len(prompts)}."
        )
    return prompts[:count]


def load(args: argparse.Namespace, accelerator) -> DiffusionPipeline:
    """The pipeline, in its dtype, where it will run."""
    # the name of the argument has changed
    name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    options = {name: getattr(torch, args.dtype)}
    options |= {} if args.variant is None else {"variant": args.variant}
    index = DiffusionPipeline.load_config(args.model)
    # pipelines of ours load by their own class
    loader = getattr(genie_diffusers, str(index.get("_class_name")), DiffusionPipeline)
    pipe = loader.from_pretrained(args.model, **options)
    if args.offload is None:
        return pipe.to(accelerator.device)
    offload = {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}
    offload[args.offload](device=accelerator.device)
    return pipe


def split(
    pipe: DiffusionPipeline, inputs: dict[str, Any], num_paths: int | None, held_out: int
) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """The inputs of the paths that are fitted, those of the paths that are held out, and how many are fitted."""
    lists = per_path(pipe, inputs)
    if not lists:
        return inputs, inputs, num_paths
    name, count = next((name, len(value)) for name, value in lists.items())
    if num_paths is not None and num_paths > count:
        raise ValueError(f"`--num_paths` must be at most the {count} of `{name}`, got {num_paths}.")
    count = count if num_paths is None else num_paths
    if held_out >= count:
        raise ValueError(
            f"`--held_out` must leave a path to fit, got {held_out}, and {count} of `{name}`: `--held_out 0` fits all."
        )
    fitted = {name: value[: count - held_out] if name in lists else value for name, value in inputs.items()}
    rest = {name: value[count - held_out : count] if name in lists else value for name, value in inputs.items()}
    return fitted, rest, None


def publish(calibration: Calibration, scheduler: GenieScheduler, held_out: dict[str, Any], args, command: str):
    """Write the sampler, what it is worth and its card, and put them on the Hub if asked."""
    folder, pipe = args.output_dir, calibration.pipe
    scheduler.save_pretrained(folder, **({"standalone": True} if args.standalone else {}))
    facts: dict[str, Any] = {
        "Pipeline": type(pipe).__name__,
        "Learned for": ", ".join(f"{n} calls ({fit.grid} grid)" for n, fit in calibration.fits.items()),
        "Paths": f"{calibration.num_paths}, seeds from {args.seed}",
        "Inputs": ", ".join(f"`{n}={shown_as(n, v)}`" for n, v in calibration.inputs.items()) or "none",
        "Recorded run": f"{args.teacher_steps} calls, {calibration.teacher_error:.3g} from one of half as many",
        "Error of the fitted paths": ", ".join(f"{fit.error:.3g}" for fit in calibration.fits.values()),
        "Model calls": f"{calibration.calls} of a batch of {len(calibration.batches[0])}",
        "Versions": f"diffusers {diffusers.__version__}, torch {torch.__version__}",
    }
    shown, errors = {}, {}
    if args.held_out:
        count, first = None if per_path(pipe, held_out) else args.held_out, calibration.num_paths
        _, batches = split_inputs(pipe, held_out, count, args.seed, args.max_batch_size, first=first)
        errors = held_out_errors(calibration, scheduler, batches)
        (folder / "errors.json").write_text(
            json.dumps({name: {n: v.tolist() for n, v in row.items()} for name, row in errors.items()}, indent=2)
            + "\n"
        )
        if plot(errors, folder / "errors.png"):
            shown["errors.png"] = "Relative distance to the converged run, on paths that were not fitted."
        peers = [name for name in errors if name in PEERS]
        caption = pictures(calibration, scheduler, peers, batches[0], folder / "pictures.png")
        if caption is not None:
            shown["pictures.png"] = caption
        table = table_of_errors(errors)
        print(f"Relative error on {args.held_out} paths that were not fitted:\n{table}")
    name = args.hub_model_id or folder.name
    described = (
        f"A sampler learned by `genie_diffusers.calibrate` for "
        f"{calibration.pipe.config.get('_name_or_path') if not Path(args.model).exists() else 'a local pipeline'}: "
        "where to call the model, and what to weigh in each step. The weights of the model are untouched."
    )
    if errors:
        described += (
            f"\n\nRelative distance to a converged run from the same noise, mean of {args.held_out} paths that were "
            f"not fitted, every sampler as its configuration has it:\n\n{table}"
        )
    create_model_card(
        name,
        described,
        usage=usage_of(name, args, calibration),
        facts=facts,
        command=command,
        pictures=shown,
        base_model=None if Path(args.model).exists() else args.model,
        pipeline_tag="text-to-image" if "prompt" in calibration.inputs else "unconditional-image-generation",
    ).save(folder / "README.md")
    if args.push_to_hub:
        url = create_repo(name, exist_ok=True)
        upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=["recording/*", "table-*.json"])
    print(f"The sampler of {', '.join(map(str, calibration.steps))} calls is in {folder}.")


def shown_as(name: str, value: Any) -> str:
    """An input, as a table shows it."""
    return f"[{len(value)} of them]" if isinstance(value, list) and name not in SCALES else str(value)


def usage_of(name: str, args: argparse.Namespace, calibration: Calibration) -> str:
    """The code that loads the sampler."""
    model = "path/to/model" if Path(args.model).exists() else args.model
    inputs = {n: (v[0] if isinstance(v, list) else v) for n, v in calibration.inputs.items()}
    given = "".join(f"{n}={v!r}, " for n, v in inputs.items())
    call = f"pipe({given}num_inference_steps={max(calibration.steps)})"
    own = type(calibration.pipe).__name__ if hasattr(genie_diffusers, type(calibration.pipe).__name__) else None
    if args.standalone:
        usage = standalone_usage(name, model, call=call)
        if own is None:
            return usage
        imports = f"from diffusers import AutoModel\nfrom genie_diffusers import {own}"
        usage = usage.replace("from diffusers import AutoModel, DiffusionPipeline", imports)
        return usage.replace("DiffusionPipeline.from_pretrained", f"{own}.from_pretrained")
    pipeline = own or "DiffusionPipeline"
    lines = [
        *([] if own else ["from diffusers import DiffusionPipeline"]),
        f"from genie_diffusers import {', '.join(sorted([*([own] if own else []), 'GenieScheduler']))}",
        "",
        f'pipe = {pipeline}.from_pretrained("{model}")',
        f'pipe.scheduler = GenieScheduler.from_pretrained("{name}")',
        f"image = {call}.images[0]",
    ]
    return "\n".join(lines)

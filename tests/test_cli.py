import json
import re
import sys

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils.import_utils import is_torchsde_available
from PIL import Image
from typer.testing import CliRunner

from genie_diffusers import DerivativeHead, GeniePipeline, GenieScheduler, GenieUNet2DModel
from genie_diffusers.cli import SCHEDULERS, app

#: the last one is the null class
CLASSES = 4
# diffusers' own, with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of one tiny random UNet: as a plain pipeline, as a GENIE pipeline with a head, and the head alone."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=CLASSES,
        )
        without_classes = UNet2DModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
        )
    scheduler = DDPMScheduler(timestep_spacing="trailing", clip_sample=False)
    head = DerivativeHead.for_unet(unet, scheduler.config)
    with torch.no_grad():
        head.conv_out.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
    head.save_pretrained(folder / "head")
    DDPMPipeline(unet, scheduler).save_pretrained(folder / "ddpm")
    DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config)).save_pretrained(folder / "ddim")
    DDPMPipeline(without_classes, scheduler).save_pretrained(folder / "unconditional")
    with_head = GenieUNet2DModel.from_unet(unet, head)
    GeniePipeline(with_head, GenieScheduler.from_config(scheduler.config)).save_pretrained(folder / "genie")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    return run


def rows(output):
    """What `compare` printed: [(sampler, model calls, distance)]."""
    found = re.findall(r"^(.+?) +(\d+) calls  (?:distance (\S+)|stochastic)$", output, re.MULTILINE)
    return [(name, int(calls), float(distance) if distance else None) for name, calls, distance in found]


@pytest.mark.parametrize("model", ["ddpm", "ddim", "genie"])
def test_sample_writes_the_pictures_of_the_pipeline_enlarged(models, run, model):
    output = run("sample", models / model, "--steps", 3, "--classes", "2,0,1", "--guidance", 2, "--seed", 5)
    pipe = GeniePipeline.from_pretrained(models / model)
    pipe.scheduler = GenieScheduler.from_config(pipe.scheduler.config)
    if model == "genie":
        pipe.scheduler.attach(pipe.unet)
    generator = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    images = pipe(class_labels=[2, 0, 1], guidance_scale=2, num_inference_steps=3, generator=generator).images
    grid = Image.open("grid.png")
    assert grid.size == (256, 256)
    for image, corner in zip(images, [(0, 0), (128, 0), (0, 128)], strict=True):
        tile = grid.crop((*corner, corner[0] + 128, corner[1] + 128))
        assert tile.tobytes() == image.resize((128, 128), Image.Resampling.NEAREST).tobytes()
    assert "3 model calls" in output


def test_pictures_follow_from_the_seed(models, run):
    for seed, name in ((0, "a.png"), (0, "b.png"), (1, "c.png")):
        run("sample", models / "ddpm", "--scheduler", "ddpm", "--steps", 2, "--seed", seed, "--output", name)
    first, again, other = (Image.open(name).tobytes() for name in ("a.png", "b.png", "c.png"))
    assert first == again != other


def test_a_head_from_its_own_folder_does_what_it_does_inside_the_unet(models, run):
    inside = run("sample", models / "genie", "--output", "inside.png")
    added = run("sample", models / "ddpm", "--derivative-head", models / "head", "--output", "added.png")
    without = run("sample", models / "genie", "--scheduler", "genie-history", "--output", "without.png")
    assert "GENIE (head)" in inside and "GENIE (head)" in added and "GENIE (history)" in without
    pictures = [Image.open(f"{name}.png").tobytes() for name in ("inside", "added", "without")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_model_without_classes_is_sampled_without(models, run):
    assert "8 pictures" in run("sample", models / "unconditional", "--steps", 1)
    run("sample", models / "unconditional", "--classes", "0", code=1)
    assert len(rows(run("compare", models / "unconditional", "--reference-steps", 2, "--batch-size", 1))) == 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples(models, run, name):
    if name == "dpm++sde" and not is_torchsde_available():
        assert "torchsde" in run("sample", models / "ddpm", "--scheduler", name, code=1)
        return
    output = run("sample", models / "ddpm", "--scheduler", name, "--steps", 5, "--batch-size", 1)
    assert "1 pictures" in output


def test_compare_counts_calls_of_the_model_not_steps(models, run):
    output = run("compare", models / "genie", "--schedulers", "heun,genie,ddim@7", "--steps", "3,4", "--batch-size", 1)
    assert [(name, calls) for name, calls, _ in rows(output)] == [
        ("Heun", 5),
        ("Heun", 7),
        ("GENIE (head)", 3),
        ("GENIE (head)", 4),
        ("DDIM", 7),
    ]


def test_compare_measures_the_distance_to_the_converged_solution(models, run):
    output = run(
        "compare", models / "genie", "--schedulers", "genie-history:linear@100,ddim,dpm++", "--steps", "5,50",
        "--reference-steps", 100, "--batch-size", 2,
    )  # fmt: skip
    itself, ddim_5, ddim_50, dpm_5, dpm_50 = [distance for *_, distance in rows(output)]
    assert itself == 0
    assert ddim_5 > 2 * ddim_50 > 0 and dpm_5 > 2 * dpm_50 > 0


def test_compare_turns_clipping_off(models, run, tmp_path):
    pipe = DDPMPipeline.from_pretrained(models / "ddpm")
    pipe.scheduler.register_to_config(clip_sample=True, clip_sample_range=0.1)
    pipe.save_pretrained(tmp_path / "clipping")
    arguments = ("--schedulers", "ddim,genie", "--steps", 3, "--reference-steps", 5, "--batch-size", 1)
    assert rows(run("compare", tmp_path / "clipping", *arguments)) == rows(run("compare", models / "ddpm", *arguments))


def test_compare_draws_every_row_from_the_same_noise_on_its_own_grid(models, run):
    output = run(
        "compare", models / "ddpm", "--schedulers", "euler,ddim,unipc:karras,unipc:trailing,genie:quadratic,ddpm",
        "--steps", "100", "--reference-steps", 100, "--batch-size", 1,
    )  # fmt: skip
    names, _, distances = zip(*rows(output), strict=True)
    assert names[2:5] == ("UniPC (karras)", "UniPC (trailing)", "GENIE (history, quadratic)")
    assert all(distance < 0.1 for distance in distances[:5]) and distances[2] != distances[3]
    assert distances[5] is None
    with Image.open("compare.png") as picture:
        assert picture.height > 6 * 128


def test_sampler_grid_and_options_are_choices_of_their_own(models, run):
    output = run(
        "compare", models / "ddpm", "--schedulers",
        "genie:beta57?method=taylor@3,quasi-taylor:beta(0.5,0.7)@3,unipc:exponential?solver_order=3&predict_x0=false,"
        "res_2m:beta57",
        "--steps", "4", "--reference-steps", 2, "--batch-size", 1,
    )  # fmt: skip
    assert [(name, calls) for name, calls, _ in rows(output)] == [
        ("GENIE (history, beta57, method=taylor)", 3),
        ("Quasi-Taylor (beta(0.5,0.7))", 3),
        ("UniPC (exponential, solver_order=3, predict_x0=False)", 4),
        ("res_2m (beta57)", 4),
    ]
    both = [run("sample", models / "ddpm", "--scheduler", name, "--steps", 4, "--output", f"{i}.png")
            for i, name in enumerate(("dpm++:karras", "dpm++?use_karras_sigmas=true", "dpm++"))]  # fmt: skip
    assert "DPM-Solver++ (karras), 4 model calls" in both[0]
    pictures = [Image.open(f"{i}.png").tobytes() for i in range(3)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_analytic_solvers_have_names_grids_and_noise(models, run):
    output = run(
        "compare", models / "ddpm", "--schedulers", "res_2m:beta57,unipc_2,unipc,dpmpp_2m_sde,res_2m?eta=0.5",
        "--steps", "5", "--reference-steps", 50, "--batch-size", 1,
    )  # fmt: skip
    found = rows(output)
    names = ["res_2m (beta57)", "unipc_2", "UniPC", "dpmpp_2m_sde", "res_2m (eta=0.5)"]
    assert [(name, calls) for name, calls, _ in found] == [(name, 5) for name in names]
    distances = [distance for *_, distance in found]
    assert distances[1] == pytest.approx(distances[2], abs=1e-3)  # diffusers' own is the same solver
    assert distances[0] is not None and distances[3:] == [None, None]


def test_info_says_what_the_checkpoint_is(models, run, tmp_path):
    output = run("info", models / "genie")
    for fact in ("GenieUNet2DModel", "3 × 8 × 8", "epsilon", "linear betas, 1000 timesteps", "-5.06 to 4.61"):
        assert fact in output
    head = DerivativeHead.from_pretrained(models / "head")
    size = sum(parameter.numel() for parameter in head.parameters())
    assert f"width 8, {size:,} parameters" in output and "distilled from these weights" in output
    assert re.search(r"Head +none", run("info", models / "ddpm"))

    pipe = GeniePipeline.from_pretrained(models / "genie")
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.add_(weight.std() * torch.linspace(-1, 1, weight.numel()).view_as(weight))
    pipe.save_pretrained(tmp_path / "tuned")
    assert "distilled from other weights" in run("info", tmp_path / "tuned")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sample", "{models}/ddpm", "--scheduler", "nope"], 2, "--scheduler: must be one of genie,"),
        (["sample", "{models}/ddpm", "--classes", "0,b"], 2, "--classes: must be integers"),
        (["sample", "{models}/ddpm", "--classes", "9"], 1, "`class_labels` must be between 0 and 3"),
        (["sample", "{models}/ddpm", "--output", "nowhere/grid.png"], 2, "--output: must be a .png file in a folder"),
        (["sample", "{models}/ddpm", "--device", "abacus"], 2, "--device: 'abacus' cannot be used"),
        (["sample", "{models}/ddpm", "--steps", "1001"], 1, "must be between 1 and 1000"),
        (["sample", "{models}/ddpm", "--grid", "hexagonal"], 1, "`time_grid` must be one of None, linear,"),
        (
            ["sample", "{models}/ddpm", "--derivative-head", "{models}/ddpm/unet"],
            1,
            "is a UNet2DModel, neither a DerivativeHead nor",
        ),
        (["sample", "{models}/unconditional", "--derivative-head", "{models}/head"], 1, "needs a UNet with"),
        (["sample", "{models}/nothing"], 1, "neither a folder with a model_index.json nor a pipeline"),
        (["info", "{models}/ddpm/unet"], 1, "neither a folder with a model_index.json nor a pipeline"),
        (["compare", "{models}/ddpm", "--schedulers", "ddim@"], 2, "--schedulers: must be NAME[:GRID][?KEY"),
        (["compare", "{models}/ddpm", "--schedulers", "ddim,euler@"], 2, "got 'euler@'"),
        (["sample", "{models}/ddpm", "--scheduler", "ddim,euler"], 2, "--scheduler: must be one, got 'ddim,euler'"),
        (["sample", "{models}/ddpm", "--scheduler", "unipc?order=3"], 2, "solver_order, prediction_type"),
        (["sample", "{models}/ddpm", "--scheduler", "genie?method=hermit"], 1, "must be one of hermite, taylor"),
        (["compare", "{models}/ddpm", "--schedulers", "ddim:karras"], 1, "those it has: linspace, leading"),
        (
            ["compare", "{models}/ddpm", "--schedulers", "unipc:beta57"],
            1,
            "UniPCMultistepScheduler of diffusers has no",
        ),
        (["sample", "{models}/ddpm", "--scheduler", "unipc_2?eta=1"], 1, "`eta` must be"),
        (["compare", "{models}/ddpm", "--schedulers", "genie:ays"], 1, "noise levels σ/α of Stable Diffusion"),
    ],
)
def test_a_mistake_is_answered_by_one_sentence(models, run, arguments, code, message):
    output = run(*(argument.format(models=models) for argument in arguments), code=code)
    assert message in output.splitlines()[-1] and "Traceback" not in output


def test_other_pipelines_are_refused(run, tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "is a StableDiffusionPipeline of a UNet2DConditionModel" in run("info", tmp_path, code=1)


def test_without_matplotlib_compare_says_what_to_install(models, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'genie-diffusers[cli]'" in run("compare", models / "ddpm", code=1)

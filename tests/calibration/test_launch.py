"""The command: `genie-diffusers calibrate`, and the same under `accelerate launch`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from genie_diffusers import GeniePipeline, GenieScheduler
from genie_diffusers.calibration.launch import inputs_of, main, parser, prompts_of, split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A class-conditional pipeline on disk, of a random network that bends its paths."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        num_class_embeds=5,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    path = tmp_path_factory.mktemp("model")
    config = {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "trailing"}
    GeniePipeline(unet, DDIMScheduler(**config)).save_pretrained(path)
    return path


ARGUMENTS = ["--steps", "3,4", "--teacher_steps", "20", "--refinements", "0", "--set", "guidance_scale=2"]
CLASSES = ["--set", "class_labels=[0,1,2,3,0,1]", "--held_out", "2"]


def test_a_model_in_a_folder_gets_a_sampler_with_a_card(folder, tmp_path):
    result = tmp_path / "sampler"
    main([str(folder), *ARGUMENTS, *CLASSES, "--output_dir", str(result)], "genie-diffusers calibrate")
    scheduler = GenieScheduler.from_pretrained(result)
    assert set(scheduler.config.tables) == {"3", "4"}
    assert scheduler.config.tables["3"]["learned_for"]["guidance_scale"] == 2
    card = (result / "README.md").read_text()
    assert "genie-diffusers calibrate path/to/" in card and "not fitted" in card and "UniPC" in card
    assert "GeniePipeline.from_pretrained" in card and str(folder) not in card
    assert (result / "errors.png").exists() and (result / "pictures.png").exists()
    errors = json.loads((result / "errors.json").read_text())
    assert {"calibrated", "GenieScheduler, not calibrated", "UniPC"} <= set(errors)
    assert len(errors["calibrated"]["3"]) == 2
    # what was measured is what a user gets
    pipe = GeniePipeline.from_pretrained(folder)
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(4 + i) for i in range(2)]
    call = {"class_labels": [0, 1], "guidance_scale": 2, "generator": generators, "output_type": "latent"}
    found = pipe(num_inference_steps=3, **call)[0]
    pipe.scheduler = GenieScheduler.from_config(scheduler.config, tables=None, time_grid="uniform_lambda")
    generators[:] = [torch.Generator().manual_seed(4 + i) for i in range(2)]
    reference = pipe(num_inference_steps=200, **call)[0]
    distance = (found - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    np.testing.assert_allclose(distance.numpy(), errors["calibrated"]["3"], rtol=0.1)


def test_a_standalone_sampler_says_how_it_loads(folder, tmp_path):
    result = tmp_path / "sampler"
    main([str(folder), *ARGUMENTS, *CLASSES[:2], "--held_out", "0", "--standalone", "--output_dir", str(result)])
    assert "trust_remote_code=True" in (result / "README.md").read_text()
    assert (result / "config.json").exists() and not (result / "errors.json").exists()


def test_prompts_come_from_a_file_which_must_have_enough(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na dog\n a bird \n")
    assert prompts_of(str(path), None) == ["a cat", "a dog", "a bird"]
    assert prompts_of(str(path), 2) == ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"must have 5 prompts for `--num_paths=5`, .* has 3"):
        prompts_of(str(path), 5)
    args = parser().parse_args(
        ["model", "--prompts", str(path), "--set", "height=64", "--set", "negative_prompt=ugly"]
    )
    assert inputs_of(args) == {"prompt": ["a cat", "a dog", "a bird"], "height": 64, "negative_prompt": "ugly"}


def test_what_is_wrong_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="`--set` must be NAME=VALUE, got 'height'"):
        main([str(folder), "--set", "height"])
    with pytest.raises(ValueError, match="must leave a path to fit, got 4, and 2 of `class_labels`"):
        main([str(folder), "--set", "class_labels=[0,1]"])


@pytest.mark.slow
@pytest.mark.parametrize("batch", [[], ["--max_batch_size", "1"]])
def test_two_processes_learn_what_one_does(folder, tmp_path, batch):
    results = {}
    for count in (1, 2):
        results[count] = tmp_path / str(count)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", f"--num_processes={count}"]
        command += [
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "--num_machines=1",
            "-m",
            "genie_diffusers.calibration",
        ]
        command += [
            str(folder),
            *ARGUMENTS,
            *CLASSES,
            *batch,
            "--refinements",
            "1",
            "--output_dir",
            str(results[count]),
        ]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, run.stderr[-3000:]
    first, second = (GenieScheduler.from_pretrained(result).config.tables for result in results.values())
    for key, entry in first.items():
        assert entry["timesteps"] == second[key]["timesteps"]
        for row, other in zip(entry["rows"], second[key]["rows"], strict=True):
            for term in row:
                np.testing.assert_allclose(row[term], other[term], rtol=1e-3, atol=1e-4)


def test_lists_are_split_by_path(folder):
    pipe = GeniePipeline.from_pretrained(folder)
    inputs = {"class_labels": [0, 1, 2, 3], "guidance_scale": [1, 2]}
    fitted, rest, count = split(pipe, inputs, 3, 1)
    assert (
        fitted == {"class_labels": [0, 1], "guidance_scale": [1, 2]} and rest["class_labels"] == [2] and count is None
    )
    with pytest.raises(ValueError, match="one entry for each path, got 2 of `prompt`, 3 of `negative_prompt`"):
        split(pipe, {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, None, 1)
    with pytest.raises(ValueError, match="`--num_paths` must be at most the 4"):
        split(pipe, inputs, 5, 1)
    shared = {"prompt": ["a", "b", "c"], "controlnet_conditioning_scale": [0.5, 0.6]}
    assert split(pipe, shared, None, 1)[0] == {**shared, "prompt": ["a", "b"]}

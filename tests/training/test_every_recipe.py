"""What all recipes that learn have in common: the optimizer that is asked for, and scaled gradients."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel

from genie_diffusers import GeniePipeline
from genie_diffusers.learning import run as learning_run

#: what each needs besides the arguments of all
RECIPES = {
    "train_classifier": {"resolution": 8, "test_split": "train", "block_out_channels": 8},
    "train_diffusion": {"eval_batch_size": 2, "ddpm_num_inference_steps": 2},
    "train_dsno": {"num_inference_steps": 6, "fit_trajectories": 8, "validation_trajectories": 4},
    "train_encoding": {"num_inference_steps": "2", "validation_samples": 8},
    "train_genie_head": {"num_inference_steps": 2, "validation_samples": 8},
    "train_ggdm": {"num_inference_steps": "2", "fit_trajectories": 16, "train_trajectories": 8}
    | {"teacher_steps": 8, "validation_samples": 8},
    "train_step_head": {"table_steps": "2", "head_steps": "2", "teacher_steps": 8, "fit_trajectories": 8}
    | {"train_trajectories": 8, "validation_trajectories": 4},
}
OF_PICTURES = ("train_classifier", "train_diffusion", "train_encoding", "train_genie_head")
every_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def base(like_trained, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(like_trained(unet), DDPMScheduler()).save_pretrained(folder)
    return folder


def train(name: str, base, data, output_dir, *flags: str) -> None:
    named = {"output_dir": output_dir, "train_batch_size": 4, "max_train_steps": 2, "lr_warmup_steps": 0}
    named |= {"report_to": "none", "mixed_precision": "no", "max_grad_norm": 1e-3} | RECIPES[name]
    if name != "train_classifier":
        named["pretrained_model_name_or_path"] = base
    if name in OF_PICTURES:
        named |= {"dataset_name": data, "cache_dir": output_dir.parent / "cache"}
    AcceleratorState._reset_state(reset_partial_state=True)
    script = importlib.import_module(f"training.{name}")
    script.main(script.parse_args([*(str(part) for k, v in named.items() for part in (f"--{k}", v)), *flags]))


@pytest.mark.slow
@every_recipe
def test_gradients_are_unscaled_before_they_are_clipped(base, data, tmp_path, monkeypatch, name):
    """The loss is scaled in half precision, which accelerate offers on accelerators alone."""
    clip, norms = Accelerator.clip_grad_norm_, {}

    def unscale(self, optimizer=None):
        for prepared in self._optimizers:
            self.scaler.unscale_(prepared.optimizer)

    for kind, scaler in {"plain": None, "scaled": torch.amp.GradScaler("cpu", init_scale=65536.0)}.items():
        found = norms[kind] = []

        def start(scaler=scaler, **named):
            accelerator = Accelerator(**named)
            accelerator.scaler = scaler
            return accelerator

        def note(self, parameters, max_norm, found=found):
            found.append(float(clip(self, parameters, max_norm)))

        monkeypatch.setattr(learning_run, "Accelerator", start)
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", note)
        if scaler is not None:
            monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
        train(name, base, data, tmp_path / kind)
    assert len(norms["plain"]) == 2
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=1e-3)


@every_recipe
def test_the_8_bit_optimizer_is_used_if_it_is_asked_for(base, data, tmp_path, monkeypatch, name):
    class Built(Exception):
        pass

    def optimizer(parameters, **options):
        raise Built

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=optimizer)))
    with pytest.raises(Built):
        train(name, base, data, tmp_path / "with", "--use_8bit_adam")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`"):
        train(name, base, data, tmp_path / "without", "--use_8bit_adam")
    assert not (tmp_path / "without").exists(), "it is said before anything runs"

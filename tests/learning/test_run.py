import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from genie_diffusers.learning.arguments import add_training_arguments, launch_command
from genie_diffusers.learning.run import Run, RunLog, complete_checkpoints, computed_once, save_checkpoint


def parse(output_dir, **named) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    named = {"max_train_steps": 6, "report_to": "none", "output_dir": output_dir, "mixed_precision": "no"} | named
    return parser.parse_args([str(part) for name, value in named.items() for part in (f"--{name}", value)])


def start_of(args: argparse.Namespace) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Run(args)


def start(output_dir, **named) -> Run:
    return start_of(parse(output_dir, **named))


def fit(output_dir, loss=None, prepare=True, **named) -> torch.nn.Linear:
    """A run that moves a line to points drawn anew for each batch."""
    run = start(output_dir, **{"learning_rate": 0.1, "lr_warmup_steps": 0, "checkpointing_steps": 2} | named)
    model = torch.nn.Linear(2, 1)
    run.learn(model, prepare=prepare)

    def squared_error(step: int, part: int) -> torch.Tensor:
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(100 * step + part))
        return ((run.model if prepare else model)(x) - x.sum(1, keepdim=True)).square().mean()

    run.fit(lambda step, part: (loss or (lambda value, step: value))(squared_error(step, part), step), "A line")
    run.end()
    return model


def losses(output_dir: Path) -> list[float]:
    return [loss for _, loss, _ in RunLog.read(output_dir / "loss.csv")]


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", [True, False])
def test_a_resumed_run_ends_as_a_whole_one(tmp_path, prepare):
    constant = {"lr_scheduler": "constant", "prepare": prepare}
    whole = fit(tmp_path / "whole", **constant)
    fit(tmp_path / "resumed", max_train_steps=4, **constant)
    resumed = fit(tmp_path / "resumed", resume_from_checkpoint="latest", **constant)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_is_learned_ends_with_its_averaged_weights(tmp_path):
    model = fit(tmp_path, ema_max_decay=0.5)
    averaged = torch.load(tmp_path / "checkpoint-6" / "custom_checkpoint_1.pkl", weights_only=True)["shadow_params"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), averaged, strict=True))


@pytest.mark.parametrize("of_all_batches", [True, False])
def test_gradients_are_those_of_the_mean_however_it_is_accumulated(tmp_path, monkeypatch, of_all_batches):
    """Adam does not see their size, which clipping does."""
    found = []
    run = start(tmp_path, gradient_accumulation_steps=4, max_train_steps=1)
    clip = run.accelerator.clip_grad_norm_
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *args: found.append(float(clip(*args))))
    parameter = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor([1.0]))])
    run.learn(parameter, prepare=False)
    parts = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def loss(step: int, part: int) -> torch.Tensor:
        return (parameter[0] * (parts if of_all_batches else parts[part])).mean()

    run.fit(loss, "One number", of_all_batches=of_all_batches)
    assert found == pytest.approx([2.5])
    assert losses(tmp_path) == pytest.approx([2.5])


def test_what_is_not_used_in_a_step_stays_where_it_is(tmp_path):
    run = start(tmp_path, max_train_steps=3, adam_weight_decay=0.0)
    numbers = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1)) for _ in range(2)])
    run.learn(numbers, prepare=False)
    run.fit(lambda step, part: numbers[0].square().sum(), "Two numbers, of which one is used")
    assert numbers[0] != 1 and numbers[1] == 1


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_good_checkpoints(tmp_path, what):
    def spoil(value: torch.Tensor, step: int) -> torch.Tensor:
        if step < 4:
            return value
        return value * math.nan if what == "loss" else (value - value.detach()).sqrt()  # whose derivative is infinite

    with pytest.raises(FloatingPointError, match=rf"The {what} of step 4 is \w+\. Lower.*; checkpoint-2 in .* can be"):
        fit(tmp_path, spoil, checkpoints_total_limit=1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert len(losses(tmp_path)) == 3
    fit(tmp_path, resume_from_checkpoint="latest")
    assert len(losses(tmp_path)) == 6 and all(map(math.isfinite, losses(tmp_path)))


# --- what is refused before anything runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints_total_limit",
        "checkpointing_steps",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
    ],
)
def test_counts_are_at_least_one(tmp_path, name):
    with pytest.raises(ValueError, match=f"`--{name}` must be at least 1, got 0"):
        start(tmp_path / "run", **{name: 0})
    assert not (tmp_path / "run").exists()


def test_a_run_has_steps_left_to_do(tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match=r"`--max_train_steps` must be above the 6 steps that are done.*got 5"):
        start(tmp_path, resume_from_checkpoint="latest", max_train_steps=5)
    # Killed between its last checkpoint and its card, it has still to write its result.
    assert start(tmp_path, resume_from_checkpoint="latest").checkpoint == tmp_path / "checkpoint-6"
    (tmp_path / "README.md").write_text("A card")
    with pytest.raises(ValueError, match=r"`--max_train_steps` must be above the 6 steps that are done.*got 6"):
        start(tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"`--max_train_steps` must be above the 6 steps that are done.*got 6"):
        start(tmp_path / "elsewhere", resume_from_checkpoint=tmp_path / "checkpoint-6")


def test_the_8_bit_optimizer_is_that_of_bitsandbytes(tmp_path, monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    def with_flag(output_dir) -> Run:
        args = parse(output_dir)
        args.use_8bit_adam = True
        return start_of(args)

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit)))
    run = with_flag(tmp_path / "with")
    run.learn(torch.nn.Linear(2, 1))
    assert type(run.optimizer.optimizer) is AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`"):
        with_flag(tmp_path / "without")
    assert not (tmp_path / "without").exists()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def fake_accelerator(save_state) -> SimpleNamespace:
    return SimpleNamespace(
        is_main_process=True, num_processes=1, wait_for_everyone=lambda: None, save_state=save_state
    )


def save(folder: str) -> None:
    Path(folder).mkdir()
    (Path(folder) / "model").write_text("whole")


def test_checkpoint_that_was_not_finished_is_never_picked_up(tmp_path):
    args = parse(tmp_path, checkpoints_total_limit=1)
    save_checkpoint(fake_accelerator(save), args, 10)

    def killed_while_saving(folder):
        save(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(fake_accelerator(killed_while_saving), args, 20)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-10"]
    save_checkpoint(fake_accelerator(save), args, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]
    assert json.loads((tmp_path / "checkpoint-20" / "training_state.json").read_text())["step"] == 20


def test_rotation_counts_steps_as_numbers(tmp_path):
    args = parse(tmp_path, checkpoints_total_limit=2)
    for step in (5, 50, 500):
        save_checkpoint(fake_accelerator(save), args, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-50", "checkpoint-500"]


def test_resume_with_another_seed_or_batch_size_is_an_error(tmp_path):
    save_checkpoint(fake_accelerator(save), parse(tmp_path), 10)
    for changed in ({"seed": 1}, {"train_batch_size": 3}):
        args = parse(tmp_path, resume_from_checkpoint="latest", **changed)
        with pytest.raises(ValueError, match="A resumed run must have the"):
            start_of(args)


def test_resume_from_what_is_no_checkpoint_is_an_error(tmp_path):
    args = parse(tmp_path, resume_from_checkpoint=tmp_path / "partial-checkpoint")
    with pytest.raises(ValueError, match="must be `latest` or a complete folder"):
        start_of(args)


def test_new_run_beside_old_checkpoints_is_an_error(tmp_path):
    save_checkpoint(fake_accelerator(save), parse(tmp_path), 10)
    with pytest.raises(ValueError, match="`--output_dir` must hold no checkpoints"):
        start_of(parse(tmp_path))


# --- what is computed once -------------------------------------------------------------------------------------------


@pytest.fixture
def computed(tmp_path):
    """Calls `computed_once` with arguments, and notes how often it computes."""

    def call(**named) -> str:
        def compute(path):
            call.times += 1
            path.write_text(str(call.times))
            if named.get("killed"):
                raise KeyboardInterrupt

        args = argparse.Namespace(output_dir=tmp_path, **{"steps": [2, 3], "scale": 1.0} | named)
        return computed_once(args, "result.txt", ["steps", "scale"], compute).read_text()

    call.times = 0
    return call


def test_what_follows_from_the_same_arguments_is_computed_once(computed):
    assert computed() == "1"
    assert computed(another_argument=5) == "1"
    with pytest.raises(ValueError, match=r"`--scale` must be 1\.0, with which .*result\.txt was computed, got 2\.0"):
        computed(scale=2.0)
    with pytest.raises(ValueError, match=r"`--steps` must be \[2, 3\]"):
        computed(steps=[2])
    assert computed.times == 1


def test_what_was_killed_while_it_was_computed_is_computed_again(computed):
    with pytest.raises(KeyboardInterrupt):
        computed(killed=True, scale=3.0)
    assert computed() == "2"
    assert computed() == "2"


# --- what cards quote ------------------------------------------------------------------------------------------------


def test_the_command_is_that_of_a_script_or_of_a_module_and_shows_no_folder_of_this_computer(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/genie/training/train_x.py", "--output_dir", "/home/me/run one"])
    assert launch_command() == "accelerate launch training/train_x.py --output_dir 'path/to/run one'"
    monkeypatch.setattr(sys, "argv", ["/site-packages/genie_diffusers/recipes/train_x.py", "--seed", "1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="genie_diffusers.recipes.train_x"))
    assert launch_command() == "accelerate launch -m genie_diffusers.recipes.train_x --seed 1"

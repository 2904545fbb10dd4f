import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from safetensors.torch import load_file

from genie_diffusers import GeniePipeline, GenieScheduler
from genie_diffusers.learning.solutions import FACTS_FILE, DamagedShardError, Teacher, TrajectoryStream
from training import generate_trajectories

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A class-conditional model with random weights, as a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("base")
    GeniePipeline(unet, GenieScheduler()).save_pretrained(folder)
    return folder


def arguments(base, output_dir, **named) -> list[str]:
    named = {
        "pretrained_model_name_or_path": base,
        "output_dir": output_dir,
        "num_inference_steps": 8,
        "num_trajectories": 10,
        "shard_size": 4,
        "batch_size": 3,
        "label_dropout": 0.2,
    } | named
    return [str(part) for name, value in named.items() for part in (f"--{name}", value)]


def generate(base, output_dir, **named) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    generate_trajectories.main(generate_trajectories.parse_args(arguments(base, output_dir, **named)))


def contents(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def assert_same(folder: Path, other: Path, **tolerance) -> None:
    for found, expected in zip(contents(folder), contents(other), strict=True):
        assert found.keys() == expected.keys() == {"noise", "trajectory", "labels"}
        for name in found:
            torch.testing.assert_close(found[name], expected[name], **tolerance)


@pytest.fixture(scope="module")
def written(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "solutions"
    generate(base, folder)
    return folder


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards_hold_all_solutions_once(base, written):
    shards = contents(written)
    assert [len(shard["trajectory"]) for shard in shards] == [4, 4, 2]
    teacher = Teacher(generate_trajectories.parse_args(arguments(base, "unused")), CPU)
    noises = teacher.draw(list(range(10)), 0)
    assert torch.equal(torch.cat([shard["noise"] for shard in shards]), noises.noise)
    assert torch.equal(torch.cat([shard["labels"] for shard in shards]), noises.labels)
    states = torch.cat([shard["trajectory"] for shard in shards])
    torch.testing.assert_close(states, teacher.solve(noises), rtol=1e-4, atol=1e-4)
    facts = json.loads((written / FACTS_FILE).read_text())
    assert facts["solution_timesteps"] == teacher.solution_timesteps and facts["num_inference_steps"] == 8


def test_a_killed_run_goes_on_without_repeating_or_losing_a_solution(base, written, tmp_path, monkeypatch):
    solve, batches = Teacher.solve, []

    def solve_until_killed(self, noises):
        batches.append(len(noises))
        if len(batches) == 4:  # in the second shard
            raise KeyboardInterrupt
        return solve(self, noises)

    monkeypatch.setattr(Teacher, "solve", solve_until_killed)
    with pytest.raises(KeyboardInterrupt):
        generate(base, tmp_path / "solutions")
    assert [path.name for path in (tmp_path / "solutions").glob("*.safetensors")] == ["shard-00000.safetensors"]
    kept = (tmp_path / "solutions" / "shard-00000.safetensors").stat().st_mtime_ns
    batches[:] = [0] * 10
    generate(base, tmp_path / "solutions")
    assert batches[10:] == [3, 1, 2]  # the second and the third shard alone
    assert (tmp_path / "solutions" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert_same(tmp_path / "solutions", written, rtol=0, atol=0)
    generate(base, tmp_path / "solutions")
    assert len(batches) == 13


def test_more_can_be_asked_for_later(base, written, tmp_path):
    generate(base, tmp_path / "solutions", num_trajectories=6)
    assert len(TrajectoryStream(tmp_path / "solutions", seed=0)) == 6
    generate(base, tmp_path / "solutions")
    assert_same(tmp_path / "solutions", written, rtol=0, atol=0)


@pytest.mark.slow
def test_processes_share_the_shards(base, written, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = REPOSITORY / "training" / "generate_trajectories.py"
    run = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), *arguments(base, tmp_path / "solutions")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert_same(tmp_path / "solutions", written, rtol=1e-4, atol=1e-4)


@pytest.fixture
def damaged(base, tmp_path) -> Path:
    """The first shard has a changed byte, the last one is cut off."""
    folder = tmp_path / "damaged"
    generate(base, folder)
    first, last = (folder / f"shard-0000{i}.safetensors" for i in (0, 2))
    content = bytearray(first.read_bytes())
    content[-5] ^= 1
    first.write_bytes(content)
    last.write_bytes(last.read_bytes()[:-100])
    return folder


def test_damaged_shards_are_named_and_skipped_on_request(damaged, caplog):
    message = "shard-00000.safetensors is damaged: `.*` is not what was written; shard-00002.safetensors is damaged"
    with pytest.raises(DamagedShardError, match=message):
        TrajectoryStream(damaged, seed=0)
    stream = TrajectoryStream(damaged, seed=0, skip_damaged_shards=True)
    assert "2 shards are skipped" in caplog.text and "shard-00002" in caplog.text
    middle = load_file(damaged / "shard-00001.safetensors")
    assert len(stream) == 4
    assert torch.equal(stream.rows([0, 1, 2, 3])["trajectory"], middle["trajectory"])
    (damaged / "shard-00001.safetensors").unlink()
    with pytest.raises(DamagedShardError, match=r"No shard is left.*shard-00001\.safetensors is missing"):
        TrajectoryStream(damaged, seed=0, skip_damaged_shards=True)


def test_damaged_shards_are_drawn_again(base, damaged, written):
    generate(base, damaged)
    assert_same(damaged, written, rtol=0, atol=0)


def test_every_epoch_of_the_stream_has_all_solutions_in_an_order_of_its_own(written):
    stream = TrajectoryStream(written, seed=0)
    whole = stream.rows(list(range(10)))["noise"]

    def order(epoch):
        batch = stream.__getitems__(list(range(10 * epoch, 10 * epoch + 10)))
        assert batch["trajectory"].shape == (10, 4, 3, 8, 8)
        return [next(i for i in range(10) if torch.equal(noise, whole[i])) for noise in batch["noise"]]

    orders = [order(0), order(1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]
    assert order(0) == orders[0]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"num_trajectories": 0}, "`--num_trajectories`.*must be at least 1, got 0, 4 and 3"),
        ({"scheduler": "Solver"}, "`--scheduler` must be a scheduler of genie_diffusers or diffusers, got 'Solver'"),
        ({"num_inference_steps": 2}, "`--num_inference_steps` must be such that.*2 of GenieScheduler are at"),
    ],
)
def test_bad_input_is_refused(base, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        generate(base, tmp_path / "solutions", **named)


def test_solutions_of_another_kind_are_not_mixed(base, written):
    with pytest.raises(ValueError, match=r"with other num_inference_steps: \[8\] there, got \[9\]"):
        generate(base, written, num_inference_steps=9)


def test_a_folder_without_solutions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"`--trajectories` must be a folder with a {FACTS_FILE}"):
        TrajectoryStream(tmp_path, seed=0)

"""Schedulers that are loaded where this package is not: in another process, which cannot import it, nor scipy."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoModel,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.utils.dynamic_modules_utils import get_relative_imports

import genie_diffusers
from genie_diffusers import (
    ExponentialMultistepScheduler,
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    QuasiTaylorScheduler,
)
from genie_diffusers.standalone import standalone_source

needs_auto_map = pytest.mark.skipif(
    "auto_map" not in inspect.getsource(AutoModel), reason="`AutoModel` loads code from diffusers 0.36 on"
)

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLUX = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=256).config


def learned(config) -> dict:
    """Tables for 3 and 4 calls, and not those of the solver."""
    return GGDMScheduler.from_scheduler(GenieScheduler.from_config(config, time_grid="karras"), [3, 4]).config.tables


VARIANCE_PRESERVING = GenieScheduler(**STABLE_DIFFUSION, tables=learned(GenieScheduler(**STABLE_DIFFUSION).config))
FLOW = GenieScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
FLOW = GenieScheduler.from_config(FLOW.config, tables=learned(FLOW.config))

PIXELS = GenieScheduler.from_config(VARIANCE_PRESERVING.config, prediction_type="sample")

#: schedulers, and what their timesteps are set to
CASES = {
    "table": (VARIANCE_PRESERVING, {"num_inference_steps": 4}),
    "table of pixels": (PIXELS, {"num_inference_steps": 4}),
    "solved": (VARIANCE_PRESERVING, {"num_inference_steps": 7}),
    "timesteps": (VARIANCE_PRESERVING, {"timesteps": [900, 501, 200, 11]}),
    "beta grid": (GenieScheduler(**STABLE_DIFFUSION, time_grid="beta57"), {"num_inference_steps": 6}),
    "align your steps": (GenieScheduler(**STABLE_DIFFUSION, time_grid="ays"), {"num_inference_steps": 6}),
    "real timesteps": (GenieScheduler(continuous=True, time_grid="uniform_lambda"), {"num_inference_steps": 5}),
    "zero terminal": (
        GenieScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
        {"num_inference_steps": 5},
    ),
    "taylor": (GenieScheduler(method="taylor", clip_sample=True), {"num_inference_steps": 5}),
    "flow table": (FLOW, {"num_inference_steps": 4}),
    "flow solved": (FLOW, {"num_inference_steps": 6}),
    "flow sigmas": (GenieScheduler.from_config(FLUX), {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.8}),
    "encoder": (GenieInverseScheduler(**STABLE_DIFFUSION), {"num_inference_steps": 5}),
    "stochastic": (QuasiTaylorScheduler(method="sde"), {"num_inference_steps": 60}),
    "learned alone": (GGDMScheduler.from_config(VARIANCE_PRESERVING.config), {"num_inference_steps": 3}),
    "gddim": (GDDIMScheduler(**STABLE_DIFFUSION), {"num_inference_steps": 5}),
    "multistep": (ExponentialMultistepScheduler(solver="sa_solver_3", **STABLE_DIFFUSION), {"num_inference_steps": 6}),
    "er_sde": (
        ExponentialMultistepScheduler(solver="er_sde_3", prediction_type="flow_prediction"),
        {"num_inference_steps": 5},
    ),
}


def sample(scheduler, **points) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    scheduler.set_timesteps(**points)
    for timestep in scheduler.timesteps:
        output = torch.tanh(sample) + 0.1 * torch.cos(timestep.double() / 300)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    return sample


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(num_inference_steps=4, generator=generator, output_type="np").images)


ELSEWHERE = """
import copy, json, pickle, sys
from importlib.machinery import PathFinder
from pathlib import Path

class Elsewhere(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ("genie_diffusers", "scipy")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Elsewhere if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from diffusers import AutoModel, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils import dynamic_modules_utils

{sample}
{draw}

warnings = []
dynamic_modules_utils.logger.warning = warnings.append
root = Path({root!r})
points = json.loads((root / "points.json").read_text())

def load(folder):
    return AutoModel.from_pretrained(str(root / folder), trust_remote_code=True)

schedulers = {{case: load(case) for case in points}}  # all side by side
results = {{case: sample(scheduler, **points[case]) for case, scheduler in schedulers.items()}}

scheduler = load("table")
results["copied"] = sample(copy.deepcopy(scheduler), **points["table"])
results["pickled"] = sample(pickle.loads(pickle.dumps(scheduler)), **points["table"])
theirs = DPMSolverMultistepScheduler.from_config(scheduler.config)
results["there"] = sample(theirs, num_inference_steps=4)
results["there and back"] = sample(type(scheduler).from_config(theirs.config), **points["table"])
other = schedulers["stochastic"]  # its method stays behind
results["of another class"] = sample(type(scheduler).from_config(other.config), **points["table"])
scheduler.save_pretrained(root / "again")
results["saved again"] = sample(load("again"), **points["table"])
scheduler.attach(lambda sample, noise_prediction, timestep, *, step, history_slope: 0.1 * sample)
results["with slopes"] = sample(scheduler, num_inference_steps=7)
scheduler.attach(None)

pipe = DiffusionPipeline.from_pretrained(root / "pipeline")
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = load("table of pixels")
results["pipeline"] = draw(pipe)
for folder in ("standalone pipeline", "the same saved again"):
    pipe.save_pretrained(root / folder)
    pipe = DiffusionPipeline.from_pretrained(root / folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    results[folder] = draw(pipe)

absent = ("genie_diffusers", "scipy")
results["modules"] = sorted(name for name in sys.modules if name.partition(".")[0] in absent)
results["warnings"] = [message for message in warnings if "not found" in message]
torch.save(results, root / "results.pt")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("standalone")


@pytest.fixture(scope="module")
def there(root, make_pixels):
    """What the same code draws in a process without this package, from folders that were saved here."""
    for case, (scheduler, _) in CASES.items():
        scheduler.save_pretrained(root / case, standalone=True)
    make_pixels().save_pretrained(root / "pipeline")
    (root / "points.json").write_text(json.dumps({case: points for case, (_, points) in CASES.items()}))
    sources = {"sample": inspect.getsource(sample), "draw": inspect.getsource(draw)}
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    script = ELSEWHERE.format(root=str(root), **sources)
    subprocess.run([sys.executable, "-I", "-c", script], check=True, env=environment, timeout=300)
    return torch.load(root / "results.pt")


@pytest.fixture(scope="module")
def make_pixels():
    """A tiny stock pipeline in pixels."""

    def make(scheduler=None) -> DDPMPipeline:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        pipe = DDPMPipeline(unet.eval(), DDPMScheduler() if scheduler is None else scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@needs_auto_map
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_samples_as_the_scheduler_that_was_saved(there, case):
    scheduler, points = CASES[case]
    assert torch.equal(there[case], sample(scheduler, **points))


@needs_auto_map
@pytest.mark.slow
@pytest.mark.parametrize("way", ["copied", "pickled", "there and back", "saved again"])
def test_its_copies_sample_as_it_does(there, way):
    assert torch.equal(there[way], there["table"])


@needs_auto_map
@pytest.mark.slow
def test_schedulers_of_diffusers_take_its_configuration(there):
    theirs = DPMSolverMultistepScheduler.from_config(VARIANCE_PRESERVING.config)
    assert torch.equal(there["there"], sample(theirs, num_inference_steps=4))


@needs_auto_map
@pytest.mark.slow
def test_methods_of_another_standalone_class_stay_behind(there):
    ours = GenieScheduler.from_config(CASES["stochastic"][0].config)
    assert torch.equal(there["of another class"], sample(ours, num_inference_steps=4))


@needs_auto_map
@pytest.mark.slow
def test_a_source_can_be_attached_to_it(there):
    scheduler = GenieScheduler.from_config(VARIANCE_PRESERVING.config)
    scheduler.attach(lambda sample, noise_prediction, timestep, *, step, history_slope: 0.1 * sample)
    assert torch.equal(there["with slopes"], sample(scheduler, num_inference_steps=7))


@needs_auto_map
@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["pipeline", "standalone pipeline", "the same saved again"])
def test_a_stock_pipeline_draws_with_it_and_is_saved_with_it(there, make_pixels, pipeline):
    drawn = draw(make_pixels(PIXELS))
    torch.testing.assert_close(there[pipeline], drawn, rtol=0, atol=1e-5)
    assert drawn.std() > 0.05


@needs_auto_map
@pytest.mark.slow
def test_nothing_of_this_package_and_nothing_that_diffusers_has_not_is_imported(there):
    assert there["modules"] == [] and there["warnings"] == []


@needs_auto_map
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["table", "saved again"])
def test_where_this_package_is_its_own_class_reads_the_folder(there, root, folder):
    folder = {"saved again": "again"}.get(folder, folder)
    loaded = GenieScheduler.from_pretrained(root / folder)
    assert torch.equal(there["table"], sample(loaded, num_inference_steps=4))


# --- the file --------------------------------------------------------------------------------------------------------


def defined(source: str) -> dict:
    """What a file with this source defines."""
    names = {"__name__": "elsewhere", "__file__": "elsewhere.py"}
    exec(compile(source, "elsewhere.py", "exec"), names)
    return names


SCHEDULERS = [
    scheduler
    for name, scheduler in vars(genie_diffusers).items()
    if name.endswith("Scheduler") and name not in ("TableScheduler", "GaussianDiffusionScheduler")
]


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_every_scheduler_makes_one_file(scheduler_class, tmp_path):
    source = standalone_source(scheduler_class)
    made = defined(source)[scheduler_class.__name__]
    assert made.__module__ == "elsewhere" and set(made().config) == set(scheduler_class().config)
    assert f"genie_diffusers {genie_diffusers.__version__} " in source and "from genie_diffusers" not in source
    (tmp_path / "file.py").write_text(source)
    assert get_relative_imports(tmp_path / "file.py") == []


def test_it_has_what_its_class_needs_alone():
    names = {node.name for node in ast.parse(standalone_source(GenieScheduler)).body if hasattr(node, "name")}
    assert {"GenieScheduler", "hermite", "VariancePreserving", "RectifiedFlow", "read_table"} <= names
    assert not names & {"GDDIMScheduler", "gddim", "GenieInverseScheduler", "Blurring", "run", "standalone_source"}


@pytest.mark.slow
def test_it_is_the_same_each_time():
    sources = {standalone_source(GenieScheduler) for _ in range(2)}
    script = "from genie_diffusers import *; from genie_diffusers.standalone import *; import sys\n"
    script += "sys.stdout.buffer.write(standalone_source(GenieScheduler).encode())"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
    assert sources == {other.stdout.decode()}


def test_different_sources_have_different_file_names(tmp_path, monkeypatch):
    """diffusers imports two files of one name into one module, where the names of both would mix."""
    GenieScheduler().save_pretrained(tmp_path, standalone=True)
    monkeypatch.setattr(genie_diffusers, "__version__", "another")
    GenieScheduler().save_pretrained(tmp_path, standalone=True)
    assert len(list(tmp_path.glob("scheduling_genie_*.py"))) == 2


def test_a_folder_has_three_files_and_the_configuration_is_as_without(tmp_path):
    VARIANCE_PRESERVING.save_pretrained(tmp_path / "with", standalone=True)
    VARIANCE_PRESERVING.save_pretrained(tmp_path / "without")
    config, own, python = sorted(path.name for path in (tmp_path / "with").iterdir())
    assert config == "config.json" and own == "scheduler_config.json" and python.startswith("scheduling_genie_")
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["scheduler_config.json"]
    with_it, without = (tmp_path / folder / own for folder in ("with", "without"))
    assert with_it.read_text() == without.read_text()


def test_it_is_pushed_as_diffusers_pushes(tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(
        "diffusers.configuration_utils.create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(
        GenieScheduler,
        "_upload_folder",
        lambda self, folder, repo_id, **_: uploads.append((repo_id, os.listdir(folder))),
    )
    GenieScheduler().save_pretrained(str(tmp_path / "new"), push_to_hub=True, repo_id="user/sampler", standalone=True)
    ((repo_id, files),) = uploads
    assert repo_id == "user/sampler" and len(files) == 3


def test_what_is_attached_is_not_saved_and_that_is_said_once(tmp_path, caplog):
    scheduler = GenieScheduler()
    scheduler.attach(lambda sample, noise_prediction, timestep, *, step, history_slope: sample)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            scheduler.save_pretrained(tmp_path, standalone=True)
    assert [record.message for record in caplog.records if "without what is attached" in record.message] != []
    assert len(caplog.records) == 1


# --- schedulers of one's own -----------------------------------------------------------------------------------------


def module(tmp_path, monkeypatch, name: str, text: str):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def test_a_scheduler_of_a_file_of_ones_own_is_saved_with_it(tmp_path, monkeypatch):
    text = re.search(r"```python\n(.*?)```", CONTRIBUTING.partition("### Add your own sampler")[2], re.DOTALL)[1]
    own = module(tmp_path, monkeypatch, "adams_bashforth_of_a_user", text).AdamsBashforthScheduler
    source = standalone_source(own)
    assert "import genie_diffusers" not in source and "from genie_diffusers" not in source
    made = defined(source)[own.__name__]
    assert torch.equal(sample(made(), num_inference_steps=5), sample(own(), num_inference_steps=5))


def test_a_scheduler_of_no_file_is_refused(tmp_path):
    class Local(GenieScheduler):
        pass

    typed: dict = {"__name__": "typed", "GenieScheduler": GenieScheduler}
    exec("class Typed(GenieScheduler): pass", typed)
    for scheduler in (Local(), typed["Typed"]()):
        with pytest.raises(ValueError, match=r"defined at the top of a file, got `.*(Local|Typed)`"):
            scheduler.save_pretrained(tmp_path / "folder", standalone=True)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "from genie_diffusers import *\nclass Own(GenieScheduler): pass",
            "`Own` has `GenieScheduler` from elsewhere",
        ),
        (
            "from genie_diffusers import GenieScheduler\nLevels = 1\nclass Own(GenieScheduler):\n    other = Levels",
            "`Levels` of `own_file_1` is defined in `genie_diffusers.core.table` too: rename one of them",
        ),
        (
            "from genie_diffusers import GenieScheduler\nfrom os import path as math\n"
            "class Own(GenieScheduler):\n    other = math",
            "`math` of `(os|math)` is defined in `(os|math)` too",
        ),
        (
            "from genie_diffusers import GenieScheduler as Base\nclass Own(Base): pass",
            "`Own` has `Base` from elsewhere",
        ),
    ],
)
def test_what_does_not_fit_into_one_file_is_refused(text, message, tmp_path, monkeypatch, request):
    own = module(tmp_path, monkeypatch, f"own_file_{request.node.callspec.indices['text']}", text).Own
    with pytest.raises(ValueError, match=message):
        standalone_source(own)

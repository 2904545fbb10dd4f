import json

import pytest
import torch
from diffusers import UNet2DModel

from genie_diffusers import (
    DerivativeHead,
    ExactSlope,
    GenieInverseScheduler,
    GenieScheduler,
    GenieUNet2DModel,
    VariancePreserving,
)
from genie_diffusers.models import exact_slope, guidance

TIMESTEP = 40
LABELS = torch.tensor([0, 2])
BRANCH_LABELS = torch.tensor([3, 3, 0, 2])


@pytest.fixture
def head_for():
    """Builds a head with random weights for a UNet."""

    def build(model, **scheduler_config) -> DerivativeHead:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            head = DerivativeHead.for_unet(model, scheduler_config, width=16)
            torch.nn.init.normal_(head.conv_out.weight, std=0.1)
        return head

    return build


@pytest.fixture
def genie_unet(unet, head_for):
    def build(**scheduler_config) -> GenieUNet2DModel:
        model = unet()
        return GenieUNet2DModel.from_unet(model, head_for(model, **scheduler_config))

    return build


@torch.no_grad()
def denoise(model, x, labels=LABELS, t=TIMESTEP):
    return model(x, t, class_labels=labels).sample


@torch.no_grad()
def read_features(model, x, labels) -> dict[str, torch.Tensor]:
    """What a head reads, from hooks of the test's own on a plain UNet."""
    found = {}
    hooks = [
        model.conv_norm_out.register_forward_pre_hook(lambda _, args: found.update(features=args[0])),
        model.time_embedding.register_forward_hook(lambda _, args, output: found.update(time_embedding=output)),
    ]
    found["output"] = denoise(model, x, labels)
    for hook in hooks:
        hook.remove()
    return found


def test_its_output_is_that_of_the_plain_unet(unet, genie_unet, noise):
    x = noise(2, 2, 8, 8)
    model = genie_unet()
    assert torch.equal(denoise(model, x), denoise(unet(), x))
    as_tuple = model(x, TIMESTEP, class_labels=LABELS, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], denoise(model, x))
    assert model.config.sample_size == 8
    assert not model.training


def test_its_weights_are_shared_with_the_plain_unet(unet, head_for, noise):
    plain = unet()
    names = set(plain.state_dict())
    model = GenieUNet2DModel.from_unet(plain, head_for(plain))
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert own[name] is parameter
    assert {name for name in own if not name.startswith("derivative_head.")} == set(dict(plain.named_parameters()))
    assert set(plain.state_dict()) == names
    x = noise(2, 2, 8, 8)
    before = denoise(model, x)
    with torch.no_grad():
        plain.conv_out.bias.add_(1.0)
    torch.testing.assert_close(denoise(model, x), before + 1)


def test_the_head_takes_precision_and_mode_of_the_unet(unet, head_for):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        plain = unet().to(dtype).train()
        model = GenieUNet2DModel.from_unet(plain, head_for(plain))
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.derivative_head.training


def test_it_keeps_what_the_head_reads_of_the_last_call(unet, genie_unet, noise):
    model = genie_unet()
    for seed in (0, 1):
        x = noise(2, 2, 8, 8, seed=seed)
        with model.recording():
            output, expected = denoise(model, x), read_features(unet(), x, LABELS)
            assert torch.equal(model.last_call["sample"], x)
            assert torch.equal(model.last_call["output"], output)
            assert torch.equal(model.last_call["features"], expected["features"])
            assert torch.equal(model.last_call["time_embedding"], expected["time_embedding"])
        assert model.last_call is None
        denoise(model, x)
        assert model.last_call is None


def test_its_slope_is_the_head_at_the_last_call(unet, genie_unet, noise):
    model, x = genie_unet(), noise(2, 2, 8, 8)
    source, process = model.slope_source, VariancePreserving.from_config({})
    source.bind(process, "epsilon")
    prediction = denoise(model, x)
    read = read_features(unet(), x, LABELS)
    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    with torch.no_grad():
        expected = model.derivative_head(x, prediction, read["features"], read["time_embedding"], alpha, sigma)
    slope = source(x, prediction, TIMESTEP)
    torch.testing.assert_close(slope, expected)
    assert slope.norm() > 0.01 * prediction.norm()


def test_its_exact_slope_is_that_of_the_plain_unet(unet, genie_unet, noise):
    x, slopes = noise(2, 2, 8, 8), []
    for model in (unet(), genie_unet()):
        source = ExactSlope(model)
        source.bind(VariancePreserving.from_config({}), "epsilon")
        slopes.append(source(x, denoise(model, x), TIMESTEP))
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_under_guidance_every_branch_sees_the_guided_prediction_and_has_its_weight(
    unet, genie_unet, noise, prediction_type
):
    model, x, scale = genie_unet(prediction_type=prediction_type), noise(2, 2, 8, 8), 3.0
    source, process = model.slope_source, VariancePreserving.from_config({})
    source.bind(process, prediction_type)
    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    null, conditional = denoise(model, torch.cat([x, x]), BRANCH_LABELS).chunk(2)
    guided = null + scale * (conditional - null)
    prediction = {
        "epsilon": guided,
        "sample": (x - alpha * guided) / sigma,
        "v_prediction": alpha * guided + sigma * x,
    }[prediction_type]
    branch_slopes = []
    for labels in BRANCH_LABELS.chunk(2):
        read = read_features(unet(), x, labels)
        with torch.no_grad():
            slope = model.derivative_head(x, prediction, read["features"], read["time_embedding"], alpha, sigma)
        branch_slopes.append(slope)
    expected = (1 - scale) * branch_slopes[0] + scale * branch_slopes[1]
    torch.testing.assert_close(source(x, prediction, TIMESTEP), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, branch_slopes[1], rtol=1e-2)


@pytest.mark.parametrize("branches", [1, 2], ids=["unguided", "guided"])
def test_variances_that_the_unet_also_predicts_are_none_of_the_heads_business(unet, head_for, noise, branches):
    plain, x = unet(out_channels=4), noise(2, 2, 8, 8)
    model = GenieUNet2DModel.from_unet(plain, head_for(plain))
    scheduler = GenieScheduler(variance_type="learned_range")
    scheduler.attach(model)
    scheduler.set_timesteps(20)
    t = scheduler.timesteps[0]
    parts = denoise(model, x.repeat(branches, 1, 1, 1), BRANCH_LABELS[: 2 * branches], t).chunk(branches)
    with_variances = parts[0] + 3.0 * (parts[-1] - parts[0])
    by_head = scheduler.step(with_variances, t, x).prev_sample
    scheduler.attach(None)
    scheduler.set_timesteps(20)
    assert by_head.shape == x.shape
    assert not torch.allclose(by_head, scheduler.step(with_variances, t, x).prev_sample)


def test_it_is_saved_and_loaded_with_its_head(genie_unet, noise, tmp_path):
    model, x = genie_unet(), noise(2, 2, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = GenieUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert torch.equal(denoise(loaded, x), denoise(model, x))
    slopes = []
    for each in (model, loaded):
        source = each.slope_source
        source.bind(VariancePreserving.from_config({}), "epsilon")
        slopes.append(source(x, denoise(each, x), TIMESTEP))
    assert torch.equal(*slopes)
    assert slopes[0].norm() > 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["derivative_head_config"]["feature_channels"] == 8
    assert not any(key.startswith("_") for key in config["derivative_head_config"])


def test_a_plain_unet_loads_the_same_folder(unet, genie_unet, noise, tmp_path):
    genie_unet().save_pretrained(tmp_path)
    plain = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    x = noise(2, 2, 8, 8)
    assert torch.equal(denoise(plain, x), denoise(unet(), x))


def test_the_folder_of_a_plain_unet_loads_without_a_head(unet, noise, tmp_path):
    unet().save_pretrained(tmp_path)
    model = GenieUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    x = noise(2, 2, 8, 8)
    assert torch.equal(denoise(model, x), denoise(unet(), x))
    assert model.derivative_head is None
    with pytest.raises(ValueError, match="no head"):
        _ = model.slope_source
    with pytest.raises(ValueError, match="no head"):
        GenieScheduler().attach(model)


def test_the_head_may_be_a_folder(unet, head_for, noise, tmp_path):
    plain = unet()
    head = head_for(plain)
    head.save_pretrained(tmp_path / "head")
    model = GenieUNet2DModel.from_unet(plain, str(tmp_path / "head"))
    for name, value in head.state_dict().items():
        torch.testing.assert_close(model.derivative_head.state_dict()[name], value.double(), rtol=0, atol=0)
    inside = GenieUNet2DModel.from_unet(plain, str(tmp_path), subfolder="head")
    assert torch.equal(inside.derivative_head.conv_out.weight, model.derivative_head.conv_out.weight)


def test_a_head_of_another_schedule_is_refused_when_attached(genie_unet):
    model = genie_unet()
    GenieScheduler().attach(model)
    with pytest.raises(ValueError, match="another noise schedule"):
        GenieScheduler(beta_schedule="scaled_linear").attach(model)
    with pytest.raises(ValueError, match="prediction_type"):
        GenieScheduler(prediction_type="v_prediction").attach(model)


def test_a_schedule_that_changes_later_is_refused_when_the_timesteps_are_set(genie_unet):
    scheduler = GenieScheduler()
    scheduler.attach(genie_unet())
    scheduler.register_to_config(beta_end=0.03)
    with pytest.raises(ValueError, match="another noise schedule"):
        scheduler.set_timesteps(5)


def test_a_sample_that_the_unet_was_not_called_with_is_refused(genie_unet, noise):
    model, x = genie_unet(), noise(2, 2, 8, 8)
    source = model.slope_source
    source.bind(VariancePreserving.from_config({}), "epsilon")
    with pytest.raises(ValueError, match="called before"):
        source(x, x, TIMESTEP)
    prediction = denoise(model, x)
    with pytest.raises(ValueError, match="another sample"):
        source(x + 1e-6, prediction, TIMESTEP)


@pytest.mark.slow
def test_a_full_compilation_keeps_what_the_head_reads(genie_unet, noise):
    eager, model = genie_unet(), genie_unet()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for seed in (0, 1):
        x = noise(2, 2, 8, 8, seed=seed)
        with eager.recording(), model.recording():
            torch.testing.assert_close(denoise(compiled, x), denoise(eager, x))
            for name, value in eager.last_call.items():
                torch.testing.assert_close(model.last_call[name], value)
    scheduler = GenieScheduler()
    scheduler.attach(compiled)
    scheduler.set_timesteps(3)
    x, t = noise(2, 2, 8, 8), scheduler.timesteps[0]
    stepped = scheduler.step(denoise(compiled, x, t=t), t, x).prev_sample
    scheduler.attach(eager)
    scheduler.set_timesteps(3)
    torch.testing.assert_close(stepped, scheduler.step(denoise(eager, x, t=t), t, x).prev_sample)


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, 2], ids=["unguided", "guided"])
@pytest.mark.parametrize("exact", [False, True], ids=["head", "exact slope"])
@pytest.mark.parametrize("scheduler_class", [GenieScheduler, GenieInverseScheduler])
def test_slopes_wait_for_the_device_in_the_first_step_of_a_run_alone(
    genie_unet, unet, monkeypatch, branches, exact, scheduler_class
):
    """Reading a value of a tensor on the meta device is an error, but for the one place where sources compare."""
    read = []
    for module in (guidance, exact_slope):
        monkeypatch.setattr(module, "holds", lambda condition: read.append(scheduler.step_index) or True)
    model = (unet() if exact else genie_unet()).float().to("meta")
    scheduler = scheduler_class(time_grid="quadratic")
    scheduler.attach(ExactSlope(model) if exact else model)
    for _ in range(2):
        read.clear()
        scheduler.set_timesteps(4, device="meta")
        scheduler.set_begin_index(0)
        sample = torch.empty(2, 2, 8, 8, device="meta")
        labels = torch.zeros(2 * branches, dtype=torch.long, device="meta")
        for timestep in scheduler.timesteps:
            parts = denoise(model, sample.repeat(branches, 1, 1, 1), labels, timestep).chunk(branches)
            sample = scheduler.step(parts[0] + 3.0 * (parts[-1] - parts[0]), timestep, sample).prev_sample
        assert scheduler.step_index == 4
        first = min(scheduler._plan.sourced["slope"])  # an encoder starts at clean data, where there is no slope
        assert read == [first] * (3 if exact else 2)


def test_values_are_not_compared_on_a_device_without_them(genie_unet):
    model = genie_unet().float().to("meta")
    scheduler = GenieScheduler()
    scheduler.attach(model)
    scheduler.set_timesteps(2, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.empty(2, 2, 8, 8, device="meta")
    output = denoise(model, sample, LABELS.to("meta"), scheduler.timesteps[0])
    assert scheduler.step(output, scheduler.timesteps[0], sample).prev_sample.is_meta

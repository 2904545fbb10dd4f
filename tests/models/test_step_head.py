import json
import math

import pytest
import torch

from genie_diffusers import DerivativeHead, GenieScheduler, GenieUNet2DModel, StepHead, VariancePreserving

TABLES = {
    "2": {"timesteps": [900, 300], "weights": [[0.9, -0.2], [1.2, -0.4, 0.1]], "residuals": [0.1, 0.3]},
    "3": {
        "timesteps": [950, 500, 60],
        "weights": [[0.9, -0.2], [1.1, -0.3, 0.05], [1.2, -0.4, 0.1, -0.02]],
        "residuals": [0.0, 0.0, 0.0],
    },
}
LABELS = torch.tensor([0, 2])


@pytest.fixture
def head_for():
    """Builds a float64 head for a UNet, with tables and with random weights in the last layer too."""

    def build(model, tables=TABLES, **scheduler_config) -> StepHead:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            head = StepHead.for_unet(model, scheduler_config, width=16)
            torch.nn.init.normal_(head.conv_out.weight, std=0.1)
        head.register_to_config(tables=tables)
        return head.double()

    return build


@pytest.fixture
def genie_unet(unet, head_for):
    def build(**scheduler_config) -> GenieUNet2DModel:
        model = unet()
        return GenieUNet2DModel.from_unet(model, head_for(model, **scheduler_config)).requires_grad_(False)

    return build


@pytest.fixture
def inputs(noise):
    """Sample, noise prediction, features and time embedding for the head of the tiny UNet."""
    return noise(2, 2, 8, 8), noise(2, 2, 8, 8, seed=1), noise(2, 8, 8, 8, seed=2), noise(2, 32, seed=3)


def draw(model, sample: torch.Tensor, steps: int = 2, labels=LABELS, source=None, **config) -> torch.Tensor:
    scheduler = GenieScheduler(**config)
    scheduler.attach(source or model)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t, class_labels=labels).sample, t, sample).prev_sample
    return sample


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"block_out_channels": (16, 16)}, {"out_channels": 4}, {"in_channels": 5}])
@pytest.mark.parametrize("width", [None, 8])
@torch.no_grad()
def test_a_new_head_fits_its_unet_and_predicts_zero(unet, noise, config, width):
    model = unet(**config)
    head = StepHead.for_unet(model, width=width).double()
    head.check_fits(model)
    read = noise(3, head.config.feature_channels, 6, 8), noise(3, head.config.time_embedding_dim)
    landing = head(noise(3, 2, 6, 8), noise(3, 2, 6, 8), *read, 0.8, 0.6, 0.5, noise(3, 2, 6, 8))
    assert head.config.width == (width or 32)
    assert torch.equal(landing, torch.zeros(3, 2, 6, 8, dtype=torch.float64))


@torch.no_grad()
def test_a_new_head_leaves_the_tables_as_they_are(unet, noise):
    plain, x = unet(), noise(2, 2, 8, 8)
    head = StepHead.for_unet(plain, width=16)
    head.register_to_config(tables=TABLES)
    found, first, second = draw(GenieUNet2DModel.from_unet(plain, head), x), *TABLES["2"]["weights"]
    predictions = [plain(x, 900, class_labels=LABELS).sample]
    x = first[0] * x + first[1] * predictions[0]
    predictions.append(plain(x, 300, class_labels=LABELS).sample)
    torch.testing.assert_close(found, second[0] * x + second[1] * predictions[1] + second[2] * predictions[0])


@pytest.mark.parametrize(
    "position", range(8), ids="sample,noise prediction,features,embedding,alpha,sigma,step,history".split(",")
)
@torch.no_grad()
def test_every_input_matters(unet, head_for, noise, inputs, position):
    head, given = head_for(unet()), [*inputs, 0.8, 0.6, 0.5, noise(2, 2, 8, 8, seed=4)]
    changed = list(given)
    changed[position] = (
        1.5 * given[position]
        if position in (4, 5, 6)
        else given[position] + torch.linspace(0, 1, given[position].shape[-1])
    )
    assert not torch.allclose(head(*changed), head(*given), atol=1e-4)


@torch.no_grad()
def test_the_history_counts_by_its_direction_alone_and_none_is_zero(unet, head_for, noise, inputs):
    head, slope = head_for(unet()), noise(2, 2, 8, 8, seed=4)
    landing = head(*inputs, 0.8, 0.6, 0.5, slope)
    torch.testing.assert_close(head(*inputs, 0.8, 0.6, 0.5, 100 * slope), landing, rtol=1e-6, atol=1e-6)
    none, zero = (head(*inputs, 0.8, 0.6, 0.5, history) for history in (None, torch.zeros_like(slope)))
    assert torch.equal(none, zero) and torch.isfinite(none).all()


@torch.no_grad()
@torch.no_grad()
def test_pictures_may_have_odd_sides(unet, head_for, noise):
    """Latents of 520 pixels have 65."""
    sample, prediction, features = (noise(1, channels, 9, 7) for channels in (2, 2, 8))
    slope = head_for(unet())(sample, prediction, features, noise(1, 32, seed=3), 0.8, 0.6, 0.5, None)
    assert slope.shape == (1, 2, 9, 7) and torch.isfinite(slope).all()


def test_the_last_step_is_infinite_and_its_landing_is_not(unet, head_for, inputs):
    head = head_for(unet())
    landing = head(*inputs, 0.8, 0.6, math.inf, None)
    assert torch.isfinite(landing).all()
    assert torch.equal(landing, head(*inputs, 0.8, 0.6, 8.0, None))
    assert not torch.allclose(landing, head(*inputs, 0.8, 0.6, 4.0, None), atol=1e-4)


@pytest.mark.parametrize("width", [0, -8, 12])
def test_a_width_that_the_normalisations_cannot_group_is_refused(unet, width):
    with pytest.raises(ValueError, match=f"`width` must be a positive multiple of 8, got {width}"):
        StepHead.for_unet(unet(), width=width)


# --- in a UNet -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_its_tables_are_those_that_the_scheduler_follows(genie_unet, noise):
    model, scheduler = genie_unet(), GenieScheduler()
    assert model.slope_source.tables == TABLES
    scheduler.attach(model)
    calls = []
    model.derivative_head.register_forward_hook(lambda module, args, output: calls.append(output))
    for steps, asked in ((2, 2), (3, 0), (4, 0)):
        calls.clear()
        scheduler.set_timesteps(steps)
        if str(steps) in TABLES:
            assert scheduler.timesteps.tolist() == TABLES[str(steps)]["timesteps"]
        assert torch.isfinite(draw(model, noise(2, 2, 8, 8), steps)).all()
        assert len(calls) == asked
    draw(model, noise(2, 2, 8, 8))
    assert all(landing.norm() > 0.01 for landing in calls)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_under_guidance_every_branch_sees_the_guided_prediction_and_has_its_weight(
    unet, genie_unet, noise, prediction_type
):
    model, x, scale, t = genie_unet(prediction_type=prediction_type), noise(2, 2, 8, 8), 3.0, 40
    source, process = model.slope_source, VariancePreserving.from_config({})
    source.bind(process, prediction_type)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    history = noise(2, 2, 8, 8, seed=6)
    reads = []
    for labels in (torch.tensor([3, 3]), LABELS):
        model(x, t, class_labels=labels)
        reads.append(model.last_call)
    guided = reads[0]["output"] + scale * (reads[1]["output"] - reads[0]["output"])
    prediction = guided if prediction_type == "epsilon" else alpha * guided + sigma * x
    of_null, of_class = (
        model.derivative_head(x, prediction, read["features"], read["time_embedding"], alpha, sigma, 0.7, history)
        for read in reads
    )
    model(torch.cat([x, x]), t, class_labels=torch.tensor([3, 3, 0, 2]))
    landing = source(x, prediction, t, step=0.7, history_slope=history)
    torch.testing.assert_close(landing, (1 - scale) * of_null + scale * of_class, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(landing, of_class, rtol=1e-2)


@torch.no_grad()
def test_samples_do_not_depend_on_the_split_into_batches(genie_unet, noise):
    model, x, labels = genie_unet(), noise(5, 2, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    parts = [draw(model, x[part], labels=labels[part]) for part in (slice(0, 1), slice(1, 3), slice(3, 5))]
    torch.testing.assert_close(torch.cat(parts), draw(model, x, labels=labels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_gradient_of_a_run_is_that_of_finite_differences(genie_unet, noise, prediction_type):
    """Through both steps, the UNet between them, and the slope of the history that the second one is told."""
    model, x, target = genie_unet(prediction_type=prediction_type), noise(2, 2, 8, 8), noise(2, 2, 8, 8, seed=7)
    head, h = model.derivative_head.requires_grad_(True), 1e-4
    start = torch.nn.utils.parameters_to_vector(head.parameters()).detach()
    direction = noise(len(start), seed=8)

    def loss(distance: float) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(start + distance * direction, head.parameters())
        drawn = draw(model, x, source=model.slope_source.differentiable(), prediction_type=prediction_type)
        return (drawn - target).square().mean()

    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss(0.0), list(head.parameters()))])
    with torch.no_grad():
        torch.testing.assert_close((loss(h) - loss(-h)) / (2 * h), gradient @ direction, rtol=1e-3, atol=0)


# --- files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_saved_and_loaded_without_its_unet(unet, head_for, inputs, tmp_path):
    saved = head_for(unet(), beta_schedule="scaled_linear", prediction_type="v_prediction")
    saved.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = StepHead.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert loaded.config.tables == json.loads((tmp_path / "config.json").read_text())["tables"] == TABLES
    assert loaded.config.process == {"beta_schedule": "scaled_linear"}
    assert loaded.config.prediction_type == "v_prediction"
    assert loaded.config.fingerprint == saved.config.fingerprint
    assert torch.equal(loaded(*inputs, 0.8, 0.6, 0.5, None), saved(*inputs, 0.8, 0.6, 0.5, None))


@torch.no_grad()
def test_a_unet_takes_it_from_a_folder(unet, head_for, noise, tmp_path):
    plain = unet()
    head_for(plain).save_pretrained(tmp_path / "head")
    x = noise(2, 2, 8, 8)
    expected = draw(GenieUNet2DModel.from_unet(plain, head_for(plain)), x)
    for folder, options in ((tmp_path / "head", {}), (str(tmp_path), {"subfolder": "head"})):
        model = GenieUNet2DModel.from_unet(plain, folder, **options)
        assert isinstance(model.derivative_head, StepHead)
        assert torch.equal(draw(model, x), expected)


def test_a_folder_of_a_derivative_head_is_none_of_a_step_head(unet, tmp_path):
    DerivativeHead.for_unet(unet(), width=16).save_pretrained(tmp_path)
    model = GenieUNet2DModel.from_unet(unet(), tmp_path)
    assert isinstance(model.derivative_head, DerivativeHead)
    assert model.slope_source.tables is None


@torch.no_grad()
def test_the_whole_unet_is_saved_and_loaded_with_head_and_tables(genie_unet, noise, tmp_path):
    model, x = genie_unet(), noise(2, 2, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = GenieUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert isinstance(loaded.derivative_head, StepHead)
    assert loaded.slope_source.tables == TABLES
    torch.testing.assert_close(draw(loaded, x), draw(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_follows_float64(genie_unet, noise, tmp_path, dtype):
    model, x = genie_unet(), noise(2, 2, 8, 8)
    model.save_pretrained(tmp_path)
    half = GenieUNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert half.slope_source.tables == TABLES
    drawn, expected = draw(half, x.to(dtype)), draw(model, x)
    assert drawn.dtype == dtype
    assert (drawn - expected).norm() < 0.05 * expected.norm()


# --- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"in_channels": 3, "out_channels": 3}, "in_channels 2, this one has 3"),
        ({"block_out_channels": (16, 16)}, "feature_channels 8, this one has 16"),
        ({"time_embedding_dim": 24}, "time_embedding_dim 32, this one has 24"),
    ],
)
def test_a_unet_it_cannot_read_is_refused_with_the_reason(unet, head_for, config, reason):
    with pytest.raises(ValueError, match=reason):
        GenieUNet2DModel.from_unet(unet(**config), head_for(unet()))


def test_another_diffusion_is_refused_when_it_is_attached(genie_unet):
    model = genie_unet()
    with pytest.raises(ValueError, match="another noise schedule"):
        GenieScheduler(beta_schedule="scaled_linear").attach(model)
    with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*'v_prediction'"):
        GenieScheduler(prediction_type="v_prediction").attach(model)


def test_something_else_is_no_head(unet):
    with pytest.raises(ValueError, match=r"`derivative_head` must be .*, got UNet2DModel"):
        GenieUNet2DModel.from_unet(unet(), unet())

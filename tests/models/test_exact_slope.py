import math

import pytest
import torch

from genie_diffusers import ExactSlope, GenieScheduler, VariancePreserving

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
GUIDANCE_SCALE = 3.0
TIMESTEP = 40.0
#: Differences are taken in time steps of 1/8. diffusers' UNets compute their time embedding, whose fastest component
#: is sin t, in float32 whatever their own precision: an error of about 2·10⁻⁶ at t = 40, so 4·10⁻⁵ in a difference
#: quotient over 1/8, while the truncation of the five-point formula is (1/8)⁴/30 ≈ 10⁻⁵.
DIFFERENCE = 0.125
TOLERANCE = 3e-4


@pytest.fixture
def process():
    return VariancePreserving.from_config({})


def to_noise(output, x, alpha, sigma, prediction_type):
    """ε from the definitions of what a model may predict."""
    return {
        "epsilon": output,
        "sample": (x - alpha * output) / sigma,
        "v_prediction": alpha * output + sigma * x,
    }[prediction_type]


def slope_by_differences(noise_prediction, x, process):
    """
    dε/dλ by a five-point formula along the straight line that is tangent to the ODE at TIMESTEP.

    `noise_prediction(x, t, alpha, sigma)` is the guided ε.
    """
    log_snr = float(process.log_snr(TIMESTEP))
    h = DIFFERENCE * abs(float(process.log_snr_derivative(TIMESTEP)))

    def at(offset):
        t = float(process.timestep(log_snr + offset))
        return noise_prediction(x + offset * velocity, t, float(process.alpha(t)), float(process.sigma(t)))

    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    velocity = sigma**2 * x - sigma * noise_prediction(x, TIMESTEP, alpha, sigma)
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def assert_slopes_agree(slope, expected):
    assert slope.shape == expected.shape
    assert (slope - expected).norm() / expected.norm() < TOLERANCE


@torch.no_grad()
def compare(model, process, x, prediction_type, guided, **conditions):
    """The exact slope after one call of the model on all its branches, and the slope by differences."""
    source = ExactSlope(model)
    source.bind(process, prediction_type)

    def noise_prediction(x, t, alpha, sigma):
        parts = torch.cat([x, x]) if guided else x
        output = model(parts, torch.tensor(t, dtype=torch.float64), **conditions, return_dict=False)[0]
        output = output[:, : x.shape[1]]  # without variances
        if guided:
            null, conditional = output.chunk(2)
            output = null + GUIDANCE_SCALE * (conditional - null)
        return to_noise(output, x, alpha, sigma, prediction_type)

    expected = slope_by_differences(noise_prediction, x, process)
    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    noise = noise_prediction(x, TIMESTEP, alpha, sigma)
    return source(x, noise, TIMESTEP), expected


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_slope_of_a_unet_is_the_difference_quotient_along_the_path(unet, process, noise, prediction_type, guided):
    labels = torch.tensor([3, 3, 0, 2] if guided else [0, 2])
    slopes = compare(unet(), process, noise(2, 2, 8, 8), prediction_type, guided, class_labels=labels)
    assert_slopes_agree(*slopes)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_slope_of_a_text_unet_is_the_difference_quotient_along_the_path(
    text_unet, process, noise, prediction_type, guided
):
    text = noise(4 if guided else 2, 3, 8, seed=1)
    slopes = compare(text_unet(), process, noise(2, 2, 8, 8), prediction_type, guided, encoder_hidden_states=text)
    assert_slopes_agree(*slopes)


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_predicted_variances_have_no_part_in_the_slope(unet, process, noise, guided):
    labels = torch.tensor([3, 3, 0, 2] if guided else [0, 2])
    model = unet(out_channels=4)
    assert_slopes_agree(*compare(model, process, noise(2, 2, 8, 8), "epsilon", guided, class_labels=labels))


def test_channels_beyond_the_sample_stand_still(text_unet, process, noise):
    """Masks and low-resolution images that a model is given next to the sample."""
    model, extra = text_unet(in_channels=5), noise(2, 3, 8, 8, seed=2)
    source = ExactSlope(model)
    source.bind(process, "epsilon")
    text = noise(2, 3, 8, seed=1)

    @torch.no_grad()
    def noise_prediction(x, t, alpha, sigma):
        return model(torch.cat([x, extra], 1), torch.tensor(t), encoder_hidden_states=text).sample

    x = noise(2, 2, 8, 8)
    expected = slope_by_differences(noise_prediction, x, process)
    assert_slopes_agree(source(x, noise_prediction(x, TIMESTEP, None, None), TIMESTEP), expected)


def test_the_branches_of_guidance_are_not_differentiated_along_their_own_paths(unet, process, noise):
    """The published way, (1 − w)·null + w·conditional slopes of each own path, is another number."""
    model, x = unet(), noise(2, 2, 8, 8)
    _, expected = compare(model, process, x, "epsilon", True, class_labels=torch.tensor([3, 3, 0, 2]))
    null, _ = compare(model, process, x, "epsilon", False, class_labels=torch.tensor([3, 3]))
    conditional, _ = compare(model, process, x, "epsilon", False, class_labels=torch.tensor([0, 2]))
    own_paths = (1 - GUIDANCE_SCALE) * null + GUIDANCE_SCALE * conditional
    assert (own_paths - expected).norm() / expected.norm() > 10 * TOLERANCE


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


def sdpa_backends():
    backends = torch.backends.cuda
    return [backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()]


def call(model, x):
    with torch.no_grad():
        return model(x, TIMESTEP, class_labels=torch.tensor([0, 2])).sample


def test_the_model_is_left_as_it_was(unet, process, noise):
    model, x = unet(), noise(2, 2, 8, 8)
    before, weights = call(model, x), {name: value.clone() for name, value in model.state_dict().items()}
    hooks_before, backends_before, modules_before = hooks(model), sdpa_backends(), list(model.modules())

    source = ExactSlope(model)
    attached = hooks(model)
    source.bind(process, "epsilon")
    source(x, call(model, x), TIMESTEP)

    assert hooks(model) == attached
    assert sdpa_backends() == backends_before
    assert list(model.modules()) == modules_before
    assert torch.equal(call(model, x), before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    source.remove()
    assert hooks(model) == hooks_before
    with pytest.raises(ValueError, match="called before"):
        source(x, before, TIMESTEP)


def test_the_model_is_left_as_it_was_when_differentiation_fails(unet, process, noise, monkeypatch):
    model, x = unet(), noise(2, 2, 8, 8)
    source = ExactSlope(model)
    source.bind(process, "epsilon")
    prediction, attached, backends_before = call(model, x), hooks(model), sdpa_backends()
    with monkeypatch.context() as patch:
        patch.setattr(torch.func, "jvp", None)
        with pytest.raises(TypeError):
            source(x, prediction, TIMESTEP)
    assert hooks(model) == attached
    assert sdpa_backends() == backends_before
    assert torch.isfinite(source(x, call(model, x), TIMESTEP)).all()


def test_a_scheduler_with_an_exact_slope_takes_the_taylor_step(unet, noise):
    """x̄ + h ε + ½ h² dε/dγ with dε/dγ = −(1/γ) dε/dλ."""
    model, x = unet(), noise(2, 2, 8, 8)
    scheduler = GenieScheduler(method="taylor")
    source = ExactSlope(model)
    scheduler.attach(source)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[1]
    scheduler.set_begin_index(1)
    prediction = call_at(model, x, t)
    stepped = scheduler.step(prediction, t, x).prev_sample
    slope = source(x, call_at(model, x, t), float(t))
    gamma, gamma_next = scheduler.sigmas[1:3].tolist()
    alpha, alpha_next = 1 / math.sqrt(1 + gamma**2), 1 / math.sqrt(1 + gamma_next**2)
    h = gamma_next - gamma
    expected = alpha_next * (x / alpha + h * prediction - 0.5 * h**2 / gamma * slope)
    torch.testing.assert_close(stepped, expected, rtol=1e-10, atol=1e-10)
    assert slope.norm() > 0.01 * prediction.norm()


def call_at(model, x, t):
    with torch.no_grad():
        return model(x, t, class_labels=torch.tensor([0, 2])).sample


def test_half_precision_follows_float64(unet, process, noise):
    x = noise(2, 2, 8, 8)
    slopes = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = unet().to(dtype)
        source = ExactSlope(model)
        source.bind(process, "epsilon")
        slopes[dtype] = source(x.to(dtype), call(model, x.to(dtype)), TIMESTEP)
    assert slopes[torch.bfloat16].dtype == torch.bfloat16
    error = slopes[torch.bfloat16].double() - slopes[torch.float64]
    assert error.norm() / slopes[torch.float64].norm() < 0.1


def test_it_must_follow_a_call_of_its_model(unet, process, noise):
    model, x = unet(), noise(2, 2, 8, 8)
    source = ExactSlope(model)
    source.bind(process, "epsilon")
    with pytest.raises(ValueError, match="called before"):
        source(x, x, TIMESTEP)


def test_it_must_be_bound_to_a_process(unet, noise):
    model, x = unet(), noise(2, 2, 8, 8)
    source = ExactSlope(model)
    with pytest.raises(ValueError, match=r"attached|bind"):
        source(x, call(model, x), TIMESTEP)


def test_another_sample_than_the_models_is_refused(unet, process, noise):
    model, x = unet(), noise(2, 2, 8, 8)
    source = ExactSlope(model)
    source.bind(process, "epsilon")
    prediction = call(model, x)
    with pytest.raises(ValueError, match="another sample"):
        source(x + 1e-6, prediction, TIMESTEP)
    with pytest.raises(ValueError, match="shape"):
        source(x[:, :, :4], prediction[:, :, :4], TIMESTEP)
    with pytest.raises(ValueError, match="shape"):
        source(torch.cat([x, x, x]), torch.cat([prediction] * 3), TIMESTEP)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guidance_that_is_not_linear_is_refused(unet, process, noise, prediction_type):
    model, x = unet(), noise(2, 2, 8, 8)
    source = ExactSlope(model)
    source.bind(process, prediction_type)
    with torch.no_grad():
        output = model(torch.cat([x, x]), TIMESTEP, class_labels=torch.tensor([3, 3, 0, 2])).sample
    null, conditional = output.chunk(2)
    guided = (null + GUIDANCE_SCALE * (conditional - null)).clamp(-0.05, 0.05)
    prediction = to_noise(guided, x, float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP)), prediction_type)
    with pytest.raises(ValueError, match="not a linear combination"):
        source(x, prediction, TIMESTEP)


def test_a_compiled_model_is_differentiated_behind_its_compilation(process, noise):
    class Denoiser(torch.nn.Module):
        def forward(self, sample, timestep):
            return torch.tanh(sample) * torch.cos(timestep / 100).reshape(-1, 1)

    compiled = torch.compile(Denoiser(), backend="eager")
    source = ExactSlope(compiled)
    source.bind(process, "epsilon")
    x = noise(3, 2)
    prediction = compiled(x, torch.full((3,), TIMESTEP))
    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    velocity, time_dot = sigma**2 * x - sigma * prediction, 1 / float(process.log_snr_derivative(TIMESTEP))
    expected = velocity / torch.cosh(x) ** 2 * math.cos(TIMESTEP / 100)
    expected = expected - torch.tanh(x) * math.sin(TIMESTEP / 100) / 100 * time_dot
    assert alpha**2 + sigma**2 == pytest.approx(1)
    torch.testing.assert_close(source(x, prediction, TIMESTEP), expected, rtol=1e-5, atol=1e-6)

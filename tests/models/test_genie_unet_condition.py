"""`GenieUNet2DConditionModel`: heads on the denoisers of text-to-image, inpainting and upscaling."""

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from diffusers.models.embeddings import MultiIPAdapterImageProjection as ImageProjections
from peft import LoraConfig

from genie_diffusers import (
    DerivativeHead,
    ExactSlope,
    GenieScheduler,
    GenieUNet2DConditionModel,
    GenieUNet2DModel,
    StepHead,
    VariancePreserving,
)

TIMESTEP = 40
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    "transformer_layers_per_block": (1, 2),
}
TABLES = {"2": {"timesteps": [900, 300], "weights": [[0.9, -0.2], [1.2, -0.4, 0.1]], "residuals": [0.1, 0.3]}}
every_head = pytest.mark.parametrize("head_class", [DerivativeHead, StepHead])


@pytest.fixture
def head_for():
    """A head with random weights, for denoisers of both kinds."""

    def build(model, head_class, **scheduler_config):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            head = head_class.for_unet(model, scheduler_config, width=16)
            torch.nn.init.normal_(head.conv_out.weight, std=0.1)
        if head_class is StepHead:
            head.register_to_config(tables=TABLES)
        return head

    return build


@pytest.fixture
def genie_unet(text_unet, head_for):
    def build(head_class=DerivativeHead, **config) -> GenieUNet2DConditionModel:
        model = text_unet(**config)
        return GenieUNet2DConditionModel.from_unet(model, head_for(model, head_class))

    return build


@pytest.fixture
def text(noise):
    return noise(2, 3, 8, seed=1)


def bound(model, prediction_type="epsilon"):
    source = model.slope_source if not isinstance(model, ExactSlope) else model
    source.bind(VariancePreserving.from_config({}), prediction_type)
    return source


def slope_of(source, sample, prediction) -> torch.Tensor:
    return source(sample, prediction, TIMESTEP, step=0.7, history_slope=torch.ones_like(sample))


@torch.no_grad()
def denoise(model, x, text, t=TIMESTEP, **conditions) -> torch.Tensor:
    return model(x, t, text, **conditions).sample


@every_head
def test_all_conditions_reach_the_plain_unet_untouched(text_unet, genie_unet, noise, text, head_class):
    plain, model, x = text_unet(**SDXL), genie_unet(head_class, **SDXL), noise(2, 2, 8, 8)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(plain, conditioning_channels=2).double()
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    added = {"text_embeds": noise(2, 8, seed=2), "time_ids": torch.ones(2, 6, dtype=torch.float64)}
    hint = noise(2, 2, 64, 64, seed=3)
    down, middle = control(x, TIMESTEP, text, hint, added_cond_kwargs=added, return_dict=False)
    conditions = {
        "added_cond_kwargs": added,
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": middle,
        "encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    expected = denoise(plain, x, text, **conditions)
    assert torch.equal(denoise(model, x, text, **conditions), expected)
    for name in ("down_block_additional_residuals", "encoder_attention_mask"):  # each of them matters
        assert not torch.allclose(denoise(plain, x, text, **{**conditions, name: None}), expected, rtol=1e-3)
    source = bound(model)
    as_tuple = model(x, TIMESTEP, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.isfinite(slope_of(source, x, as_tuple[0])).all()


@every_head
def test_guided_slope_beside_mask_channels_is_that_of_the_branches(text_unet, genie_unet, noise, head_class):
    """Inpainting: the sample is the first of the channels, and each branch sees the guided prediction."""
    model, x, extra = genie_unet(head_class, in_channels=5), noise(2, 2, 8, 8), noise(2, 3, 8, 8, seed=2)
    texts = noise(2, 2, 3, 8, seed=1)
    whole = torch.cat([x, extra], dim=1)
    source, process = bound(model), VariancePreserving.from_config({})
    null, conditional = denoise(model, whole.repeat(2, 1, 1, 1), texts.flatten(0, 1)).chunk(2)
    guided = null - 3.0 * null + 3.0 * conditional
    slope = slope_of(source, x, guided)
    branch_slopes, levels = [], (float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP)))
    of_step = (0.7, torch.ones_like(x)) if head_class is StepHead else ()
    for text, output in zip(texts, (null, conditional), strict=True):
        torch.testing.assert_close(denoise(model, whole, text), output)
        read = [model.last_call[name] for name in ("features", "time_embedding")]
        with torch.no_grad():
            branch_slopes.append(model.derivative_head(x, guided, *read, *levels, *of_step))
    expected = -2.0 * branch_slopes[0] + 3.0 * branch_slopes[1]
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, branch_slopes[1], rtol=1e-2)


def test_its_exact_slope_is_that_of_the_plain_unet(text_unet, genie_unet, noise, text):
    x, slopes = noise(2, 2, 8, 8), []
    for model in (text_unet(), genie_unet()):
        source = bound(ExactSlope(model))
        slopes.append(source(x, denoise(model, x, text), TIMESTEP))
    torch.testing.assert_close(*slopes)


@every_head
def test_a_low_resolution_picture_on_further_channels_is_none_of_the_heads_business(unet, head_for, noise, head_class):
    """Upscaling by a `UNet2DModel`, as in GENIE's cats."""
    plain = unet(in_channels=4, num_class_embeds=None)
    model = GenieUNet2DModel.from_unet(plain, head_for(plain, head_class))
    x, picture = noise(2, 2, 8, 8), noise(2, 2, 8, 8, seed=2)
    scheduler = GenieScheduler()
    scheduler.attach(model)
    scheduler.set_timesteps(2)
    slopes = []
    model.derivative_head.register_forward_hook(lambda module, args, output: slopes.append(output))
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = model(torch.cat([x, picture], dim=1), t).sample
        x = scheduler.step(output, t, x).prev_sample
    assert slopes and all(slope.shape == x.shape and slope.norm() > 0 for slope in slopes)


@every_head
def test_it_is_saved_and_loaded_with_its_head(genie_unet, noise, text, tmp_path, head_class):
    model, x = genie_unet(head_class), noise(2, 2, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = GenieUNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    plain = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    sources = bound(loaded), bound(model)
    prediction = denoise(model, x, text)
    assert type(loaded.derivative_head) is head_class
    torch.testing.assert_close(denoise(loaded, x, text), prediction)
    torch.testing.assert_close(denoise(plain, x, text), prediction)
    torch.testing.assert_close(*(slope_of(source, x, prediction) for source in sources))


@pytest.mark.parametrize("when", ["before the head", "after the head"])
def test_a_lora_of_the_unet_works_with_its_head(text_unet, head_for, noise, text, when):
    plain, x = text_unet(), noise(2, 2, 8, 8)
    head = head_for(plain, DerivativeHead)
    without = denoise(plain, x, text)

    def add_lora(model):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    if when == "before the head":
        add_lora(plain)
        model = GenieUNet2DConditionModel.from_unet(plain, head)
    else:
        model = GenieUNet2DConditionModel.from_unet(plain, head)
        add_lora(model)
    assert head.matches(model)  # the fingerprint is that of the base weights
    source = bound(model)
    with_lora = denoise(model, x, text)
    assert not torch.allclose(with_lora, without, rtol=1e-2)
    slope = slope_of(source, x, with_lora)
    assert torch.isfinite(slope).all() and slope.norm() > 0
    half = denoise(model, x, text, cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, with_lora, rtol=1e-2) and not torch.allclose(half, without, rtol=1e-2)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    torch.testing.assert_close(denoise(model, x, text), without)
    model.enable_adapters()
    torch.testing.assert_close(denoise(model, x, text), with_lora)


def test_an_image_prompt_loaded_before_the_head_goes_on_working(text_unet, head_for, noise, text):
    """IP-Adapter notes its kind in the attributes of the configuration alone."""
    plain = text_unet()
    torch.manual_seed(0)
    projection = ImageProjection(image_embed_dim=4, cross_attention_dim=8, num_image_text_embeds=2)
    plain.encoder_hid_proj = ImageProjections([projection]).double()
    plain.config.encoder_hid_dim_type = "ip_image_proj"
    seen = []
    plain.encoder_hid_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    head = head_for(plain, DerivativeHead)
    model = GenieUNet2DConditionModel.from_unet(plain, head)
    assert model.config.encoder_hid_dim_type == "ip_image_proj"
    embeddings = model.process_encoder_hidden_states(text, {"image_embeds": [noise(2, 1, 4, seed=4)]})
    assert torch.equal(embeddings[0], text) and embeddings[1][0].shape == (2, 1, 2, 8)
    assert len(seen) == 1


@pytest.mark.slow
def test_it_compiles_without_graph_breaks(genie_unet, noise, text):
    added = {"text_embeds": noise(2, 8, seed=2), "time_ids": torch.ones(2, 6, dtype=torch.float64)}
    eager, model = genie_unet(**SDXL), genie_unet(**SDXL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    sources = bound(eager), bound(compiled)
    for seed in (0, 5):
        x = noise(2, 2, 8, 8, seed=seed)
        prediction = denoise(eager, x, text, added_cond_kwargs=added)
        torch.testing.assert_close(denoise(compiled, x, text, added_cond_kwargs=added), prediction)
        torch.testing.assert_close(*(slope_of(source, x, prediction) for source in sources))


@every_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_within_the_rounding_of_a_step(genie_unet, noise, text, head_class, dtype):
    x = noise(2, 2, 8, 8).to(dtype)
    stepped = {}
    for precision in (torch.float32, dtype):
        model = genie_unet(head_class).to(precision)
        scheduler = GenieScheduler(timestep_spacing="trailing")
        scheduler.attach(model)
        scheduler.set_timesteps(2 if head_class is StepHead else 10)
        scheduler.set_begin_index(0)
        t = scheduler.timesteps[0]
        sample = x.to(precision)
        stepped[precision] = scheduler.step(denoise(model, sample, text.to(precision), t), t, sample).prev_sample
    assert stepped[dtype].dtype == dtype
    error = (stepped[dtype].float() - stepped[torch.float32]).norm() / stepped[torch.float32].norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("exact", [False, True], ids=["head", "exact slope"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guided_slopes_in_half_precision_where_alpha_all_but_vanishes(text_unet, head_for, noise, dtype, exact):
    """At zero terminal SNR ε = α v + σ x has lost v in half precision; the branches are of v."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plain = text_unet()
    model = GenieUNet2DConditionModel.from_unet(plain, head_for(plain, DerivativeHead, **config)).to(dtype)
    x, texts = noise(2, 2, 8, 8).to(dtype), noise(4, 3, 8, seed=1).to(dtype)
    scheduler, slopes = GenieScheduler(**config, method="taylor"), []
    source = ExactSlope(model) if exact else model.slope_source

    def recorded(*args, **kwargs):
        slopes.append(source(*args, **kwargs))
        return slopes[-1]

    recorded.bind = source.bind
    scheduler.attach(recorded)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    null, conditional = denoise(model, x.repeat(2, 1, 1, 1), texts, t).chunk(2)
    stepped = scheduler.step(null + 5.0 * (conditional - null), t, x).prev_sample
    assert len(slopes) == 1 and torch.isfinite(slopes[0]).all() and torch.isfinite(stepped).all()

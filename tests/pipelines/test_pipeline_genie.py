"""`GeniePipeline`: unconditional, class-conditional and guided sampling in pixel space."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from genie_diffusers import ExactSlope, GeniePipeline, GenieScheduler, GenieUNet2DModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

NULL = 3  # of the four classes of the class-conditional UNets below


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch_size, 3, 8, 8), generator=seeded(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(make_unet):
    return quiet(GeniePipeline(make_unet(), GenieScheduler()))


@pytest.fixture
def class_pipe(make_unet):
    return quiet(GeniePipeline(make_unet(num_class_embeds=4), GenieScheduler()))


@pytest.fixture
def head_pipe(make_genie_unet):
    return quiet(GeniePipeline(make_genie_unet(num_class_embeds=4), GenieScheduler()))


class Calls(list):
    """The batch sizes of a UNet's calls."""

    def __init__(self, unet):
        unet.register_forward_hook(lambda module, args, output: self.append(len(args[0])))


@torch.no_grad()
def reference(scheduler, num_inference_steps: int, sample: torch.Tensor, predict) -> torch.Tensor:
    """Sampling written out: `predict(model_input, t)` is the model."""
    scheduler.set_timesteps(num_inference_steps)
    sample = sample * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(predict(model_input, t), t, sample).prev_sample
    return sample


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_unconditional_samples_are_those_of_the_scheduler(pipe):
    images = pipe(num_inference_steps=5, latents=noise(2), output_type="latent").images
    expected = reference(GenieScheduler(), 5, noise(2), lambda x, t: pipe.unet(x, t).sample)
    assert torch.isfinite(images).all()
    torch.testing.assert_close(images, expected)


def test_initial_noise_comes_from_the_generator(pipe):
    drawn = pipe(batch_size=2, generator=seeded(4), output_type="latent").images
    torch.testing.assert_close(drawn, pipe(latents=noise(2, seed=4), output_type="latent").images)
    torch.testing.assert_close(drawn, pipe(batch_size=2, generator=seeded(4), output_type="latent").images)
    assert not torch.allclose(drawn, pipe(batch_size=2, generator=seeded(5), output_type="latent").images)


@pytest.mark.parametrize("labels", [[1, 0], (1, 0), torch.tensor([1, 0]), np.array([1, 0])])
def test_classes_reach_the_unet(class_pipe, labels):
    images = class_pipe(class_labels=labels, latents=noise(2), num_inference_steps=4, output_type="latent").images

    def predict(x, t):
        return class_pipe.unet(x, t, class_labels=torch.tensor([1, 0])).sample

    torch.testing.assert_close(images, reference(GenieScheduler(), 4, noise(2), predict))


def test_one_classis_for_all_images(class_pipe):
    options = {"latents": noise(2), "batch_size": 2, "num_inference_steps": 3, "output_type": "latent"}
    one = class_pipe(class_labels=1, **options).images
    torch.testing.assert_close(one, class_pipe(class_labels=[1, 1], **options).images)
    assert not torch.allclose(one, class_pipe(class_labels=[1, 2], **options).images)


def test_a_class_conditional_model_without_classes_draws_the_null_class(class_pipe):
    options = {"latents": noise(2), "num_inference_steps": 3, "output_type": "latent"}
    unconditional = class_pipe(**options).images
    torch.testing.assert_close(unconditional, class_pipe(class_labels=[NULL, NULL], **options).images)
    assert not torch.allclose(unconditional, class_pipe(class_labels=[0, 0], **options).images)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pictures_on_further_channels_reach_the_unet(make_unet, guidance_scale):
    pipe = quiet(GeniePipeline(make_unet(in_channels=5, num_class_embeds=4), GenieScheduler()))
    picture = torch.rand(2, 2, 8, 8, generator=seeded(7))
    options = {"class_labels": [1, 0], "guidance_scale": guidance_scale, "latents": noise(2), "image": picture}
    images = pipe(**options, num_inference_steps=4, output_type="latent").images

    def predict(x, t):
        x = torch.cat([x, picture], dim=1)
        null = pipe.unet(x, t, class_labels=torch.tensor([NULL, NULL])).sample
        towards = pipe.unet(x, t, class_labels=torch.tensor([1, 0])).sample
        return null + guidance_scale * (towards - null)

    torch.testing.assert_close(images, reference(GenieScheduler(), 4, noise(2), predict), rtol=1e-3, atol=2e-3)
    for wrong in (None, picture[:, :1], picture[..., :4]):
        with pytest.raises(ValueError, match=r"`image` must have shape \(2, 2, 8, 8\) for this UNet"):
            pipe(**{**options, "image": wrong})
    with pytest.raises(ValueError, match="`image` must be left out for a UNet without channels for it"):
        quiet(GeniePipeline(make_unet(), GenieScheduler()))(image=picture)


def test_guidance_follows_its_formula(class_pipe):
    options = {"class_labels": [1, 0], "latents": noise(2), "num_inference_steps": 4, "output_type": "latent"}
    guided = class_pipe(guidance_scale=3.0, **options).images

    def predict(x, t):
        null = class_pipe.unet(x, t, class_labels=torch.tensor([NULL, NULL])).sample
        towards = class_pipe.unet(x, t, class_labels=torch.tensor([1, 0])).sample
        return null + 3.0 * (towards - null)

    torch.testing.assert_close(guided, reference(GenieScheduler(), 4, noise(2), predict), rtol=1e-3, atol=2e-3)
    assert not torch.allclose(guided, class_pipe(**options).images, rtol=1e-2)


def test_guidance_scale_one_is_no_guidance_on_half_the_batch(class_pipe):
    calls = Calls(class_pipe.unet)
    options = {"class_labels": [1, 0], "latents": noise(2), "num_inference_steps": 3, "output_type": "latent"}
    class_pipe(guidance_scale=1.0, **options)
    assert calls == [2, 2, 2]
    calls.clear()
    nearly = class_pipe(guidance_scale=1.0 + 1e-6, **options).images
    assert calls == [4, 4, 4]
    torch.testing.assert_close(class_pipe(**options).images, nearly, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_head_is_attached_when_the_pipeline_is_built_and_follows_the_guided_path(make_genie_unet, guidance_scale):
    head_pipe = quiet(GeniePipeline(make_genie_unet(num_class_embeds=4), GenieScheduler(method="taylor")))
    options = {"class_labels": [1, 0], "latents": noise(2), "num_inference_steps": 4, "output_type": "latent"}
    images = head_pipe(guidance_scale=guidance_scale, **options).images

    # The Taylor step x̄ + h ε + ½ h² dε/dγ with the head called on each branch by itself, dε/dγ = −(1/γ) dε/dλ.
    unet, x = head_pipe.unet, noise(2)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    levels = [(a.sqrt().item(), (1 - a).sqrt().item()) for a in alphas_cumprod[head_pipe.scheduler.timesteps]]
    for i, t in enumerate(head_pipe.scheduler.timesteps):
        (alpha, sigma), (alpha_next, sigma_next) = [*levels, (1.0, 0.0)][i : i + 2]
        gamma, h = sigma / alpha, sigma_next / alpha_next - sigma / alpha
        with torch.no_grad():
            calls = []
            for labels in ([NULL, NULL], [1, 0]):
                unet(x, t, class_labels=torch.tensor(labels))
                calls.append(unet.last_call)
            null, towards = (call["output"] for call in calls)
            epsilon = null + guidance_scale * (towards - null)
            of_null, of_class = (
                unet.derivative_head(x, epsilon, call["features"], call["time_embedding"], alpha, sigma)
                for call in calls
            )
        slope = of_null + guidance_scale * (of_class - of_null)
        taylor = -0.5 * h**2 / gamma * slope if i < 3 else 0.0  # the last step, to clean data, is x_0
        x = alpha_next * (x / alpha + h * epsilon + taylor)
    torch.testing.assert_close(images, x, rtol=1e-3, atol=2e-3)

    head_pipe.scheduler.attach(None)
    without = head_pipe(guidance_scale=guidance_scale, **options).images
    assert (images - without).norm() > 0.05 * without.norm()


def test_the_head_follows_whatever_scheduler_or_unet_is_assigned_later(make_unet, head_pipe):
    options = {"latents": noise(2), "num_inference_steps": 4, "output_type": "latent"}
    unet, with_head = head_pipe.unet, head_pipe(**options).images
    head_pipe.scheduler = GenieScheduler.from_config(head_pipe.scheduler.config)
    torch.testing.assert_close(head_pipe(**options).images, with_head)
    head_pipe.scheduler.attach(None)
    without = head_pipe(**options).images
    assert not torch.allclose(with_head, without, rtol=1e-2)
    head_pipe.unet = unet
    torch.testing.assert_close(head_pipe(**options).images, with_head)
    pipe = quiet(GeniePipeline(make_unet(num_class_embeds=4), GenieScheduler()))
    torch.testing.assert_close(pipe(**options).images, without)
    pipe.unet = GenieUNet2DModel.from_unet(pipe.unet, unet.derivative_head)
    torch.testing.assert_close(pipe(**options).images, with_head)


def test_the_head_leaves_with_its_unet(make_unet, make_genie_unet):
    pipe = quiet(GeniePipeline(make_genie_unet(), GenieScheduler()))
    pipe.unet = make_unet()
    images = pipe(latents=noise(2), num_inference_steps=4, output_type="latent").images
    plain = quiet(GeniePipeline(pipe.unet, GenieScheduler()))
    expected = plain(latents=noise(2), num_inference_steps=4, output_type="latent").images
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


def test_a_head_for_another_noise_schedule_is_refused(make_genie_unet):
    unet = make_genie_unet({"beta_end": 0.02})
    with pytest.raises(ValueError, match="another noise schedule"):
        GeniePipeline(unet, GenieScheduler(beta_end=0.01))
    with pytest.raises(ValueError, match="`prediction_type='epsilon'`"):
        GeniePipeline(unet, GenieScheduler(prediction_type="v_prediction"))


def test_a_unet_with_a_head_serves_schedulers_that_know_nothing_of_it(head_pipe, class_pipe):
    options = {"latents": noise(2), "class_labels": [0, 1], "num_inference_steps": 3, "output_type": "latent"}
    head_pipe.scheduler = class_pipe.scheduler = DDIMScheduler(clip_sample=False)
    torch.testing.assert_close(head_pipe(**options).images, class_pipe(**options).images)


@pytest.mark.parametrize("source", ["history", "head", "exact"])
@pytest.mark.parametrize("config", [{}, {"thresholding": True}], ids=["free", "thresholded"])
def test_one_generator_per_image_gives_the_same_images_for_any_split_into_batches(head_pipe, source, config):
    head_pipe.scheduler = GenieScheduler(**config)
    if source != "history":
        head_pipe.scheduler.attach(head_pipe.unet if source == "head" else ExactSlope(head_pipe.unet))
    guidance_scale = 1.0 if config else 2.0

    def draw(seeds):
        return head_pipe(
            class_labels=[seed % 3 for seed in seeds],
            guidance_scale=guidance_scale,
            generator=[seeded(seed) for seed in seeds],
            num_inference_steps=3,
            output_type="latent",
        ).images

    whole = draw([0, 1, 2, 3])
    parts = torch.cat([draw([0]), draw([1, 2]), draw([3])])
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=2e-3 * whole.std().item())


# --- number of model calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analytical_first_step", [False, True])
@pytest.mark.parametrize("source", ["history", "head"])
@pytest.mark.parametrize("num_inference_steps", [1, 2, 5])
def test_model_calls_are_as_many_as_asked_for(head_pipe, analytical_first_step, source, num_inference_steps):
    head_pipe.scheduler = GenieScheduler(analytical_first_step=analytical_first_step)
    if source == "head":
        head_pipe.scheduler.attach(head_pipe.unet)
    calls = Calls(head_pipe.unet)
    assert torch.isfinite(head_pipe(num_inference_steps=num_inference_steps, output_type="latent").images).all()
    assert calls == [1] * num_inference_steps


def test_analytical_first_step_starts_from_the_rescaled_noise(pipe):
    pipe.scheduler = GenieScheduler(analytical_first_step=True)
    seen = []
    pipe.unet.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    pipe(latents=noise(1), num_inference_steps=4)
    assert pipe.scheduler.init_noise_sigma != 1.0
    torch.testing.assert_close(seen[0], noise(1) * pipe.scheduler.init_noise_sigma)


# --- schedulers of diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, stock_class",
    [(DDIMScheduler(clip_sample=False), DDIMPipeline), (DDPMScheduler(clip_sample=True), DDPMPipeline)],
    ids=["DDIM", "DDPM"],
)
def test_images_are_those_of_the_stock_pipeline_with_its_scheduler(make_unet, scheduler, stock_class):
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    ours = quiet(GeniePipeline(make_unet(), scheduler))
    stock = quiet(stock_class(make_unet(), scheduler))
    images = ours(generator=seeded(), **options).images
    np.testing.assert_allclose(images, stock(generator=seeded(), **options).images, atol=1e-5)
    assert 0.01 < images.std()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        DPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_deterministic_schedulers_of_diffusers_work(class_pipe, scheduler, guidance_scale):
    class_pipe.scheduler = scheduler
    images = class_pipe(
        class_labels=[1, 0],
        guidance_scale=guidance_scale,
        latents=noise(2),
        num_inference_steps=4,
        output_type="latent",
    ).images

    def predict(x, t):
        null = class_pipe.unet(x, t, class_labels=torch.tensor([NULL, NULL])).sample
        return null + guidance_scale * (class_pipe.unet(x, t, class_labels=torch.tensor([1, 0])).sample - null)

    torch.testing.assert_close(images, reference(scheduler, 4, noise(2), predict), rtol=1e-3, atol=1e-2)


def test_stochastic_schedulers_of_diffusers_draw_from_the_generator(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler()
    first, again, other = (
        pipe(generator=seeded(seed), latents=noise(1), output_type="latent").images for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-2)


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_callback_is_told_of_every_step(pipe):
    told = []

    def callback(pipeline, i, t, tensors):
        told.append((pipeline, i, int(t), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {}

    images = pipe(latents=noise(2), num_inference_steps=3, callback_on_step_end=callback).images
    timesteps = pipe.scheduler.timesteps.tolist()
    assert told == [(pipe, i, timesteps[i], {"latents": (2, 3, 8, 8)}) for i in range(3)]
    assert len(images) == 2


def test_callback_that_returns_nothing_changes_nothing(pipe):
    options = {"latents": noise(2), "num_inference_steps": 3, "output_type": "latent"}
    watched = pipe(callback_on_step_end=lambda *args: None, **options).images
    assert torch.equal(watched, pipe(**options).images)


def test_callback_may_ask_for_nothing(pipe):
    told = []
    pipe(
        num_inference_steps=2,
        callback_on_step_end=lambda pipeline, i, t, tensors: told.append(tensors),
        callback_on_step_end_tensor_inputs=(),
    )
    assert told == [{}, {}]


def test_an_edit_by_a_callback_is_where_the_next_step_starts(pipe):
    shift = noise(2, seed=9)

    def callback(pipeline, i, t, tensors):
        return {"latents": tensors["latents"] + shift} if i in (1, 3) else {}

    options = {"latents": noise(2), "num_inference_steps": 4, "output_type": "latent"}
    edited = pipe(callback_on_step_end=callback, **options).images

    scheduler, x = GenieScheduler(), noise(2)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
            x = x + shift if i in (1, 3) else x
    torch.testing.assert_close(edited, x)


def test_an_error_in_a_callback_reaches_the_caller_and_the_pipeline_can_be_used_again(pipe):
    def callback(pipeline, i, t, tensors):
        raise RuntimeError("stop")

    options = {"latents": noise(1), "num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(**options).images
    with pytest.raises(RuntimeError, match="stop"):
        pipe(callback_on_step_end=callback, **options)
    assert torch.equal(pipe(**options).images, expected)


# --- outputs and errors ----------------------------------------------------------------------------------------------


def test_output_types_are_the_same_images(pipe):
    options = {"latents": noise(2), "num_inference_steps": 3}
    latent = pipe(output_type="latent", **options).images
    expected = (latent / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe(output_type="pt", **options).images, expected)
    arrays = pipe(output_type="np", **options).images
    np.testing.assert_allclose(arrays, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pictures = pipe(**options).images
    assert len(pictures) == 2 and all(isinstance(picture, PIL.Image.Image) for picture in pictures)
    assert np.abs(np.stack(pictures) / 255 - arrays).max() <= 0.51 / 255
    as_tuple = pipe(output_type="latent", return_dict=False, **options)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1 and torch.equal(as_tuple[0], latent)


def test_one_image_is_drawn_by_default(pipe, class_pipe):
    assert len(pipe(num_inference_steps=1).images) == 1
    assert len(class_pipe(class_labels=2, num_inference_steps=1).images) == 1
    assert len(class_pipe(class_labels=[2, 1], num_inference_steps=1).images) == 2
    assert len(pipe(generator=[seeded(0), seeded(1)], num_inference_steps=1).images) == 2


def test_rectangular_images(make_unet):
    pipe = quiet(GeniePipeline(make_unet(sample_size=(8, 16)), GenieScheduler()))
    assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 16)


def test_latents_are_left_as_they_are(pipe):
    latents = noise(1)
    pipe(latents=latents, num_inference_steps=2)
    assert torch.equal(latents, noise(1))


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"class_labels": 4}, ("`class_labels`", "between 0 and 3", "4")),
        ({"class_labels": [0, -1]}, ("`class_labels`", "between 0 and 3", "[0, -1]")),
        ({"class_labels": []}, ("`class_labels`", "[]")),
        ({"class_labels": [[0, 1]]}, ("`class_labels`", "[[0, 1]]")),
        ({"class_labels": 1.5}, ("`class_labels`", "1.5")),
        ({"guidance_scale": 2.0}, ("`guidance_scale=2.0`", "`class_labels`")),
        ({"batch_size": 0}, ("`batch_size`", "got 0")),
        ({"batch_size": 3, "class_labels": [0, 1]}, ("'batch_size': 3", "'class_labels': 2")),
        ({"batch_size": 3, "latents": noise(2)}, ("'batch_size': 3", "'latents': 2")),
        ({"generator": [seeded(), seeded()], "class_labels": [0]}, ("'generator': 2", "'class_labels': 1")),
        ({"latents": torch.zeros(2, 3, 8, 9)}, ("`latents`", "(2, 3, 8, 8)", "(2, 3, 8, 9)")),
        ({"num_inference_steps": 0}, ("`num_inference_steps`", "got 0")),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ("`callback_on_step_end_tensor_inputs`", "'noise'")),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_errors_before_the_model_is_called(class_pipe, options, parts):
    calls = Calls(class_pipe.unet)
    with pytest.raises(ValueError) as error:
        class_pipe(**options)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".")
    assert calls == []


def test_classes_for_an_unconditional_model_are_an_error(pipe):
    with pytest.raises(ValueError, match="`class_labels` are given, but the model is not class-conditional"):
        pipe(class_labels=1)


def test_half_precision_images_are_those_of_float32(head_pipe):
    options = {"latents": noise(1), "num_inference_steps": 3, "output_type": "np"}
    expected = head_pipe(**options).images
    head_pipe.to(torch.bfloat16)
    assert head_pipe(**{**options, "output_type": "latent"}).images.dtype == torch.bfloat16
    assert np.abs(head_pipe(**options).images - expected).mean() < 0.02


def test_saved_pipeline_draws_the_same_images(head_pipe, tmp_path):
    options = {"latents": noise(1), "num_inference_steps": 3, "output_type": "latent"}
    expected = head_pipe(**options).images
    head_pipe.save_pretrained(tmp_path)
    loaded = quiet(GeniePipeline.from_pretrained(tmp_path))
    assert isinstance(loaded.unet, GenieUNet2DModel) and isinstance(loaded.scheduler, GenieScheduler)
    torch.testing.assert_close(loaded(**options).images, expected)

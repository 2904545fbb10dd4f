"""What slope sources learn of the calls of their model, what they leave at it, and what they refuse."""

import copy
import gc
import io
import pickle
import threading
import weakref

import accelerate
import pytest
import torch
import torch.utils.checkpoint
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import ImageProjection
from diffusers.models.embeddings import MultiIPAdapterImageProjection as ImageProjections
from peft import LoHaConfig, LoraConfig, OFTConfig, inject_adapter_in_model

from genie_diffusers import (
    DerivativeHead,
    ExactSlope,
    GenieScheduler,
    GenieUNet2DModel,
    StepHead,
    VariancePreserving,
)
from genie_diffusers.models.derivative_head import fingerprint
from genie_diffusers.models.guidance import MAX_CALLS
from genie_diffusers.models.sources import CallRecord, ModelCall

TIMESTEP = 500
NULL, LABELS = torch.tensor([3, 3]), torch.tensor([0, 2])
kinds = pytest.mark.parametrize("kind", ["head", "exact slope"])


@pytest.fixture
def head_for():
    def build(model, head_class=DerivativeHead, **scheduler_config):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            head = head_class.for_unet(model, scheduler_config, width=16)
            torch.nn.init.normal_(head.conv_out.weight, std=0.1)
        return head

    return build


@pytest.fixture
def make(unet, head_for):
    """Builds a model and a source of its slopes that is bound to the default process."""

    def build(kind, prediction_type="epsilon"):
        model = unet()
        if kind == "head":
            model = GenieUNet2DModel.from_unet(model, head_for(model, prediction_type=prediction_type))
        source = model.slope_source if kind == "head" else ExactSlope(model)
        source.bind(VariancePreserving.from_config({}), prediction_type)
        return model, source

    return build


@torch.no_grad()
def denoise(model, x, labels=LABELS, t=TIMESTEP):
    return model(x, t, class_labels=labels).sample


def hooks(model) -> int:
    return sum(len(vars(module)[kind]) for module in model.modules() for kind in vars(module) if "_hooks" in kind)


def draw(scheduler, model, sample, steps=4):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        sample = scheduler.step(denoise(model, sample, t=t), t, sample).prev_sample
    return sample


# --- branches --------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("with_output", [False, True], ids=["from ε", "model output"])
def test_guidance_in_two_calls_has_the_slope_of_guidance_in_one(make, noise, kind, prediction_type, with_output):
    (model, source), x = make(kind, prediction_type), noise(2, 2, 8, 8)
    process = VariancePreserving.from_config({})
    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    slopes = []
    for calls in (1, 2):
        if calls == 1:
            null, conditional = denoise(model, torch.cat([x, x]), torch.cat([NULL, LABELS])).chunk(2)
        else:
            conditional, null = denoise(model, x), denoise(model, x, NULL)
        output = null + 5.0 * (conditional - null)
        epsilon = output if prediction_type == "epsilon" else alpha * output + sigma * x
        given = {"model_output": output} if with_output else {}
        slopes.append(source(x, epsilon, TIMESTEP, **given))
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    unguided = source(x, epsilon_of(model, x, prediction_type), TIMESTEP)
    assert (unguided - slopes[0]).norm() > 0.05 * slopes[0].norm()


def epsilon_of(model, x, prediction_type):
    process = VariancePreserving.from_config({})
    output = denoise(model, x)
    alpha, sigma = float(process.alpha(TIMESTEP)), float(process.sigma(TIMESTEP))
    return output if prediction_type == "epsilon" else alpha * output + sigma * x


@kinds
def test_a_call_of_two_branches_and_one_of_a_third_are_three_branches(make, noise, kind):
    """As with skip-layer guidance: null and text in one call, the text again, perturbed, in another."""
    (model, source), x = make(kind), noise(2, 2, 8, 8)
    other = torch.tensor([1, 1])

    def together():
        return denoise(model, x.repeat(3, 1, 1, 1), torch.cat([NULL, LABELS, other])).chunk(3)

    def apart():
        return (*denoise(model, x.repeat(2, 1, 1, 1), torch.cat([NULL, LABELS])).chunk(2), denoise(model, x, other))

    slopes = []
    for call in (together, apart):
        null, text, skipped = call()
        slopes.append(source(x, null + 4.0 * (text - null) + 2.0 * (text - skipped), TIMESTEP))
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


@kinds
def test_a_guided_run_is_the_same_in_one_call_and_in_two(make, noise, kind):
    model, source = make(kind)
    drawn = []
    for calls in (1, 2):
        scheduler, x = GenieScheduler(time_grid="uniform_lambda"), noise(2, 2, 8, 8)
        scheduler.attach(source)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            if calls == 1:
                null, text = denoise(model, torch.cat([x, x]), torch.cat([NULL, LABELS]), t).chunk(2)
            else:
                null, text = denoise(model, x, NULL, t), denoise(model, x, LABELS, t)
            x = scheduler.step(null + 4.0 * (text - null), t, x).prev_sample
        drawn.append(x)
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)


@kinds
def test_a_prediction_that_is_not_the_output_of_the_only_call_is_refused(make, noise, kind):
    (model, source), x = make(kind), noise(2, 2, 8, 8)
    output = denoise(model, x)
    for wrong in (1.01 * output, output.clamp(-0.05, 0.05), torch.cat([output[:1], 1.1 * output[1:]])):
        with pytest.raises(ValueError, match="not the output of the model's only call"):
            source(x, wrong, TIMESTEP)
        with pytest.raises(ValueError, match="not the output of the model's only call"):
            source(x, output, TIMESTEP, model_output=wrong)
    rounded = output.half()
    assert torch.isfinite(source(x, output, TIMESTEP, model_output=rounded)).all()


def test_guidance_of_both_halves_of_the_sample_is_refused():
    """DiT steps both halves of its batch, each with the guided prediction of the first channels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.4)
    scheduler = GenieScheduler(variance_type="learned_range")
    scheduler.attach(ExactSlope(transformer))
    pipe = DiTPipeline(transformer, AutoencoderKL(block_out_channels=(4,), norm_num_groups=2), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=[1], num_inference_steps=3, guidance_scale=1.0, output_type="np")
    with pytest.raises(ValueError, match="only call"):
        pipe(class_labels=[1], num_inference_steps=3, guidance_scale=4.0, output_type="np")


@kinds
def test_calls_with_another_sample_before_those_of_the_step_are_no_branches(make, noise, kind):
    (model, source), x = make(kind), noise(2, 2, 8, 8)
    expected = source(x, denoise(model, x), TIMESTEP)
    denoise(model, x + 1)
    denoise(model, noise(1, 2, 8, 8), LABELS[:1])
    torch.testing.assert_close(source(x, denoise(model, x), TIMESTEP), expected)
    for _ in range(2 * MAX_CALLS):
        denoise(model, x + 1)
    torch.testing.assert_close(source(x, denoise(model, x), TIMESTEP), expected)


@kinds
def test_more_calls_than_are_remembered_are_refused(make, noise, kind):
    (model, source), x = make(kind), noise(2, 2, 8, 8)
    for _ in range(MAX_CALLS):
        output = denoise(model, x)
    source(x, output, TIMESTEP)
    for _ in range(MAX_CALLS + 1):
        output = denoise(model, x)
    with pytest.raises(ValueError, match=f"more than {MAX_CALLS} times"):
        source(x, output, TIMESTEP)


def test_at_zero_snr_the_branches_are_compared_with_what_the_step_was_given(unet, head_for, noise):
    """ε in half precision has lost v there: 1/α is about 4,000."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plain = unet()
    model = GenieUNet2DModel.from_unet(plain, head_for(plain, **config)).half()
    scheduler, x = GenieScheduler(**config, method="taylor"), noise(2, 2, 8, 8).half()
    scheduler.attach(model)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    output = denoise(model, x, t=t)
    assert torch.isfinite(scheduler.step(output, t, x).prev_sample).all()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="only call"):
        scheduler.step(1.5 * denoise(model, x, t=t), t, x)


# --- what is left at the model ---------------------------------------------------------------------------------------


def test_a_head_leaves_the_plain_unet_as_it_was(unet, head_for, noise):
    plain = unet()
    before, keys = hooks(plain), [set(vars(child)) for child in plain.children()]
    models = [GenieUNet2DModel.from_unet(plain, head_for(plain)) for _ in range(3)]
    sources = [model.slope_source for model in models]
    denoise(plain, noise(2, 2, 8, 8))
    assert hooks(plain) == before and [set(vars(child)) for child in plain.children()] == keys
    assert all(model.last_call is None for model in models)
    gone = [weakref.ref(each) for each in (*models, *sources)]
    del models, sources
    gc.collect()
    assert not any(reference() for reference in gone)
    assert hooks(copy.deepcopy(plain)) == before


def test_a_head_in_the_place_of_another_is_the_only_one_that_listens(unet, head_for, noise):
    plain, x = unet(), noise(2, 2, 8, 8)
    first = GenieUNet2DModel.from_unet(plain, head_for(plain))
    second = GenieUNet2DModel.from_unet(first, head_for(plain))
    assert hooks(second) == hooks(first)
    with first.recording(), second.recording():
        denoise(second, x)
        assert first.last_call is None and torch.equal(second.last_call["sample"], x)


def test_modules_that_are_listened_to_follow_those_of_the_plain_unet(unet, head_for, noise):
    plain, x = unet(), noise(2, 2, 8, 8)
    model = GenieUNet2DModel.from_unet(plain, head_for(plain))
    seen = []
    with torch.no_grad():
        plain.conv_norm_out.weight.mul_(2.0)
    torch.testing.assert_close(denoise(model, x), denoise(plain, x))
    without = denoise(plain, x)
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["time_embedding.linear_1"], init_lora_weights=False), model
    )
    model.double()
    assert not torch.allclose(denoise(plain, x), without, rtol=1e-3)
    torch.testing.assert_close(denoise(model, x), denoise(plain, x))
    model.to("meta")
    assert all(parameter.is_meta for parameter in plain.parameters())
    hooked = unet()
    hooked.conv_norm_out.register_forward_hook(lambda module, args, output: seen.append(module))
    denoise(GenieUNet2DModel.from_unet(hooked, head_for(hooked)), x)
    assert len(seen) == 1  # the hooks it came with


@kinds
def test_nothing_is_recorded_but_for_whoever_listens(make, noise, kind):
    model, source = make(kind)
    record, x = source._record, noise(2, 2, 8, 8)
    before = hooks(model)
    scheduler, other = GenieScheduler(), GenieScheduler()
    scheduler.attach(source)
    other.attach(source)
    scheduler.attach(None)
    denoise(model, x)
    assert len(record.calls()) == 1
    other.attach(None)
    denoise(model, x)
    assert not record.calls() and not record.recording
    if kind == "exact slope":
        assert hooks(model) < before
    scheduler.attach(source)  # and again
    assert torch.isfinite(draw(scheduler, model, x)).all() and hooks(model) == before


@kinds
def test_a_source_is_released_with_its_scheduler_or_by_itself(make, noise, kind):
    model, source = make(kind)
    record, left = source._record, 0 if kind == "exact slope" else hooks(model)
    scheduler = GenieScheduler()
    scheduler.attach(source)
    copied = copy.deepcopy(scheduler)
    del scheduler
    gc.collect()
    assert record.recording
    del copied
    gc.collect()
    assert not record.recording
    assert hooks(model) == left
    model, never_attached = make(kind)
    record = never_attached._record
    assert record.recording
    del never_attached
    gc.collect()
    assert not record.recording and hooks(model) == left


@kinds
def test_no_activation_and_no_graph_survives_a_step(make, noise, kind):
    model, source = make(kind)
    scheduler = GenieScheduler(method="taylor")
    scheduler.attach(source)
    scheduler.set_timesteps(4)
    x = noise(2, 2, 8, 8).requires_grad_()
    for i, t in enumerate(scheduler.timesteps):
        output = model(x, t, class_labels=LABELS).sample
        assert all(not call.output.requires_grad and not call.sample.requires_grad for call in source._record.calls())
        x = scheduler.step(output.detach(), t, x.detach()).prev_sample.detach().requires_grad_()
        assert not source._record.calls(), i  # the last step of a Taylor run asks for no slope


@pytest.mark.parametrize("differentiable", [False, True])
def test_gradients_flow_through_what_a_head_reads_if_that_is_asked_for(unet, head_for, noise, differentiable):
    plain = unet().requires_grad_(False)
    model, x = GenieUNet2DModel.from_unet(plain, head_for(plain)), noise(2, 2, 8, 8)
    source = model.slope_source.differentiable() if differentiable else model.slope_source
    source.bind(VariancePreserving.from_config({}), "epsilon")
    output = model(x.requires_grad_(), TIMESTEP, class_labels=LABELS).sample
    features = model.last_call["features"]
    assert features.requires_grad == differentiable
    slope = source(x.detach(), output.detach(), TIMESTEP)
    gradient = torch.autograd.grad(slope.sum(), x, allow_unused=True)[0]
    assert (gradient is not None) == differentiable
    assert not source._record.calls()


def test_what_a_backward_pass_repeats_is_no_call(unet, head_for, noise):
    plain = unet()
    model = GenieUNet2DModel.from_unet(plain, head_for(plain))
    run = model.forward
    model.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        run, *args, use_reentrant=False, **kwargs
    )
    with model.recording():
        output = model(noise(2, 2, 8, 8), TIMESTEP, class_labels=LABELS).sample
        model._calls.forget()
        output.sum().backward()
        register = model._calls.register()
        assert register.features is None and register.time_embedding is None and model.last_call is None


@kinds
def test_forward_mode_leaves_no_call_behind(make, noise, kind):
    """Of an exact slope of a UNet whose head is attached elsewhere."""
    (model, source), x = make("head"), noise(2, 2, 8, 8)
    exact = ExactSlope(model)
    exact.bind(VariancePreserving.from_config({}), "epsilon")
    output = denoise(model, x)
    exact(x, output, TIMESTEP)
    assert len(source._record.calls()) == 1 and not exact._record.calls()
    assert torch.isfinite(source(x, output, TIMESTEP)).all()


# --- copies, threads, offloading, compilation ------------------------------------------------------------------------


@kinds
def test_a_copied_scheduler_goes_on_with_the_model_that_is_called(make, noise, kind):
    model, source = make(kind)
    scheduler, x = GenieScheduler(), noise(2, 2, 8, 8)
    scheduler.attach(source)
    expected = draw(scheduler, model, x)
    scheduler.set_timesteps(4)
    for copied in (copy.deepcopy(scheduler), copy.copy(scheduler)):
        assert copied._slope_source is source
        torch.testing.assert_close(draw(copied, model, x), expected)
    state = copy.deepcopy(vars(scheduler))  # as `StableDiffusionPanoramaPipeline` does for each view
    vars(scheduler).update(state)
    torch.testing.assert_close(draw(scheduler, model, x), expected)


@kinds
def test_a_pickled_scheduler_has_no_source(make, noise, kind):
    model, source = make(kind)
    scheduler = GenieScheduler()
    scheduler.attach(source)
    loaded = pickle.loads(pickle.dumps(scheduler))
    assert loaded._slope_source is None and torch.isfinite(draw(loaded, model, noise(2, 2, 8, 8))).all()
    scheduler.set_timesteps(4)
    loaded = pickle.loads(pickle.dumps(scheduler))
    x, t = noise(2, 2, 8, 8), loaded.timesteps[0]
    with pytest.raises(ValueError, match="`attach` it again"):
        loaded.step(denoise(model, x, t=t), t, x)


@kinds
def test_a_copied_model_is_whole_and_nobody_listens_to_it(make, noise, kind):
    (model, source), x = make(kind), noise(2, 2, 8, 8)
    new, called = io.BytesIO(), io.BytesIO()
    torch.save(model, new)
    model(x, TIMESTEP, class_labels=LABELS).sample.mean().backward()
    model.zero_grad(set_to_none=True)
    torch.save(model, called)
    assert len(called.getvalue()) == len(new.getvalue())
    copied = copy.deepcopy(model)
    source.forget()
    torch.testing.assert_close(denoise(copied, x), denoise(model, x))
    assert len(source._record.calls()) == 1
    if kind == "head":
        scheduler = GenieScheduler()
        scheduler.attach(copied)
        assert torch.isfinite(draw(scheduler, copied, x)).all()


@kinds
def test_threads_with_a_scheduler_each_share_a_model(make, noise, kind):
    model, _ = make(kind)
    results: dict[int, torch.Tensor] = {}

    def request(seed):
        scheduler = GenieScheduler()
        scheduler.attach(model if kind == "head" else ExactSlope(model))
        results[seed] = draw(scheduler, model, noise(2, 2, 8, 8, seed=seed), 10)

    threads = [threading.Thread(target=request, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared = dict(results)
    assert sorted(shared) == [0, 1, 2]
    for seed, drawn in shared.items():
        request(seed)
        torch.testing.assert_close(drawn, results[seed], rtol=1e-8, atol=1e-8)


def test_a_call_belongs_to_its_thread():
    record = CallRecord()
    record.start()
    here, there, seen = ModelCall("here"), ModelCall("there"), []
    record.add(here)
    thread = threading.Thread(target=lambda: (record.add(there), seen.extend(record.calls()), record.forget()))
    thread.start()
    thread.join()
    assert seen == [there] and record.calls() == [here]
    record.stop()
    assert record.calls() == []


@pytest.mark.parametrize("kind", ["sequential", "model", "group"])
@pytest.mark.parametrize("when", ["before the head", "after the head"])
def test_offloading(unet, head_for, noise, kind, when):
    plain, x, cpu = unet(), noise(2, 2, 8, 8), torch.device("cpu")
    head, used = head_for(plain), []

    def offload(model):
        if kind == "sequential":
            accelerate.cpu_offload(model, cpu, offload_buffers=True)
        elif kind == "group":
            model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        else:
            _, hook = accelerate.cpu_offload_with_hook(model, cpu)
            fetch = hook.hook.pre_forward
            hook.hook.pre_forward = lambda module, *args, **kwargs: (
                used.append(module) or fetch(module, *args, **kwargs)
            )

    scheduler, model = GenieScheduler(), GenieUNet2DModel.from_unet(plain, head)
    scheduler.attach(model)
    expected = draw(scheduler, model, x)
    if when == "after the head":
        model = GenieUNet2DModel.from_unet(plain, head)
        offload(model)
    else:
        offload(plain)
        if kind != "model":
            with pytest.raises(ValueError, match="Add the head first"):
                GenieUNet2DModel.from_unet(plain, head)
            return
        model = GenieUNet2DModel.from_unet(plain, head)
    scheduler.attach(model)
    torch.testing.assert_close(draw(scheduler, model, x), expected)
    assert used == ([model] * 4 if kind == "model" else [])


def test_a_head_that_is_offloaded_after_the_call_follows_the_sample(unet, head_for):
    """As group offloading by blocks does it; the meta device stands for an accelerator."""
    plain = unet()
    model = GenieUNet2DModel.from_unet(plain, head_for(plain)).to("meta")
    scheduler, x = GenieScheduler(), torch.empty(2, 2, 8, 8, device="meta", dtype=torch.float64)
    scheduler.attach(model)
    scheduler.set_timesteps(2, device="meta")
    scheduler.set_begin_index(0)
    model.derivative_head.to_empty(device="cpu")
    output = denoise(model, x, LABELS.to("meta"), scheduler.timesteps[0])
    assert scheduler.step(output, scheduler.timesteps[0], x).prev_sample.is_meta
    assert model.derivative_head.device.type == "meta"


def test_exact_slopes_of_an_offloaded_model(unet, noise):
    plain, x = unet(), noise(2, 2, 8, 8)
    scheduler = GenieScheduler()
    scheduler.attach(ExactSlope(plain))
    expected = draw(scheduler, plain, x)
    accelerate.cpu_offload(plain, torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(draw(scheduler, plain, x), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", ["group_offloading", "layerwise_casting"])
def test_exact_slopes_refuse_hooks_that_change_weights_while_the_model_is_called(unet, noise, when, hook):
    """Forward mode would end the process."""
    plain, x, cpu = unet().float(), noise(2, 2, 8, 8).float(), torch.device("cpu")
    scheduler = GenieScheduler()
    if when == "after":
        scheduler.attach(ExactSlope(plain))
    if hook == "group_offloading":
        plain.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        plain.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    if when == "before":
        scheduler.attach(ExactSlope(plain))
    with pytest.raises(ValueError, match=hook):
        draw(scheduler, plain, x)
    scheduler.attach(None)
    assert torch.isfinite(draw(scheduler, plain, x)).all()


def test_a_head_of_a_compiled_unet_is_one_of_the_unet_behind(unet, head_for, noise):
    plain, x = unet(), noise(2, 2, 8, 8)
    model = GenieUNet2DModel.from_unet(torch.compile(plain, backend="eager"), head_for(plain))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(denoise(model, x), denoise(plain, x))


def test_a_compiled_unet_is_compiled_once_however_often_it_is_called(unet, head_for, noise):
    plain, x = unet(), noise(2, 2, 8, 8)
    model = GenieUNet2DModel.from_unet(plain, head_for(plain))
    compilations, once = [], 0

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with model.recording():
        for calls in range(1, 2 * MAX_CALLS):
            denoise(compiled, x)
            assert len(model._calls.calls()) == min(calls, MAX_CALLS + 1)
            once = len(compilations) if calls == 1 else once
    assert len(compilations) == once > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_device_and_dtype_are_of_no_account(unet, head_for, noise, dtype):
    plain, x = unet(), noise(2, 2, 8, 8)
    head, expected = head_for(plain), fingerprint(plain)
    torch.set_default_device("meta")
    torch.set_default_dtype(dtype)
    try:
        assert fingerprint(plain) == expected
        model = GenieUNet2DModel.from_unet(plain, head)
        for source in (model, ExactSlope(plain)):
            scheduler = GenieScheduler()
            scheduler.attach(source)
            scheduler.set_timesteps(2, device="cpu")
            sample, denoiser = x, model if source is model else plain
            for t in scheduler.timesteps:
                with torch.no_grad():
                    output = denoiser(sample, t, class_labels=LABELS).sample
                sample = scheduler.step(output, t, sample).prev_sample
            assert sample.device.type == "cpu"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_exact_slopes_under_autocast_are_those_in_the_precision_of_the_weights(unet, noise, prediction_type):
    model, x = unet().float(), noise(2, 2, 8, 8).float()
    source = ExactSlope(model)
    source.bind(VariancePreserving.from_config({}), prediction_type)
    exact = source(x, epsilon_of(model, x, prediction_type), TIMESTEP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slope = source(x, epsilon_of(model, x, prediction_type).float(), TIMESTEP)
    assert (slope - exact).norm() < 0.05 * exact.norm()


# --- what a head is for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=2, target_modules=["to_q", "to_k"], use_dora=True, init_lora_weights=False),
        LoHaConfig(r=2, target_modules=["to_q", "to_k"], init_weights=False),
        OFTConfig(r=0, oft_block_size=4, target_modules=["to_q", "to_k"]),
        "IP-Adapter",
    ],
    ids=["DoRA", "LoHa", "OFT", "IP-Adapter"],
)
def test_adapters_are_none_of_the_fingerprint(text_unet, head_for, adapter):
    plain = text_unet()
    head = head_for(plain)
    if adapter == "IP-Adapter":
        weights = torch.nn.Linear(8, 8).double()
        for module in plain.modules():
            if type(module).__name__ == "Attention":
                module.processor = torch.nn.ModuleList([weights])
        projection = ImageProjection(image_embed_dim=4, cross_attention_dim=8, num_image_text_embeds=2)
        plain.encoder_hid_proj = ImageProjections([projection]).double()
    else:
        plain.add_adapter(adapter)
    assert fingerprint(plain) == head.config.fingerprint
    assert head.matches(plain)
    with torch.no_grad():
        plain.conv_in.weight.add_(torch.ones_like(plain.conv_in.weight))
    assert not head.matches(plain)


def test_a_head_says_which_term_of_a_row_it_provides(unet, head_for):
    plain = unet()
    terms = {DerivativeHead: "slope", StepHead: "residual"}
    for head_class, term in terms.items():
        model = GenieUNet2DModel.from_unet(plain, head_for(plain, head_class))
        assert model.slope_source.term == term
    assert ExactSlope(plain).term == "slope"

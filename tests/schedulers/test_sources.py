"""What a scheduler asks of the source that is attached to it, and tells it."""

import copy
import gc

import pytest
import torch

from genie_diffusers import (
    DerivativeHead,
    ExactSlope,
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMPipeline,
    GenieInverseScheduler,
    GeniePipeline,
    GenieScheduler,
    GenieUNet2DModel,
    GGDMScheduler,
    StepHead,
)

TABLES = {"2": {"timesteps": [900, 300], "weights": [[0.9, -0.2], [1.2, -0.4, 0.1]], "residuals": [0.1, 0.3]}}


class Source:
    """A source that notes whatever it is told."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        if name not in ("acquire", "release", "begin", "forget"):
            raise AttributeError(name)
        return lambda: self.events.append(name)

    def __call__(self, sample, noise_prediction, timestep, *, step, history_slope, model_output):
        self.events.append(model_output)
        return torch.zeros_like(sample)


@pytest.fixture
def genie_unet(unet):
    def build(head_class=DerivativeHead, tables=None, **config):
        model = unet(**config)
        head = head_class.for_unet(model, width=16)
        torch.nn.init.normal_(head.conv_out.weight, std=0.1)
        if tables is not None:
            head.register_to_config(tables=tables)
        return GenieUNet2DModel.from_unet(model, head)

    return build


@torch.no_grad()
def draw(scheduler, sample, model=None):
    for t in scheduler.timesteps:
        output = 0.5 * sample if model is None else model(sample, t, class_labels=torch.tensor([0, 2])).sample
        sample = scheduler.step(output, t, sample).prev_sample
    return sample


def test_a_source_is_acquired_before_the_one_it_replaces_is_released():
    first, second, scheduler = Source(), Source(), GenieScheduler()
    scheduler.attach(first)
    assert first.events == ["acquire"]
    scheduler.attach(second)
    assert first.events == ["acquire", "release"] and second.events == ["acquire"]
    copied = copy.deepcopy(scheduler)
    scheduler.attach(None)
    gc.collect()
    assert second.events == ["acquire"]  # it is the copy's
    del copied
    gc.collect()
    assert second.events == ["acquire", "release"]


def test_a_source_that_does_not_fit_leaves_the_one_before_attached():
    class Other(Source):
        def bind(self, process, prediction_type):
            raise ValueError("another diffusion")

    source, other, scheduler = Source(), Other(), GenieScheduler()
    scheduler.attach(source)
    with pytest.raises(ValueError, match="another diffusion"):
        scheduler.attach(other)
    assert scheduler._slope_source is source and source.events == ["acquire"] and other.events == []


def test_a_table_that_needs_slopes_keeps_its_source(genie_unet):
    origin = GenieScheduler(time_grid="uniform_lambda")
    origin.attach(genie_unet())
    scheduler, source = GGDMScheduler.from_scheduler(origin, [3]), Source()
    scheduler.attach(source)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="weighs slopes"):
        scheduler.attach(None)
    assert scheduler._slope_source is source


@pytest.mark.parametrize("scheduler_class", [GenieScheduler, GenieInverseScheduler])
def test_a_source_is_told_of_each_run_and_of_each_step_that_does_without(noise, scheduler_class):
    source, scheduler, x = Source(), scheduler_class(), noise(2, 3)
    scheduler.attach(source)
    for _ in range(2):
        source.events.clear()
        scheduler.set_timesteps(4)
        assert sorted(source.events) == ["begin", "forget"]
        source.events.clear()
        draw(scheduler, x)
        asked = [torch.is_tensor(event) for event in source.events]
        assert asked == [index in scheduler._plan.sourced["slope"] for index in range(4)]
        assert all(event == "forget" for event in source.events if not torch.is_tensor(event))
    source.events.clear()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert source.events[-1] == "begin"


def test_only_a_source_that_takes_it_is_given_what_the_step_was(noise):
    """Without the variances that the model also predicts."""
    source, x = Source(), noise(2, 3, 4, 4)
    scheduler = GenieScheduler(prediction_type="v_prediction", variance_type="learned_range")
    scheduler.attach(source)
    scheduler.set_timesteps(4)
    output = noise(2, 6, 4, 4, seed=1)
    scheduler.step(output, scheduler.timesteps[0], x)
    assert torch.equal(source.events[-1], output[:, :3])
    given = []
    scheduler.attach(lambda sample, noise_prediction, timestep, **kwargs: given.append(kwargs) or sample)
    scheduler.set_timesteps(4)
    scheduler.step(output, scheduler.timesteps[0], x)
    assert set(given[0]) == {"step", "history_slope"}


def test_a_step_head_without_tables_is_no_source_of_slopes(genie_unet, noise):
    model, x = genie_unet(StepHead), noise(2, 2, 8, 8)
    scheduler, without = GenieScheduler(time_grid="uniform_lambda"), GenieScheduler(time_grid="uniform_lambda")
    scheduler.attach(model)
    asked = []
    model.derivative_head.register_forward_hook(lambda *args: asked.append(args))
    for each in (scheduler, without):
        each.set_timesteps(5)
    assert scheduler.table == without.table and scheduler.table.corrections == without.table.corrections
    assert torch.equal(draw(scheduler, x, model), draw(without, x, model)) and not asked


def test_a_step_head_is_no_source_for_a_table_of_slopes(genie_unet):
    origin = GenieScheduler(time_grid="uniform_lambda")
    origin.attach(genie_unet())
    scheduler = GGDMScheduler.from_scheduler(origin, [3])
    scheduler.attach(genie_unet(StepHead, TABLES))
    with pytest.raises(ValueError, match="weighs slopes"):
        scheduler.set_timesteps(3)


@pytest.mark.parametrize("scheduler_class", [GDDIMCLDScheduler, GDDIMBlurringScheduler])
def test_a_scheduler_that_weighs_no_slopes_takes_no_source(unet, scheduler_class):
    scheduler = scheduler_class(**({"sample_size": 8} if scheduler_class is GDDIMBlurringScheduler else {}))
    with pytest.raises(ValueError, match=f"`{scheduler_class.__name__}` takes no slope source"):
        scheduler.attach(ExactSlope(unet()))
    scheduler.attach(None)


@pytest.mark.parametrize("pipeline_class", [GeniePipeline, GDDIMPipeline])
def test_a_pipeline_says_that_its_scheduler_samples_without_the_head(genie_unet, monkeypatch, pipeline_class):
    from genie_diffusers.pipelines import pipeline_genie

    said = []
    monkeypatch.setattr(pipeline_genie.logger, "warning", said.append)
    pipe = GeniePipeline(genie_unet(), GenieScheduler())
    assert not said
    pipe.scheduler = GDDIMBlurringScheduler(sample_size=8)
    pipeline_class(pipe.unet, GDDIMBlurringScheduler(sample_size=8))
    assert said == ["`GDDIMBlurringScheduler` samples without the head of this UNet."] * 2


@pytest.mark.parametrize("clips", [{"clip_sample": True}, {"thresholding": True}])
def test_clipping_what_a_head_was_learned_without_is_warned_of_once(genie_unet, unet, monkeypatch, clips):
    from genie_diffusers.schedulers import scheduling_utils

    said = []
    monkeypatch.setattr(scheduling_utils.logger, "warning", said.append)
    for source, config in ((ExactSlope(unet()), clips), (genie_unet(), {}), (genie_unet(), clips)):
        assert not said
        scheduler = GenieScheduler(**config)
        scheduler.attach(source)
        for _ in range(2):
            scheduler.set_timesteps(3)
    assert len(said) == 1 and "clip_sample=False" in said[0]

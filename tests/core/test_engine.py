"""One engine: whole runs without diffusers are those of the schedulers, and can be differentiated."""

import dataclasses

import numpy as np
import pytest
import torch

from genie_diffusers import (
    ExponentialMultistepScheduler,
    GDDIMBlurringScheduler,
    GDDIMCLDScheduler,
    GDDIMScheduler,
    GenieInverseScheduler,
    GenieScheduler,
    GGDMScheduler,
    QuasiTaylorScheduler,
    Table,
)
from genie_diffusers.core import Parametrisation, Plan, run, step

SCHEDULERS = {
    "hermite": GenieScheduler(time_grid="uniform_lambda"),
    "hermite of v": GenieScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "hermite of flows": GenieScheduler(prediction_type="flow_prediction", flow_shift=3.0),
    "taylor": GenieScheduler(method="taylor"),
    "inverse": GenieInverseScheduler(time_grid="uniform_lambda", final_sigmas_type="sigma_min"),
    "inverse from clean data": GenieInverseScheduler(time_grid="uniform_lambda"),
    "quasi-taylor": QuasiTaylorScheduler(),
    "gDDIM with corrector": GDDIMScheduler(multistep_order=3, corrector=True),
    "UniPC": ExponentialMultistepScheduler(solver="unipc_3"),
    "SA-Solver": ExponentialMultistepScheduler(solver="sa_solver_3"),
    "GGDM": GGDMScheduler.from_scheduler(GenieScheduler(), [8]),
}


def model(sample, timestep):
    """A made-up prediction; schedulers hand out real timesteps in single precision."""
    return 0.8 * torch.sin(2 * sample + float(np.float32(timestep)) / 300) + 0.3 * sample


def drawn(scheduler, sample):
    generator = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, timestep), timestep, sample, generator=generator).prev_sample
    return sample


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_of_the_table_is_a_run_of_the_scheduler(name, as_json, noise):
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(8)
    table = Table.from_json(scheduler.table.to_json()) if as_json else scheduler.table
    generator = torch.Generator().manual_seed(0)
    found = run(
        table,
        model,
        noise(4, 3),
        Parametrisation(scheduler.config.prediction_type),
        noise=lambda index, sample: torch.randn(sample.shape, generator=generator, dtype=sample.dtype),
    )
    torch.testing.assert_close(found, drawn(scheduler, noise(4, 3)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("scheduler", "shape"),
    [(GDDIMCLDScheduler(), (2, 2, 3, 3)), (GDDIMBlurringScheduler(sample_size=4), (2, 1, 4, 4))],
    ids=["CLD", "blurring"],
)
def test_matrices_are_weighed_as_their_path_combines_them(scheduler, shape):
    state = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler.set_timesteps(5)
    found = run(scheduler.table, model, state, scheduler._conversion(), combine=scheduler.process.combine)
    torch.testing.assert_close(found, drawn(scheduler, state), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`combine` must be that of the path"):
        run(scheduler.table, model, state, scheduler._conversion())


def test_a_step_is_pure(noise):
    """The same arguments give the same result, whatever ran before; what was seen is not changed."""
    scheduler = SCHEDULERS["hermite"]
    scheduler.set_timesteps(8)
    plan = Plan(scheduler.table, Parametrisation())
    first, seen = step(plan, 0, (), noise(4, 3), noise(4, 3, seed=1))
    before = [dict(sight) for sight in seen]
    ends = [step(plan, 1, seen, first, noise(4, 3, seed=2))[0] for _ in range(2)]
    assert torch.equal(*ends)
    assert [dict(sight) for sight in seen] == before


def test_two_runs_may_take_turns_on_one_plan(noise):
    scheduler = SCHEDULERS["hermite"]
    scheduler.set_timesteps(8)
    plan, runs = Plan(scheduler.table, Parametrisation()), [(noise(2, 3, seed=seed), ()) for seed in (0, 1)]
    for index, timestep in enumerate(scheduler.table.timesteps):
        runs = [step(plan, index, seen, sample, model(sample, timestep)) for sample, seen in runs]
    for seed, (sample, _) in enumerate(runs):
        torch.testing.assert_close(sample, drawn_again(scheduler, noise(2, 3, seed=seed)))


def drawn_again(scheduler, sample):
    scheduler.set_timesteps(8)
    return drawn(scheduler, sample)


def test_weights_and_levels_may_be_learned(noise):
    """The gradient of a weight and of a noise level is that of finite differences."""
    scheduler = SCHEDULERS["hermite"]
    scheduler.set_timesteps(5)
    table = scheduler.table.fold()
    values = torch.tensor([table[2]["data", 1], float(table.sigmas[2])], dtype=torch.float64)

    def end(values):
        rows = (*table.rows[:2], {**table.rows[2], ("data", 1): values[0]}, *table.rows[3:])
        sigmas = [*map(float, table.sigmas)]
        sigmas[2] = values[1]
        return run(dataclasses.replace(table, rows=rows, sigmas=sigmas), model, noise(4, 3)).square().mean()

    assert torch.autograd.gradcheck(end, values.requires_grad_())


def test_nothing_is_kept_that_no_later_row_weighs(noise):
    scheduler = GenieScheduler(method="taylor", time_grid="uniform_lambda")
    scheduler.set_timesteps(5)
    plan = Plan(scheduler.table, Parametrisation())
    _, seen = step(plan, 0, (), noise(4, 3), noise(4, 3))
    assert [set(sight) for sight in seen] == [{"prediction"}]
    _, seen = step(plan, 4, seen, noise(4, 3), noise(4, 3))
    assert all(not sight for sight in seen[:1])


def test_a_table_that_weighs_slopes_needs_their_source(noise):
    scheduler = GenieScheduler(time_grid="uniform_lambda")
    scheduler.attach(lambda sample, *args, **kwargs: torch.ones_like(sample))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="Step 0 of this table weighs a slope, and there is no source of it"):
        run(scheduler.table, model, noise(4, 3))


@pytest.mark.parametrize("name", ["hermite", "taylor", "quasi-taylor", "gDDIM with corrector"])
def test_all_steps_are_one_sum_of_as_many_columns(name, noise):
    """What `torch.compile` sees: as many tensors in every step, none an alias of another, and the same result."""
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(8)
    plan = Plan(scheduler.table, Parametrisation())
    sample, seen, counts = noise(4, 3), (), set()
    for index, timestep in enumerate(scheduler.table.timesteps):
        output = model(sample, timestep)
        weights, tensors, _ = plan.visit(index, seen, sample, output, dense=True)
        counts.add(len(tensors))
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        dense = plan.sum(weights, tensors, sample.dtype)
        sample, seen = step(plan, index, seen, sample, output)
        torch.testing.assert_close(dense, sample, rtol=1e-12, atol=1e-12)
    assert len(counts) == 1


def test_compiled_steps_are_compiled_once(noise):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for scheduler in (GenieScheduler(), QuasiTaylorScheduler(method="sde"), GDDIMScheduler(multistep_order=3)):
        compiled, eager = torch.compile(scheduler.step, backend=backend, dynamic=False), scheduler.step
        ends, before = [], len(graphs)
        for function in (compiled, eager):
            scheduler.set_timesteps(12)
            sample, generator = noise(2, 3, 4, 4), torch.Generator().manual_seed(0)
            for timestep in scheduler.timesteps:
                (sample,) = function(model(sample, timestep), timestep, sample, generator=generator, return_dict=False)
            ends.append(sample)
        torch.testing.assert_close(ends[0], ends[1])
        assert len(graphs) == before + 1
    torch._dynamo.reset()


def test_a_plan_moves_its_weights_once(noise):
    scheduler = SCHEDULERS["hermite"]
    scheduler.set_timesteps(8)
    plan = Plan(scheduler.table, Parametrisation())
    step(plan, 0, (), noise(4, 3), noise(4, 3))
    first = plan._on("step", torch.device("cpu"), torch.float64)
    step(plan, 0, (), noise(4, 3), noise(4, 3))
    assert plan._on("step", torch.device("cpu"), torch.float64) is first

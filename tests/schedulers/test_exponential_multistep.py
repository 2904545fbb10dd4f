"""`ExponentialMultistepScheduler`: its options, where they come from, and what is refused."""

import numpy as np
import pytest
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from genie_diffusers import ExponentialMultistepScheduler, GDDIMScheduler, GenieScheduler, RectifiedFlow
from genie_diffusers.schedulers.scheduling_exponential_multistep import MULTISTEP_SOLVERS

STOCHASTIC = ("dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde_1", "er_sde_2", "er_sde_3", "sa_solver_2", "sa_solver_3")
WITH_ETA = ("ddim", "dpmpp_2m_sde", "dpmpp_3m_sde", "res_2m", "res_3m", "sa_solver_2", "sa_solver_3")


def table_of(steps: int = 8, **config):
    scheduler = ExponentialMultistepScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler.table


def test_an_unknown_solver_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"`solver` must be one of ddim, dpmpp_2m, .*, got 'unipc'"):
        table_of(solver="unipc")


@pytest.mark.parametrize("solver", MULTISTEP_SOLVERS)
def test_these_are_stochastic(solver):
    assert ("noise" in table_of(solver=solver).needs()) == (solver in STOCHASTIC)


@pytest.mark.parametrize("solver", MULTISTEP_SOLVERS)
def test_an_eta_that_a_solver_does_not_have_is_refused(solver):
    assert table_of(solver=solver, eta=None) == table_of(solver=solver)
    if solver in WITH_ETA:
        assert "noise" not in table_of(solver=solver, eta=0.0).needs()
        assert "noise" in table_of(solver=solver, eta=0.5).needs()
        with pytest.raises(ValueError, match=r"`eta` must be .*0.*, got -0\.1"):
            table_of(solver=solver, eta=-0.1)
    else:
        with pytest.raises(ValueError, match=f"`eta` must be `None` for `solver='{solver}'`.*, got 0.5; ddim"):
            table_of(solver=solver, eta=0.5)


def test_eta_of_ddim_is_at_most_one():
    with pytest.raises(ValueError, match="`eta` must be between 0 and 1 for `solver='ddim'`"):
        table_of(solver="ddim", eta=1.5)
    assert table_of(solver="res_2m", eta=1.5) != table_of(solver="res_2m", eta=1.0)


def test_sa_solver_adds_noise_in_the_middle_of_the_timesteps():
    scheduler = ExponentialMultistepScheduler(solver="sa_solver_3", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    for timestep, row in zip(scheduler.timesteps.tolist(), scheduler.table, strict=True):
        assert bool(row.get(("noise", 0))) == (200 <= timestep <= 800)


@pytest.mark.parametrize(
    "peer",
    [
        UniPCMultistepScheduler(solver_order=3, solver_type="bh1", beta_schedule="scaled_linear"),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3, beta_schedule="scaled_linear"),
        DEISMultistepScheduler(beta_schedule="scaled_linear", lower_order_final=False),
    ],
    ids=lambda peer: type(peer).__name__,
)
def test_a_configuration_of_diffusers_chooses_the_model_and_no_solver(peer):
    ours = ExponentialMultistepScheduler.from_config(peer.config)
    assert ours.config.solver == "unipc_2" and ours.config.eta is None
    assert ours.config.beta_schedule == "scaled_linear"
    assert ours.config.lower_order_final == peer.config.lower_order_final
    back = type(peer).from_config(ExponentialMultistepScheduler.from_config(peer.config, solver="res_2m").config)
    assert back.config.solver_order == peer.config.solver_order and back.config.solver_type == peer.config.solver_type


def test_the_path_is_inherited():
    ours = ExponentialMultistepScheduler.from_config(
        FlowMatchEulerDiscreteScheduler(shift=3.0).config, solver="deis_3"
    )
    assert isinstance(ours.process, RectifiedFlow) and ours.config.flow_shift == 3.0


def test_an_eta_is_of_its_own_solver(tmp_path):
    other = GDDIMScheduler(eta=1.0, multistep_order=1).config
    assert ExponentialMultistepScheduler.from_config(other).config.eta is None
    assert ExponentialMultistepScheduler.from_config(other, solver="res_2m", eta=0.3).config.eta == 0.3
    ExponentialMultistepScheduler(solver="sa_solver_2", eta=0.3, lower_order_final=False).save_pretrained(tmp_path)
    loaded = ExponentialMultistepScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.eta, loaded.config.lower_order_final) == ("sa_solver_2", 0.3, False)
    assert ExponentialMultistepScheduler.from_config(loaded.config).config.eta == 0.3
    there_and_back = ExponentialMultistepScheduler.from_config(
        UniPCMultistepScheduler.from_config(loaded.config).config
    )
    assert (there_and_back.config.solver, there_and_back.config.eta) == ("sa_solver_2", 0.3)
    assert ExponentialMultistepScheduler.from_config(loaded.config, solver="unipc_2").config.eta is None
    assert GenieScheduler.from_config(loaded.config).config.method == "hermite"


@pytest.mark.parametrize("solver", MULTISTEP_SOLVERS)
def test_a_start_mid_way_knows_nothing_of_the_steps_before(solver):
    """The steps from there on are those of a run of these timesteps alone, but for how many there are in all."""
    late = ExponentialMultistepScheduler(solver=solver, lower_order_final=False)
    late.set_timesteps(8)
    late.set_begin_index(3)
    alone = ExponentialMultistepScheduler(solver=solver, lower_order_final=False)
    alone.set_timesteps(timesteps=late.timesteps[3:])
    for row, other in zip(late.table.fold().rows[3:], alone.table.fold().rows, strict=True):
        assert row == pytest.approx(other)


@pytest.mark.parametrize("solver", MULTISTEP_SOLVERS)
def test_any_number_of_steps_is_finite(solver):
    for steps in (1, 2, 3, 1000) if solver in ("unipc_3", "deis_3", "er_sde_3") else (1, 2, 3):
        for path in ({"final_sigmas_type": "sigma_min"}, {"prediction_type": "flow_prediction"}):
            for row in table_of(steps, solver=solver, **path).fold():
                assert np.all(np.isfinite(list(row.values())))

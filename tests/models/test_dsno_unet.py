import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import genie_diffusers
from genie_diffusers import DSNOUNet2DModel, VariancePreserving
from genie_diffusers.models.dsno_unet import TemporalFourierLayer, jump_weights

LABELS = torch.tensor([0, 2])


def without_temporal_weights(model: DSNOUNet2DModel) -> DSNOUNet2DModel:
    for layer in model.temporal_layers:
        torch.nn.init.zeros_(layer.weight)
    return model


def with_large_temporal_weights(model: DSNOUNet2DModel) -> DSNOUNet2DModel:
    """So large that what passes through the layers shows; they start small."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in model.temporal_layers:
            torch.nn.init.normal_(layer.weight, std=0.3 / layer.weight.shape[1] ** 0.5)
    return model


@torch.no_grad()
def draw(model, x, labels=LABELS) -> torch.Tensor:
    return model(x, labels).trajectory


def layer_for(channels: int, points: int, modes: int) -> TemporalFourierLayer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = TemporalFourierLayer(channels, points, modes).double()
        torch.nn.init.normal_(layer.weight)
    return layer


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("points", "modes"), [(1, 1), (2, 2), (4, 1), (4, 2), (4, 3), (5, 3), (7, 2)])
def test_layer_multiplies_the_lowest_frequencies_by_its_matrices(noise, points, modes):
    """h + LeakyReLU(irfft(R rfft(h))), by fast Fourier transforms."""
    layer, hidden = layer_for(3, points, modes), noise(2 * points, 3, 4, 5)
    spectrum = torch.fft.rfft(hidden.unflatten(0, (2, points)), dim=1)
    product = torch.zeros_like(spectrum)
    matrices = torch.view_as_complex(layer.weight)
    product[:, :modes] = torch.einsum("bkihw,kio->bkohw", spectrum[:, :modes], matrices)
    expected = torch.fft.irfft(product, n=points, dim=1).flatten(0, 1)
    torch.testing.assert_close(layer.spectral(hidden), expected)
    torch.testing.assert_close(layer(hidden), hidden + torch.nn.functional.leaky_relu(expected))


def test_layer_is_linear_before_its_activation_and_each_frequency_is_its_own(noise):
    layer = layer_for(3, 4, 2)
    a, b = noise(8, 3, 4, 4, seed=1), noise(8, 3, 4, 4, seed=2)
    torch.testing.assert_close(layer.spectral(2 * a - b), 2 * layer.spectral(a) - layer.spectral(b))
    # cos(2π k m/4) at frequency k comes out at frequency k, or not at all
    for frequency in range(3):
        times = torch.cos(torch.arange(4, dtype=torch.float64) * torch.pi / 2 * frequency)
        hidden = (times[:, None, None, None] * noise(1, 3, 4, 4)).detach()
        spectrum = torch.fft.rfft(layer.spectral(hidden), dim=0).abs().amax(dim=(1, 2, 3))
        found = [k for k in range(3) if spectrum[k] > 1e-9]
        assert found == ([frequency] if frequency < 2 else [])


def test_layer_starts_small_and_positive():
    weight = TemporalFourierLayer(16, 4, 2).weight
    assert weight.shape == (2, 16, 16, 2)
    assert weight.min() >= 0 and 0.9 / 256 < weight.max() <= 1 / 256
    assert abs(weight.mean() * 256 - 0.5) < 0.05


def test_layer_computes_in_single_precision_whatever_surrounds_it(noise):
    layer, hidden = layer_for(8, 4, 2).float(), noise(8, 8, 4, 4).float()
    expected = layer.spectral(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.spectral(hidden)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    half = layer.to(torch.bfloat16)
    single = TemporalFourierLayer(8, 4, 2)
    single.load_state_dict(half.state_dict())
    hidden = hidden.to(torch.bfloat16)
    torch.testing.assert_close(half.spectral(hidden), single.spectral(hidden.float()))
    assert half(hidden).dtype == torch.bfloat16


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taus", [[999], [999, 799, 549, 299]])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_without_spectral_weights_every_time_point_is_the_ddim_step_of_the_teacher(unet, noise, prediction_type, taus):
    teacher, x, config = unet(), noise(2, 2, 8, 8), {"prediction_type": prediction_type}
    process, ends = VariancePreserving.from_config(config), [*taus[1:], -1]
    weights = [jump_weights(process, prediction_type, tau, end) for tau, end in zip(taus, ends, strict=True)]
    model = DSNOUNet2DModel.from_unet(teacher, len(taus), 1, config, timesteps=taus, output_weights=weights)
    found = draw(without_temporal_weights(model), x)
    assert found.shape == (2, len(taus), 2, 8, 8)
    for m, (tau, end) in enumerate(zip(taus, ends, strict=True)):
        with torch.no_grad():
            output = teacher(x, tau, class_labels=LABELS).sample
        ddim = DDIMScheduler(clip_sample=False, **config)
        ddim.num_inference_steps = 1000 // (tau - end)  # the length of its step
        expected = ddim.step(output, tau, x).prev_sample
        torch.testing.assert_close(found[:, m], expected, rtol=0, atol=3e-5 * float(expected.abs().max()))


def test_it_starts_from_the_teacher_at_the_points_of_the_grid(unet):
    model = DSNOUNet2DModel.from_unet(unet(), 4, 2)
    root = 999**0.5
    assert model.config.timesteps == pytest.approx([999, (0.75 * root) ** 2, (0.5 * root) ** 2, (0.25 * root) ** 2])
    assert model.config.solution_timesteps == [*model.config.timesteps[1:], -1.0]
    process = VariancePreserving.from_config({})
    jumps = zip(model.config.timesteps, model.config.solution_timesteps, strict=True)
    assert model.config.output_weights == [list(jump_weights(process, "epsilon", *jump)) for jump in jumps]


def test_its_weights_are_copies_and_the_temporal_share_is_modest(unet):
    teacher = unet()
    model = DSNOUNet2DModel.from_unet(teacher)
    own = dict(model.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(own[name], parameter) and own[name] is not parameter
    assert {name.split(".")[0] for name in set(own) - set(dict(teacher.named_parameters()))} == {"temporal_layers"}
    # after each residual (and attention) pair down and up, and once in the middle
    pairs = sum(len(block.resnets) for block in (*teacher.down_blocks, *teacher.up_blocks))
    assert len(model.temporal_layers) == pairs + 1
    assert model.num_parameters() - teacher.num_parameters() == sum(
        2 * 2 * layer.weight.shape[1] ** 2 for layer in model.temporal_layers
    )


def test_the_share_of_parameters_in_the_architecture_of_the_paper_is_an_eighth():
    """google/ddpm-cifar10-32, 4 time points and 2 frequencies, without memory."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    with torch.device("meta"):
        teacher = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            attention_head_dim=None,
            **blocks,
        )
        layers = DSNOUNet2DModel(
            **{k: v for k, v in teacher.config.items() if not k.startswith("_")},
            solution_timesteps=[600, 300, 100, -1],
            timesteps=[999, 600, 300, 100],
            output_weights=[[1, 0]] * 4,
            modes=2,
        ).temporal_layers
    share = sum(parameter.numel() for parameter in layers.parameters()) / teacher.num_parameters()
    assert 0.11 < share < 0.14


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_time_points_see_each_other_and_samples_do_not(unet, noise, modes):
    model = with_large_temporal_weights(DSNOUNet2DModel.from_unet(unet(), 4, modes))
    x = noise(3, 2, 8, 8)
    labels = torch.tensor([0, 1, 2])
    whole = draw(model, x, labels)
    for i in range(3):
        torch.testing.assert_close(draw(model, x[i : i + 1], labels[i : i + 1]), whole[i : i + 1])
    alone = DSNOUNet2DModel.from_unet(unet(), 4, modes)
    alone.load_state_dict(model.state_dict())
    changed = list(alone.config.timesteps)
    changed[0] = 700.0
    alone.register_to_config(timesteps=changed)
    others = (draw(alone, x, labels) - whole)[:, 1:].abs().amax(dim=(0, 2, 3, 4))
    assert (others > 1e-6).all()
    without_temporal_weights(model), without_temporal_weights(alone)
    assert torch.equal(draw(alone, x, labels)[:, 1:], draw(model, x, labels)[:, 1:])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_class_embeds": None},
        {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "norm_num_groups": 2}
        | {"up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "block_out_channels": (32, 32)}
        | {"in_channels": 3, "out_channels": 3},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"), "layers_per_block": 2}
        | {"up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")},
        {"mid_block_type": None},
        {"out_channels": 4},
        {"sample_size": (8, 12)},
    ],
    ids=["class-conditional", "unconditional", "skip", "resnet", "no middle", "variance", "oblong"],
)
def test_any_unet_becomes_an_operator(unet, noise, config):
    teacher = unet(**config)
    model = with_large_temporal_weights(DSNOUNet2DModel.from_unet(teacher, 3, 2))
    labels = None if teacher.config.num_class_embeds is None else LABELS
    width = 12 if "sample_size" in config else 8
    x = noise(2, teacher.config.in_channels, 8, width)
    trajectory = draw(model, x, labels)
    assert trajectory.shape == (2, 3, *x.shape[1:]) and trajectory.isfinite().all()
    plain = draw(without_temporal_weights(model), x, labels)
    assert (trajectory - plain).abs().max() > 1e-3 * plain.abs().max()


def test_labels_reach_every_time_point_of_their_sample(unet, noise):
    model, x = DSNOUNet2DModel.from_unet(unet()), noise(2, 2, 8, 8)
    both, swapped = draw(model, x, torch.tensor([0, 2])), draw(model, x, torch.tensor([0, 1]))
    assert torch.equal(both[0], swapped[0])
    assert ((both - swapped)[1].abs().amax(dim=(1, 2, 3)) > 1e-6).all()


def test_spectral_weights_of_all_kept_frequencies_are_learned(unet, noise):
    model = DSNOUNet2DModel.from_unet(unet()).train()
    model(noise(2, 2, 8, 8), LABELS).trajectory.square().mean().backward()
    for layer in model.temporal_layers:
        assert (layer.weight.grad[0, ..., 0].abs().max() > 0) and (layer.weight.grad[1].abs().amax((0, 1)) > 0).all()


def test_a_copy_has_temporal_layers_of_its_own(unet, noise):
    model, x = with_large_temporal_weights(DSNOUNet2DModel.from_unet(unet())), noise(2, 2, 8, 8)
    before, copied = draw(model, x), copy.deepcopy(model)
    assert torch.equal(draw(copied, x), before)
    without_temporal_weights(copied)
    assert torch.equal(draw(model, x), before) and not torch.allclose(draw(copied, x), before)


# --- precision, saving, compiling ------------------------------------------------------------------------------------


def test_autocast_changes_little(unet, noise):
    model = with_large_temporal_weights(DSNOUNet2DModel.from_unet(unet().float()))
    x = noise(2, 2, 8, 8).float()
    expected = draw(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = draw(model, x)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
def test_it_loads_what_it_has_saved_in_a_fresh_process(unet, noise, tmp_path):
    model = with_large_temporal_weights(DSNOUNet2DModel.from_unet(unet().float(), 3, 2))
    model.save_pretrained(tmp_path / "operator")
    x = noise(2, 2, 8, 8).float()
    torch.save({"x": x, "trajectory": draw(model, x)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, genie_diffusers\n"
        "from genie_diffusers import DSNOUNet2DModel\n"
        "model = DSNOUNet2DModel.from_pretrained(sys.argv[1] + '/operator').eval()\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    found = model(expected['x'], torch.tensor([0, 2])).trajectory\n"
        "torch.testing.assert_close(found, expected['trajectory'], rtol=1e-3, atol=1e-4)\n"
        "print(model.num_time_points, model.config.modes, model.config.timesteps)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": str(Path(genie_diffusers.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith(f"3 2 {model.config.timesteps}")
    assert sorted(path.suffix for path in (tmp_path / "operator").iterdir()) == [".json", ".safetensors"]


@pytest.mark.slow
def test_it_compiles_without_graph_breaks_and_exports(unet, noise):
    model = with_large_temporal_weights(DSNOUNet2DModel.from_unet(unet().float()))
    x = noise(2, 2, 8, 8).float()
    expected = draw(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(draw(compiled, x), expected, rtol=1e-4, atol=1e-4)
    batch = torch.export.Dim("batch", min=2, max=15)  # from 64 inputs on, UNets of diffusers upsample another way
    shapes = {"sample": {0: batch}, "class_labels": {0: batch}, "return_dict": None}
    program = torch.export.export(model, (x, LABELS, False), dynamic_shapes=shapes).module()
    more, labels = noise(3, 2, 8, 8, seed=1).float(), torch.tensor([1, 0, 3])
    torch.testing.assert_close(program(more, labels, False)[0], draw(model, more, labels), rtol=1e-4, atol=1e-4)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_time_points": 0}, "`num_time_points` must be at least 1, got 0"),
        ({"modes": 4}, "`modes` must be between 0 and 3, the frequencies of 4 time points, got 4"),
        ({"num_time_points": 1, "modes": 2}, "`modes` must be between 0 and 1.*of 1 time points, got 2"),
        ({"timesteps": [999.0], "output_weights": [[1, 0]] * 4}, "must have one entry for each time point"),
        ({"output_weights": [[1.0]] * 4}, "the last of two weights"),
        ({"scheduler_config": {"prediction_type": "score"}}, "`prediction_type` must be.*got 'score'"),
        ({"time_grid": "cubic"}, "`time_grid` must be one of.*got 'cubic'"),
    ],
)
def test_bad_input_is_refused(unet, options, message):
    with pytest.raises(ValueError, match=message):
        DSNOUNet2DModel.from_unet(unet(), **options)

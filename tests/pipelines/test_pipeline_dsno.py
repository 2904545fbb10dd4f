from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genie_diffusers import DSNOPipeline, DSNOUNet2DModel, GeniePipeline
from genie_diffusers.cli import PACKAGED_MODEL


@pytest.fixture
def make(unet):
    """Builds a pipeline of an operator with random weights."""

    def build(**config) -> DSNOPipeline:
        config = {"in_channels": 3, "out_channels": 3, **config}
        return DSNOPipeline(DSNOUNet2DModel.from_unet(unet(**config).float(), 4, 2))

    return build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def count_calls(pipe) -> list:
    calls = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    return calls


def test_pictures_are_the_last_states_of_one_call_on_the_given_noise(make):
    pipe = make()
    calls = count_calls(pipe)
    latents = torch.randn(3, 3, 8, 8, generator=seeded())
    output = pipe(class_labels=[0, 2, 1], latents=latents, output_type="latent", return_trajectory=True)
    assert calls == [12]
    with torch.no_grad():
        expected = pipe.unet(latents, torch.tensor([0, 2, 1])).trajectory
    assert torch.equal(output.images, expected[:, -1])
    assert len(output.trajectory) == 4
    assert all(torch.equal(state, expected[:, m]) for m, state in enumerate(output.trajectory))
    drawn = pipe(class_labels=[0, 2, 1], generator=seeded(), output_type="latent")
    assert torch.equal(drawn.images, output.images) and drawn.trajectory is None


def test_pictures_come_in_every_type(make):
    pipe = make()
    assert isinstance(pipe(generator=seeded()).images[0], Image.Image)
    arrays = pipe(batch_size=2, generator=seeded(), output_type="np", return_trajectory=True)
    assert arrays.images.shape == (2, 8, 8, 3) and 0 <= arrays.images.min() and arrays.images.max() <= 1
    assert [state.shape for state in arrays.trajectory] == [(2, 8, 8, 3)] * 4
    tensors = pipe(batch_size=2, generator=seeded(), output_type="pt", return_dict=False)
    assert len(tensors) == 1
    np.testing.assert_allclose(tensors[0].permute(0, 2, 3, 1).numpy(), arrays.images)
    assert len(pipe(return_trajectory=True, return_dict=False)) == 2


def test_one_generator_per_image_gives_the_same_images_for_any_split_into_batches(make):
    pipe = make()

    def draw(seeds):
        options = {"class_labels": [seed % 3 for seed in seeds], "output_type": "latent"}
        return pipe(generator=[seeded(seed) for seed in seeds], **options).images

    whole = draw(range(5))
    for split in ([[0], [1, 2], [3, 4]], [[0, 1, 2, 3], [4]]):
        torch.testing.assert_close(torch.cat([draw(seeds) for seeds in split]), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(range(5)), whole)


def test_without_labels_the_null_class_is_drawn(make):
    pipe = make()
    null = pipe(batch_size=2, generator=seeded(), output_type="latent").images
    assert torch.equal(pipe(class_labels=[3, 3], generator=seeded(), output_type="latent").images, null)
    assert not torch.allclose(pipe(class_labels=[0, 1], generator=seeded(), output_type="latent").images, null)
    plain = make(num_class_embeds=None)
    assert plain(batch_size=2, generator=seeded(), output_type="latent").images.shape == (2, 3, 8, 8)


def test_it_loads_what_it_has_saved(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path)
    loaded = DSNOPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.unet, DSNOUNet2DModel)
    images = [p(class_labels=1, generator=seeded(), output_type="latent").images for p in (pipe, loaded)]
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": [0, 4]}, r"`class_labels` must be between 0 and 3, got \[0, 4\]"),
        ({"class_labels": [0, 1], "batch_size": 3}, "must agree on the number of images"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"`latents` must have shape \(1, 3, 8, 8\), got \(1, 3, 4, 4\)"),
        ({"class_labels": 0.5}, "`class_labels` must be an integer"),
    ],
)
def test_bad_input_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make()(**options)


def test_labels_need_classes(make):
    with pytest.raises(ValueError, match="the model is not class-conditional"):
        make(num_class_embeds=None)(class_labels=[0])


def test_the_packaged_operator_lands_nearer_to_its_teacher_than_two_steps_of_a_solver():
    folder = Path(PACKAGED_MODEL)
    pipe = DSNOPipeline.from_pretrained(folder.parent / "dsno-cifar10-16", torch_dtype=torch.float32)
    teacher = GeniePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    latents = torch.randn(16, 3, 16, 16, generator=seeded(2**31))
    arguments = {"class_labels": list(range(8)) * 2, "latents": latents, "output_type": "latent"}
    output = pipe(**arguments, return_trajectory=True)
    solution = teacher(**arguments, num_inference_steps=20).images
    distance = ((output.images - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)).mean()
    assert distance < 0.2
    two_steps = teacher(**arguments, num_inference_steps=2).images
    assert (two_steps - solution).norm() > 2 * (output.images - solution).norm()
    process = teacher.scheduler.process
    for t, state in zip(pipe.unet.config.solution_timesteps[:3], output.trajectory[:3], strict=True):
        marginal = (process.alpha(t) ** 2 * float(solution.square().mean()) + process.sigma(t) ** 2) ** 0.5
        assert float(state.square().mean().sqrt()) == pytest.approx(float(marginal), rel=0.1)

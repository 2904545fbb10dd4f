import argparse

import pytest
import torch

from genie_diffusers import DerivativeHead
from genie_diffusers.learning.conditions import Conditioned, with_head
from genie_diffusers.learning.paths import draw
from genie_diffusers.learning.step_heads import table_noises


@pytest.fixture
def captioned(text_unet) -> Conditioned:
    """A denoiser of four captions and the empty prompt."""
    unet = text_unet().float()
    embeddings = torch.zeros(5, 3, unet.config.cross_attention_dim)
    return Conditioned(with_head(unet, DerivativeHead.for_unet(unet)), {"encoder_hidden_states": embeddings}, 8)


def arguments(max_guidance_scale: float) -> argparse.Namespace:
    return argparse.Namespace(label_dropout=0.2, max_guidance_scale=max_guidance_scale)


def test_a_third_of_what_tables_of_captions_are_fitted_to_is_guided(captioned):
    noises = table_noises(arguments(5.0), captioned, 300, seed=1)
    unguided = draw(captioned, 300, 1, 0.2)
    assert torch.equal(noises.noise, unguided.noise)
    for part in (noises[:240], noises[240:]):  # fitted to, and not
        guided = part.scales > 1
        assert guided.sum() * 3 == len(part)
        assert part.scales[guided].max() > 4 and (part.labels[guided] < 4).all()
    assert torch.equal(noises.labels[noises.scales == 1], unguided.labels[noises.scales == 1])


def test_without_guidance_or_captions_it_is_not(captioned, unet):
    for denoiser, scale in ((captioned, 1.0), (unet(), 5.0)):
        noises, unguided = table_noises(arguments(scale), denoiser, 9, seed=1), draw(denoiser, 9, 1, 0.2)
        assert noises.scales is None and torch.equal(noises.labels, unguided.labels)

import sys
from types import SimpleNamespace

import pytest
import torch

from genie_diffusers.learning import features


class MeanColour(torch.nn.Module):
    """Features without any weights."""

    def forward(self, pictures):
        return torch.cat([pictures.mean(dim=(2, 3)), pictures.square().mean(dim=(2, 3))], dim=1)


def test_a_feature_network_is_a_module_by_its_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "colours", SimpleNamespace(MeanColour=MeanColour, dictionary=dict))
    network = features.feature_network("colours:MeanColour", torch.device("cpu"))
    assert network(torch.zeros(2, 3, 4, 4)).shape == (2, 6)
    overshooting = features.features_of(network, torch.full((1, 3, 4, 4), 1.5))
    assert torch.equal(overshooting, torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"`torch\.nn\.Module`, got colours:dictionary, a dict"):
        features.feature_network("colours:dictionary", torch.device("cpu"))

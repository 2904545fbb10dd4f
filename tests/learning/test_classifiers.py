import torch

from genie_diffusers.learning.classifiers import random_crop


def test_random_crop_shifts_pictures_and_mirrors_what_comes_in():
    row = torch.arange(6.0).expand(1, 3, 4, 6)
    choices = torch.tensor([[0.5, 0.0], [0.5, 0.5], [0.5, 0.99]])
    shifted = random_crop(row.expand(3, 3, 4, 6), 2, choices)
    expected = [[2, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 4, 3]]
    assert shifted[:, 0, 0].tolist() == expected
    column = random_crop(row.transpose(2, 3), 2, torch.tensor([[0.0, 0.5]]))
    assert column[0, 0, :, 0].tolist() == expected[0]

import pytest
import torch

from hfkd.evaluation.image_grid import class_grid, image_grid, nearest_image_grid


def test_images_lie_row_by_row_with_white_between():
    images = torch.stack([torch.full((1, 20, 30), value) for value in (-1.0, 0.0, 1.0, -1.0, 0.0)])
    picture = image_grid(images, columns=3)
    assert picture.size == (3 * 31 - 1, 2 * 21 - 1)
    pixels = [[picture.getpixel((x, y)) for x in (0, 31, 91)] for y in (0, 40)]
    assert pixels == [[0, 128, 255], [0, 128, 255]]
    assert picture.getpixel((30, 0)) == picture.getpixel((0, 20)) == 255


@pytest.mark.parametrize(("count", "side"), [(1, 1), (4, 2), (5, 3)])
def test_a_square_by_default(count, side):
    assert image_grid(torch.zeros(count, 3, 20, 20)).size[0] == side * 21 - 1


def test_tiny_images_are_enlarged_by_whole_pixels():
    picture = image_grid(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat_interleave(5, 0).view(1, 1, 10, 2))
    assert picture.size == (2 * 3, 10 * 3)
    assert [picture.getpixel((x, y)) for x, y in ((2, 14), (3, 14), (2, 15))] == [0, 255, 255]


def test_a_row_for_each_class_white_where_one_has_fewer():
    labels = torch.tensor([7, 2, 7, 7])
    images = torch.stack([torch.full((1, 20, 20), value) for value in (-1.0, 0.0, -0.5, 0.5)])
    picture = class_grid(images, labels)
    assert picture.size == (3 * 21 - 1, 2 * 21 - 1)
    pixels = [[picture.getpixel((x, y)) for x in (0, 21, 42)] for y in (0, 21)]
    assert pixels == [[128, 255, 255], [0, 64, 191]]


def test_samples_stand_left_of_their_nearest_images():
    samples = torch.stack([torch.full((1, 20, 20), value) for value in (-1.0, 0.0)])
    nearest = torch.stack([samples[1], samples[1], samples[0], samples[0]]).view(2, 2, 1, 20, 20)
    picture = nearest_image_grid(samples, nearest)
    assert [[picture.getpixel((x, y)) for x in (0, 21, 42)] for y in (0, 21)] == [[0, 128, 128], [128, 0, 0]]

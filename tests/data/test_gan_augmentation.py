"""What the discriminator's images go through: each operation by hand, its draws, its gradient; ADA's controller."""

import pytest
import torch

from hfkd.data import keyed_uniform
from hfkd.data.gan_augmentation import OPERATIONS, AdaptiveProbability, GanAugmentation
from hfkd.errors import InputError


def images(n=3, channels=3, side=8):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(n, channels, side, side, generator=generator, dtype=torch.float64) - 1


def draws(n=3, seed=0, update=0):
    return keyed_uniform(seed, update, torch.arange(n), -7, GanAugmentation.DRAWS)


def fixed(n=3, **columns):
    """Draws of 0.99 (nothing is applied at probability 0.5), and `columns` by number as given."""
    made = torch.full((n, GanAugmentation.DRAWS), 0.99, dtype=torch.float64)
    for name, value in columns.items():
        made[:, int(name[1:])] = value
    return made


def test_brightness_saturation_and_contrast_by_hand():
    x, color = images(), GanAugmentation(("color",))
    torch.testing.assert_close(color(x, fixed(_0=0.0, _1=0.75), 0.5), x + 0.25)
    grey = x.mean(dim=1, keepdim=True)
    torch.testing.assert_close(color(x, fixed(_2=0.0, _3=0.25), 0.5), grey + 0.5 * (x - grey))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(color(x, fixed(_4=0.0, _5=0.75), 0.5), mean + 1.25 * (x - mean))


def test_grey_images_have_no_saturation():
    x = images(channels=1)
    torch.testing.assert_close(GanAugmentation(("color",))(x, fixed(_2=0.0, _3=0.1), 0.5), x)


@pytest.mark.parametrize(("draw", "shift"), [(0.0, -1), (0.5, 0), (0.999, 1)])
def test_translation_by_up_to_an_eighth(draw, shift):
    x = images()
    moved = GanAugmentation(("translation",))(x, fixed(_6=0.0, _7=draw, _8=0.5), 0.5)
    expected = torch.zeros_like(x)
    rows = torch.arange(8)
    target = rows + shift
    inside = (target >= 0) & (target < 8)
    expected[:, :, target[inside]] = x[:, :, rows[inside]]
    assert torch.equal(moved, expected)
    across = GanAugmentation(("translation",))(x.mT, fixed(_6=0.0, _7=0.5, _8=draw), 0.5)
    assert torch.equal(across, expected.mT)


def test_cutout_leaves_a_grey_hole_of_half_a_side():
    x = images()
    cut = GanAugmentation(("cutout",))(x, fixed(_9=0.0, _10=0.5, _11=0.3), 0.5)
    expected = x.clone()
    expected[:, :, 2:6, 0:4] = 0  # centres 4 and 2, of holes 4 wide
    assert torch.equal(cut, expected)
    corner = GanAugmentation(("cutout",))(x, fixed(_9=0.0, _10=0.0, _11=0.999), 0.5)
    assert (corner == 0).sum() == 3 * 3 * 2 * 3 and (corner[:, :, :2, 5:] == 0).all()


def test_nothing_is_applied_at_probability_0_and_everything_at_1():
    x, all_of_it = images(64), GanAugmentation()
    torch.testing.assert_close(all_of_it(x, draws(64), 0.0), x)
    changed = (all_of_it(x, draws(64), torch.tensor(1.0)) != x).flatten(1).any(dim=1)
    assert changed.all()


def test_each_operation_is_applied_with_the_probability():
    x, count = images(4000, 1, 4) * 0.1 + 0.5, 4000
    hole = GanAugmentation(("cutout",))(x, draws(count), 0.3)
    assert ((hole == 0).flatten(1).any(dim=1)).double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_an_operation_does_not_depend_on_the_others():
    x = images(16)
    alone = GanAugmentation(("cutout",))(x, draws(16), 1.0)
    together = GanAugmentation(("translation", "cutout"))(x, draws(16), 1.0)
    moved = GanAugmentation(("translation",))(x, draws(16), 1.0)
    assert torch.equal((alone == 0) | (moved == 0), together == 0)


def test_samples_have_draws_of_their_own():
    x = images(1).expand(8, -1, -1, -1)
    out = GanAugmentation()(x, draws(8), 1.0)
    assert all((out[0] != out[n]).any() for n in range(1, 8))
    assert torch.equal(out[5], GanAugmentation()(x, draws(8), 1.0)[5])
    assert not torch.equal(out, GanAugmentation()(x, draws(8, update=1), 1.0))


def test_gradients_reach_the_images():
    x = images().requires_grad_()
    assert torch.autograd.gradcheck(lambda image: GanAugmentation()(image, draws(), 1.0), x)


@pytest.mark.parametrize("operations", [(), ("color", "blur")])
def test_operations_are_known(operations):
    with pytest.raises(InputError, match=", ".join(OPERATIONS)):
        GanAugmentation(operations)


# -- ADA's controller ------------------------------------------------------------------------------


def observe(controller, logits):
    signs = torch.tensor(logits).sign()
    controller.observe(signs.sum(), torch.tensor(float(len(logits))))


def test_the_probability_follows_the_signs():
    controller = AdaptiveProbability(target=0.6, images_to_one=100)
    observe(controller, [2.0] * 10)
    controller.adapt()
    assert controller.probability.item() == pytest.approx(0.1)  # 10 images of 100, r_t = 1 > 0.6
    observe(controller, [2.0] * 10)
    observe(controller, [-1.0] * 5 + [3.0] * 5)
    controller.adapt()
    assert controller.probability.item() == pytest.approx(0.0, abs=1e-7)  # r_t = 0.5: back, and not below 0
    assert (controller.signs.item(), controller.images.item()) == (0, 0)


def test_the_probability_stays_below_1_and_rests_without_images():
    controller = AdaptiveProbability(target=-0.5, images_to_one=10)
    observe(controller, [-0.1, 0.2] * 20)
    controller.adapt()
    assert controller.probability.item() == 1
    controller.adapt()
    assert controller.probability.item() == 1


def test_at_the_target_nothing_moves():
    controller = AdaptiveProbability(target=0.5, images_to_one=10)
    observe(controller, [1.0, 1.0, 1.0, -1.0])
    controller.adapt()
    assert controller.probability.item() == 0


def test_the_state_is_plain_tensors():
    controller = AdaptiveProbability(images_to_one=10)
    observe(controller, [1.0] * 3)
    again = AdaptiveProbability(images_to_one=10)
    again.load_state_dict(controller.state_dict())
    for one in (controller, again):
        one.adapt()
    assert controller.probability.item() == again.probability.item() == pytest.approx(0.3)
    assert controller.state_dict().keys() == {"probability", "signs", "images"}

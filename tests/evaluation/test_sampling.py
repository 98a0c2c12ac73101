import pytest
import torch
from generative_runs import tiny_networks

from hfkd.errors import InputError
from hfkd.evaluation.sampling import balanced_labels, class_names, draw_images, is_generator
from hfkd.models import HfkdConditionalGeneratorConfig, HfkdConditionalGeneratorModel


def conditional(names, **settings):
    """Batch norm with statistics of its own, as after training, so that its images differ."""
    id2label = dict(enumerate(names))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = HfkdConditionalGeneratorConfig.for_images(8, id2label=id2label, **settings)
        return HfkdConditionalGeneratorModel(config).eval()


@pytest.fixture(scope="module")
def encoder_and_generator():
    return tiny_networks("bigan")


def test_a_generator_is_what_samples_from_latents(encoder_and_generator):
    encoder, generator = encoder_and_generator
    assert is_generator(generator) and is_generator(conditional("abc"))
    assert not is_generator(encoder) and not is_generator(torch.nn.Linear(2, 2))


def test_classes_of_a_generator(encoder_and_generator):
    assert class_names(encoder_and_generator[1]) is None
    assert class_names(conditional("abc")) == ["a", "b", "c"]
    several = conditional("abcde", class_counts=[2, 3])
    assert class_names(several, 0) == ["a", "b"] and class_names(several, 1) == ["c", "d", "e"]
    with pytest.raises(InputError, match="classifier_index 2 is outside the generator's 2 classifiers: use 0 to 1"):
        class_names(several, 2)


def test_labels_take_turns():
    assert balanced_labels(5, [4, 1]).tolist() == [4, 1, 4, 1, 4]


def test_batches_follow_from_the_seed_and_differ():
    generator = conditional("abc")
    labels = balanced_labels(10, range(3))
    images = draw_images(generator, 10, labels=labels, seed=5, batch_size=4)
    assert images.shape == (10, 1, 8, 8) and images.dtype == torch.float32
    assert torch.equal(images[:4], generator.sample(4, labels[:4], seed=5))
    assert torch.equal(images, draw_images(generator, 10, labels=labels, seed=5, batch_size=4))
    assert len(images.flatten(1).unique(dim=0)) == 10
    assert not torch.equal(images, draw_images(generator, 10, labels=labels, seed=6, batch_size=4))


def test_images_without_classes(encoder_and_generator):
    _, generator = encoder_and_generator
    assert torch.equal(draw_images(generator, 3, seed=1), generator.sample(3, seed=1))


def test_images_of_one_of_several_classifiers():
    generator = conditional("abcde", class_counts=[2, 3])
    labels = torch.tensor([0, 1])
    first, second = (draw_images(generator, 2, labels=labels, classifier_index=index) for index in (0, 1))
    assert torch.equal(second, generator.sample(2, labels, seed=0, classifier_index=1))
    assert not torch.allclose(first, second)

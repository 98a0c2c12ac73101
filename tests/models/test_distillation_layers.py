"""CRD's memory, ReviewKD's fusion, FitNets' regressor: what they compute, draw and remember."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfkd.models.distillation_layers import AttentionFusion, ContrastiveMemory, FeatureRegressor, ReviewFusion


LABELS = torch.tensor([2, 0, 1, 0, 2, 1, 0, 0])


def memory(labels=LABELS, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ContrastiveMemory(4, 6, labels, **({"embedding_size": 5} | settings)).double()


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count=3):
    index = torch.tensor([5, 0, 3])[:count]
    negatives = torch.tensor([[1, 0], [2, 3], [4, 2]])[:count]
    return drawn(count, 4), drawn(count, 6, seed=1), index, negatives


def test_negatives_are_all_images_of_other_classes_equally_often():
    contrast = memory()
    for label in (0, 1, 2):
        others = (label != LABELS).nonzero()[:, 0]
        draws = torch.linspace(0, 1 - 1e-9, 100 * len(others), dtype=torch.float64)[None]
        rows = contrast.negatives(draws, torch.tensor([label]))[0]
        assert sorted(set(rows.tolist())) == others.tolist()
        assert (rows.bincount(minlength=8)[others] - 100).abs().max() <= 1
    skipped = torch.tensor([0, 0, 3, 3])  # class numbers without images
    assert set(memory(skipped).negatives(torch.rand(1, 50), torch.tensor([3]))[0].tolist()) == {0, 1}


def test_loss_by_hand():
    contrast = memory(temperature=0.5)
    student, teacher, index, negatives = batch()
    memories = [contrast.memory_teacher.clone(), contrast.memory_student.clone()]
    found = contrast(student, teacher, index, negatives)
    expected = 0.0
    embedded = (F.normalize(contrast.embed_student(student)), F.normalize(contrast.embed_teacher(teacher)))
    for own, others in zip(embedded, memories, strict=True):
        likeness = [
            [math.exp((own[i] @ others[row]).item() / 0.5) for row in (index[i], *negatives[i])]
            for i in range(len(index))
        ]
        normaliser = sum(map(sum, likeness)) / 9 * 8
        noise = 2 / 8
        for positive, *rest in likeness:
            h = positive / normaliser / (positive / normaliser + noise)
            expected -= math.log(h) / 3
            expected -= sum(math.log(noise / (other / normaliser + noise)) for other in rest) / 3
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_the_memory_follows_the_batch_and_nothing_else():
    contrast = memory(momentum=0.25)
    student, teacher, index, negatives = batch()
    before = contrast.memory_student.clone()
    contrast(student, teacher, index, negatives).backward()
    embedded = F.normalize(contrast.embed_student(student)).detach()
    moved = F.normalize(0.25 * before[index] + 0.75 * embedded)
    torch.testing.assert_close(contrast.memory_student[index], moved)
    others = torch.tensor([1, 2, 4, 6, 7])
    assert torch.equal(contrast.memory_student[others], before[others])
    held = {name: value.clone() for name, value in contrast.state_dict().items()}
    contrast.eval()(student, teacher, index, negatives)
    assert all(torch.equal(value, held[name]) for name, value in contrast.state_dict().items())


def test_the_normaliser_is_that_of_the_first_batch():
    contrast = memory()
    contrast(*batch())
    first = contrast.log_normalisers.clone()
    contrast(*batch())
    assert torch.equal(contrast.log_normalisers, first) and first.abs().min() > 0
    assert {"memory_student", "memory_teacher", "log_normalisers", "started"} <= contrast.state_dict().keys()
    assert not {"by_class", "class_starts", "class_sizes"} & contrast.state_dict().keys()


def test_gradients_reach_the_student_and_both_embeddings():
    contrast = memory()
    student, teacher, index, negatives = batch()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    contrast(student, teacher, index, negatives).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in contrast.parameters())


def test_one_class_has_nothing_to_contrast():
    with pytest.raises(ValueError, match="all 4 images are of one class"):
        memory(torch.ones(4, dtype=torch.long))


STUDENT = [(4, 8, 8), (6, 4, 4), (5, 1, 1)]
TEACHER = [(7, 16, 16), (9, 4, 4), (3, 1, 1)]


def maps(shapes, seed=0):
    return [drawn(2, *shape, seed=seed + k).float() for k, shape in enumerate(shapes)]


def test_fused_maps_have_the_teachers_shapes():
    fusion = ReviewFusion(STUDENT, TEACHER)
    fused = fusion(maps(STUDENT))
    assert [tuple(f.shape[1:]) for f in fused] == TEACHER
    assert [one.attention is not None for one in fusion.fusions] == [True, True, False]
    assert fusion.fusions[0].expand[0].in_channels == 5  # the deepest map's width
    assert ReviewFusion(STUDENT, TEACHER, largest_width=2).fusions[0].expand[0].in_channels == 2


def test_what_is_deep_reaches_what_is_shallow_and_not_the_other_way():
    fusion, student = ReviewFusion(STUDENT, TEACHER), [f.requires_grad_() for f in maps(STUDENT)]
    fused = fusion(student)
    for k, out in enumerate(fused):
        gradients = torch.autograd.grad(out.square().sum(), student, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().sum() > 0) for g in gradients] == [j >= k for j in range(3)]


def test_attention_weighs_both_maps():
    fusion = AttentionFusion(4, 3, 6, fuses=True).eval()
    own, left = drawn(2, 4, 4, 4).float(), drawn(2, 3, 2, 2, seed=1).float()
    reduced, larger = fusion.reduce(own), left.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weights = fusion.attention(torch.cat([reduced, larger], dim=1))
    mixed = reduced * weights[:, [0]] + larger * weights[:, [1]]
    out, handed_on = fusion(own, left, (8, 8))
    torch.testing.assert_close(handed_on, mixed.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(out, fusion.expand(handed_on))


def test_the_regressor_changes_the_width_alone():
    regressed = FeatureRegressor(3, 7)(drawn(2, 3, 4, 4).float())
    assert regressed.shape == (2, 7, 4, 4) and (regressed < 0).any()

"""Training with whitened layer inputs: what is measured, that it is kept, and what it is good for."""

import pytest
import torch
from gradient_feature_runs import run, tiny_model, tiny_trainer
from max_margin_runs import whole
from processes import differences, in_a_process
from tiny_runs import NO_AUGMENTATION, digit_sources, tiny_resnet

from hfkd.models import build_gradient_features
from hfkd.models.whitening import InputMoments, inverse_root


def roots(trainer):
    return dict(trainer.model.students[0].backbone.whitening.named_buffers())


def expected_roots(trainer, base):
    """From the inputs of the layers themselves, images by images."""
    images, _ = whole(digit_sources().train.variant(augmentation=NO_AUGMENTATION))
    found = {}
    for name in roots(trainer):
        layer = base.get_submodule(name.rpartition(".")[0])
        seen = []
        hook = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            base(pixel_values=images.to(base.dtype), return_dict=True)
        hook.remove()
        rows = seen[0].movedim(1, -1).flatten(0, -2)
        found[name] = inverse_root(rows.T @ rows)
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_inputs_of_the_training_images_are_whitened(tmp_path, cached):
    cache = str(tmp_path / "cache") if cached else None
    trainer = tiny_trainer(
        tmp_path, tiny_model(dtype=torch.float64, whiten=True), activation_cache_dir=cache, max_steps=1
    )
    trainer.train()
    expected = expected_roots(trainer, trainer.model.students[0].backbone.base)
    assert len(expected) == 3  # the convolutions of the last block, one of which is its shortcut
    for name, root in roots(trainer).items():
        torch.testing.assert_close(root, expected[name], rtol=1e-4, atol=1e-4)
        assert (root - torch.eye(len(root))).abs().max() > 0.5


def test_a_gradient_base_has_inputs_of_its_own(tmp_path):
    bases = [tiny_resnet(seed, width=6, dtype=torch.float64) for seed in (0, 1)]
    names = [str(digit) for digit in range(10)]
    model = build_gradient_features(bases[0], class_names=names, gradient_base=bases[1], whiten=True)
    trainer = tiny_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    expected = expected_roots(trainer, model.backbone.gradient_base)
    for name, root in roots(trainer).items():
        torch.testing.assert_close(root, expected[name], rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_never_called_is_left_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(whiten=True))
    layers = trainer.model.students[0].backbone.whitened_layers()
    called, *others = layers
    with InputMoments(layers) as moments:
        layers[called](torch.randn(20, 6, 4, 4))
    trainer._whiten(moments)
    whitened = {name: not torch.equal(root, torch.eye(len(root))) for name, root in roots(trainer).items()}
    assert whitened == {called: True, **dict.fromkeys(others, False)} and others


def test_a_model_that_is_given_keeps_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(whiten=True), omega="given", max_steps=1)
    trainer.train()
    assert all(torch.equal(root, torch.eye(len(root))) for root in roots(trainer).values())


def test_resume_is_exact(tmp_path):
    whole_run = in_a_process(tmp_path / "whole", target=run, whiten=True)
    resumed = in_a_process(tmp_path / "resumed", target=run, whiten=True, resume=str(whole_run / "checkpoint-5"))
    assert differences(whole_run / "checkpoint-12", resumed / "checkpoint-12", students=1) == []


def test_fewer_updates_are_needed(tmp_path):
    """Of gradients alone, which start from nothing: the training loss after 40 updates at the same rate."""
    losses = {}
    for whiten in (False, True):
        model = tiny_model("gradient", whiten=whiten)
        trainer = tiny_trainer(tmp_path / str(whiten), model, max_steps=40, learning_rate=0.3)
        trainer.train()
        losses[whiten] = trainer.evaluate(digit_sources().train)["eval_loss"]
    assert losses[True] < 0.8 * losses[False]  # .59 of it; of another base .72

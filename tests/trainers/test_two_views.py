"""VICReg and SimSiam: which views they see, what their losses are made of, who moves, and what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import digit_sources, tiny_resnet
from transformers import AutoModel, AutoModelForImageClassification
from two_view_runs import tiny_generator, tiny_trainer, view_digits

from hfkd.data import Augmentation, ViewAugmentation, load_digits
from hfkd.errors import InputError
from hfkd.losses.squeeze_and_span import span_loss
from hfkd.models.simsiam_parts import SimSiamPredictor, SimSiamProjector


METHODS = ["vicreg", "simsiam"]


def first_batch(trainer):
    """What `method_step` is given first."""
    loader = trainer.get_train_dataloader()
    return trainer._materialise(trainer.train_dataset, next(iter(loader)))


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


# -- views -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_real_images_have_two_views_and_need_no_generator(method, tmp_path):
    trainer = tiny_trainer(method, tmp_path)
    assert not trainer.model.teachers and trainer.args.synthetic_share == 0
    batch = first_batch(trainer)
    first, second = trainer.two_views(batch)
    assert first.shape == second.shape == (50, 1, 8, 8) and not torch.equal(first, second)
    train, _ = view_digits()
    keys = torch.stack([torch.zeros_like(batch["index"]), batch["index"]], dim=1)
    expected = train.variant(views=2, seed=trainer.data_seed).materialise({"key": keys})
    assert torch.equal(first, expected["pixel_values"]) and torch.equal(second, expected["pixel_values_2"])


@pytest.mark.parametrize("method", METHODS)
def test_mixed_data_is_one_batch_of_both_domains(method, tmp_path):
    trainer = tiny_trainer(method, tmp_path, synthetic_share=0.3)
    batch = first_batch(trainer)
    first, second = trainer.two_views(batch)
    assert first.shape == (50, 1, 8, 8) and len(batch["synthetic_index"]) == 15 and len(batch["index"]) == 35
    assert torch.equal(first[15:], batch["pixel_values"]) and torch.equal(second[15:], batch["pixel_values_2"])
    generated = trainer.generate(batch)
    for view, pixels in enumerate((first, second)):
        assert torch.equal(pixels[:15], trainer.synthetic_view(generated, batch, view))
    assert not torch.equal(first[:15], second[:15])
    sizes = []
    trainer.model.students[0].register_forward_hook(lambda module, args, output: sizes.append(len(output[0])))
    trainer.loss(batch)
    assert sizes == [50, 50]  # batch norm sees both domains at once


class Unreadable(type(digit_sources().train)):
    """Images that nobody may look at."""

    def _pixels(self, *_):
        raise AssertionError("an image was read")

    _item = _pixels


@pytest.mark.parametrize("method", METHODS)
def test_synthetic_data_alone_reads_no_image_and_leaves_the_generator_as_it_was(method, tmp_path):
    train = view_digits()[0].variant()
    train.__class__ = Unreadable
    generator = tiny_generator()
    before, calls = state(generator), []
    trainer = tiny_trainer(method, tmp_path, generator=generator, train=train, synthetic_share=1.0, max_steps=3)
    start = state(trainer.model)
    generator.register_forward_hook(lambda module, args, output: calls.append(len(output.images)))
    trainer.train()
    assert calls == [50, 50, 50]
    assert not changed(before, generator) and all(p.grad is None for p in generator.parameters())
    learnt = {name for name, _ in trainer.model.named_parameters() if not name.startswith("teachers.")}
    assert learnt - changed(start, trainer.model) <= {"students.0.stem.1.bias"}


# -- VICReg ----------------------------------------------------------------------------------------


def test_vicregs_loss_is_the_span_loss_of_the_joined_batch(tmp_path):
    trainer = tiny_trainer("vicreg", tmp_path, synthetic_share=0.5, invariance_weight=10.0, variance_weight=7.0)
    batch = first_batch(trainer)
    loss, parts = trainer.loss(batch)
    with torch.no_grad():
        views = trainer.two_views(batch)
        z, other = (
            trainer.model.training_only["projector"](trainer.model.students[0](view).pooler_output) for view in views
        )
    expected, _ = span_loss(z, other, trainer.args.loss_weights)
    torch.testing.assert_close(loss.detach(), expected)
    total = 10 * parts["invariance"] + 2 * 7 * parts["variance"] + 2 * parts["covariance"]
    torch.testing.assert_close(loss, total)
    # Statistics are not the mean of the two domains'.
    apart = [span_loss(z[rows], other[rows], trainer.args.loss_weights)[0] for rows in (slice(25), slice(25, 50))]
    assert abs(sum(apart) / 2 - expected) > 0.01


def test_vicreg_learns(tmp_path):
    trainer = tiny_trainer("vicreg", tmp_path, max_steps=24, learning_rate=0.05)
    trainer.train()
    logs = losses(trainer)
    assert sum(entry["loss"] for entry in logs[-4:]) < 0.95 * sum(entry["loss"] for entry in logs[:4])
    assert logs[-1]["representation_std"] > 0.3
    metrics = trainer.evaluate()
    assert 0.12 < metrics["eval_knn_accuracy"] <= 1 and metrics["eval_representation_rank"] > 1


# -- SimSiam ---------------------------------------------------------------------------------------


def test_simsiams_networks_are_the_codes():
    """Squeeze-and-Span's for CIFAR: 512-512-2048 with a norm that has no weights, and 2048-512-2048."""
    projector, predictor = SimSiamProjector(512), SimSiamPredictor()
    assert sum(p.numel() for p in projector.parameters()) == 512 * 512 + 2 * 512 + 512 * 2048
    assert sum(p.numel() for p in predictor.parameters()) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
    assert len([m for m in SimSiamProjector(512, layers=3).modules() if isinstance(m, torch.nn.Linear)]) == 3
    z = projector(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(z.mean(0), torch.zeros(2048), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(2048), atol=1e-2, rtol=0)


def test_simsiams_gradients_pass_through_predictions_alone(tmp_path):
    """By hand: what is predicted is a constant."""
    trainer = tiny_trainer("simsiam", tmp_path, dtype=torch.float64, synthetic_share=0.5)
    batch = first_batch(trainer)
    student, heads = trainer.model.students[0], trainer.model.training_only
    parameters = [*student.parameters(), *heads.parameters()]
    loss, _ = trainer.loss(batch)
    found = torch.autograd.grad(loss, parameters)
    z, other = (heads["projector"](student(view).pooler_output) for view in trainer.two_views(batch))
    held, other_held = z.detach().clone(), other.detach().clone()
    cosines = [
        F.cosine_similarity(heads["predictor"](own), target, dim=1).mean()
        for own, target in ((z, other_held), (other, held))
    ]
    by_hand = -sum(cosines) / 2
    torch.testing.assert_close(loss, by_hand)
    for gradient, expected in zip(found, torch.autograd.grad(by_hand, parameters), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_the_predictor_keeps_its_rate(tmp_path):
    trainer = tiny_trainer("simsiam", tmp_path, max_steps=4, learning_rate=0.1)
    owned = {}
    create = trainer.build_optimizers

    def watched():
        owned.update(create())
        return owned

    trainer.build_optimizers = watched
    trainer.train()
    rates = [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [entry["learning_rate"] for entry in losses(trainer)] == pytest.approx(rates)
    assert [entry["learning_rate_predictor"] for entry in losses(trainer)] == pytest.approx([0.1] * 4)
    counts = {name: sum(len(group["params"]) for group in one.param_groups) for name, one in owned.items()}
    heads = trainer.model.training_only
    assert counts["predictor"] == len(list(heads["predictor"].parameters())) == 5
    assert counts["student"] == len(list(trainer.model.students.parameters())) + len(
        list(heads["projector"].parameters())
    )


def test_simsiam_learns_and_tells_how_far_it_is_from_collapse(tmp_path):
    trainer = tiny_trainer("simsiam", tmp_path, max_steps=24, learning_rate=0.2)
    trainer.train()
    logs = losses(trainer)
    assert all(-1 <= entry["loss"] <= 1 for entry in logs)
    assert all(entry["cosine_similarity"] == pytest.approx(-entry["loss"], abs=1e-4) for entry in logs)
    assert sum(entry["loss"] for entry in logs[-4:]) < sum(entry["loss"] for entry in logs[:4]) - 0.4
    assert 0.5 * 12**-0.5 < logs[-1]["representation_std"] <= 1.05 * 12**-0.5


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_is_saved_with_its_card(method, tmp_path):
    trainer = tiny_trainer(method, tmp_path, max_steps=2, synthetic_share=0.5, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not changed(state(backbone), trainer.model.students[0])
    classifier, info = AutoModelForImageClassification.from_pretrained(
        tmp_path / "checkpoint-2", num_labels=3, output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"}
    assert classifier(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hfkd_resnet"
    card = (tmp_path / "README.md").read_text()
    assert f"[{trainer._name}](https://arxiv.org/abs/{trainer._paper['id']})" in card
    assert "samples.png" in card and "on real images, on those of a frozen generator, or on both" in " ".join(
        card.split()
    )


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "vicreg",
            {"augment_synthetic": False, "synthetic_share": 0.5},
            "makes the two views of a synthetic image one",
        ),
        ("vicreg", {"variance_weight": -1.0}, "variance_weight=-1.0"),
        ("vicreg", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 is not supported"),
        ("vicreg", {"synthetic_share": 1.5}, "synthetic_share=1.5"),
        ("vicreg", {"shared_augmentation": True}, "no effect with synthetic_share=0"),
        ("simsiam", {"gather_statistics": False}, "gather_statistics=False has no effect with SimSiam"),
        ("simsiam", {"predictor_hidden_size": 0}, "predictor_hidden_size=0"),
        ("simsiam", {"generator": tiny_generator()}, "synthetic_share=0 leaves a generator without effect"),
        ("simsiam", {"augmentation": Augmentation(crop_padding=1), "synthetic_share": 0.5}, "pass a ViewAugmentation"),
    ],
)
def test_bad_settings_are_one_line(method, settings, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer(method, tmp_path / "run", **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_datasets_split_will_do(tmp_path):
    """Not an `ImageSource`, and no labels."""
    digits = load_digits().select(range(100)).remove_columns("label")
    processor = digit_sources().train.preprocessing.to_image_processor()
    trainer = tiny_trainer("vicreg", tmp_path, max_steps=1)
    made = type(trainer)(
        tiny_resnet(0), trainer.args, train_dataset=digits, processing_class=processor, augmentation=ViewAugmentation()
    )
    made.train()
    assert losses(made)[0]["invariance"] > 0

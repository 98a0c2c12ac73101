"""Encoding's trainer: what its loss is made of, where gradients pass, what is drawn, saved and refused."""

import pytest
import torch
import torch.nn.functional as F
from generative_runs import symmetric_digits
from tiny_runs import digit_sources, tiny_resnet
from transformers import AutoModel, ViTConfig, ViTForImageClassification
from two_view_runs import tiny_generator, tiny_trainer

from hfkd.data import Augmentation, ViewAugmentation
from hfkd.errors import InputError
from hfkd.models import HfkdConditionalGeneratorConfig, HfkdConditionalGeneratorModel
from hfkd.trainers.latent_encoding import LatentEncodingConfig, LatentEncodingTrainer


def encoder(tmp_path, *arguments, **settings):
    return tiny_trainer("latent_encoding", tmp_path, *arguments, **settings)


def first_batch(trainer):
    loader = trainer.get_train_dataloader()
    return trainer._materialise(trainer.train_dataset, next(iter(loader)))


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["stylegan2", "dcgan"])
def test_its_loss_by_hand(kind, tmp_path):
    """alpha [mse(w', w) + L1(G(w'), x)] + (1 - alpha) L1(G(w'), x), of which only a synthetic x has a w."""
    generator = tiny_generator(kind, dtype=torch.float64).eval()
    trainer = encoder(tmp_path, generator=generator, synthetic_share=0.3, dtype=torch.float64)
    batch = first_batch(trainer)
    loss, parts = trainer.loss(batch)
    student, projector = trainer.model.students[0], trainer.model.training_only["projector"]
    generated = trainer.generate(batch)
    assert len(generated.images) == 15 and len(batch["index"]) == 35
    assert projector[-1].out_features == (4 * 6 if kind == "stylegan2" else 6)

    def reconstruct(images):
        codes = projector(student(images).pooler_output)
        if kind == "dcgan":
            return codes, generator(codes).images
        codes = codes.unflatten(1, (4, 6))
        return codes, generator.synthesize(codes, noise_mode="const").images

    codes, images = reconstruct(generated.images)
    latents = generated.latents if kind == "dcgan" else generated.latents[:, None].expand(-1, 4, -1)
    synthetic = (codes - latents).square().mean() + (images - generated.images).abs().mean()
    _, again = reconstruct(batch["pixel_values"])
    real = (again - batch["pixel_values"]).abs().mean()
    torch.testing.assert_close(loss, 0.3 * synthetic + 0.7 * real)
    assert parts.keys() == {"latent", "reconstruction", "real_reconstruction"}
    torch.testing.assert_close(parts["real_reconstruction"], real)


def test_synthetic_images_are_those_of_their_latents_and_images_are_not_augmented(tmp_path):
    generator = tiny_generator()
    trainer = encoder(tmp_path, generator=generator)
    batch = first_batch(trainer)
    generated = trainer.generate(batch)
    torch.testing.assert_close(trainer.synthetic_view(generated, batch), generated.images)
    rows = torch.stack([torch.zeros_like(batch["index"]), batch["index"]], dim=1)
    plain = symmetric_digits().train.variant(augmentation=Augmentation())
    assert symmetric_digits().train.augmentation
    assert torch.equal(batch["pixel_values"], plain.materialise({"key": rows})["pixel_values"])
    assert "pixel_values_2" not in batch and batch["pixel_values"].abs().max() <= 1


def test_gradients_pass_through_the_generator_and_leave_it_as_it_was(tmp_path):
    generator = tiny_generator()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    trainer = encoder(tmp_path, generator=generator, max_steps=3)
    real = trainer.image_losses(trainer.encode(first_batch(trainer)["pixel_values"]), torch.zeros(25, 1, 8, 8))
    weight = trainer.model.training_only["projector"][-1].weight
    (gradient,) = torch.autograd.grad(real["reconstruction"], weight)
    assert gradient.abs().max() > 0  # by no other way than through G
    start = weight.detach().clone()
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert not torch.equal(weight, start)


def test_it_learns_and_its_errors_are_measured(tmp_path):
    trainer = encoder(tmp_path, max_steps=40, learning_rate=0.05, synthetic_share=1.0)
    before = trainer.evaluate()
    trainer.train()
    logs = losses(trainer)
    assert sum(entry["latent"] for entry in logs[-4:]) < 0.8 * sum(entry["latent"] for entry in logs[:4])
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["latent"] + entry["reconstruction"], rel=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_reconstruction_error"] != before["eval_reconstruction_error"]
    assert 0 < metrics["eval_knn_accuracy"] <= 1
    batch = symmetric_digits().test.materialise({"key": torch.tensor([(0, row) for row in range(100)])})
    trainer.model.eval()
    with torch.no_grad():
        decoded = trainer.decode(trainer.encode(batch["pixel_values"]))
    assert metrics["eval_reconstruction_error"] == pytest.approx(F.mse_loss(decoded, batch["pixel_values"]).item())


def test_a_perceptual_network_adds_a_term(tmp_path):
    network = tiny_resnet(7)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = encoder(tmp_path, perceptual_network=network, max_steps=2)
    _, parts = trainer.loss(first_batch(trainer))
    assert {"perceptual", "real_perceptual"} <= parts.keys()
    weight = trainer.model.training_only["projector"][-1].weight
    (gradient,) = torch.autograd.grad(parts["real_perceptual"], weight)
    assert parts["real_perceptual"] > 0 and gradient.abs().max() > 0
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for entry in losses(trainer):
        synthetic = entry["latent"] + entry["reconstruction"] + entry["perceptual"]
        real = entry["real_reconstruction"] + entry["real_perceptual"]
        assert entry["loss"] == pytest.approx(0.5 * synthetic + 0.5 * real, rel=1e-4)
    assert len(trainer.fingerprints()) == 2


def test_the_backbone_is_saved_with_a_card_that_says_what_is_left_out(tmp_path):
    trainer = encoder(tmp_path, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "a run that names no `perceptual_network` has no such term" in card and "samples.png" in card
    assert "Mean squared reconstruction error" in card


def vit():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))


def of_classes():
    settings = {"latent_size": 4, "hidden_sizes": [8], "id2label": {0: "a", 1: "b"}, "num_channels": 1}
    return HfkdConditionalGeneratorModel(HfkdConditionalGeneratorConfig.for_images(8, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment_synthetic": True}, "augment_synthetic=True"),
        ({"synthetic_share": 0.0}, "choose a share above 0"),
        ({"representation_size": 8}, "representation_size=8 has no effect with encoding"),
        ({"gather_statistics": False}, "gather_statistics=False has no effect"),
        ({"augmentation": ViewAugmentation()}, "the generator makes no augmented images"),
        ({"perceptual_network": vit()}, "whose hidden states are no maps"),
        ({"generator": tiny_generator(image_size=16)}, "makes images of 16x16 pixels"),
        ({"generator": of_classes()}, "makes images of 2 classes, which real images do not tell"),
        ({"train": digit_sources().train}, "choose normalization=symmetric"),
    ],
)
def test_bad_settings_are_one_line(settings, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        encoder(tmp_path / "run", **settings)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_run_without_data_is_as_long_as_max_steps(tmp_path):
    args = LatentEncodingConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, logging_steps=1
    )
    trainer = LatentEncodingTrainer(tiny_resnet(0), tiny_generator(), args)
    trainer.train()
    assert [entry["step"] for entry in losses(trainer)] == [1, 2]

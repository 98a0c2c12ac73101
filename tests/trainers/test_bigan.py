"""BiGAN's trainer: whose gradient goes where, what moves when, and what is drawn, measured, saved and refused."""

import dataclasses
import errno
import math
import os
import shutil
import unittest.mock

import pytest
import torch
from clean_process import run_clean
from generative_runs import SEPARABLE, symmetric_digits, tiny_networks, tiny_trainer
from tiny_runs import digit_sources, tiny_resnet
from transformers import AutoImageProcessor, AutoModel

from hfkd.data import load_digits
from hfkd.errors import InputError, RunError
from hfkd.hub.manifest import write_manifest
from hfkd.losses.bigan import discriminator_loss, generator_loss
from hfkd.models import (
    HfkdBiganEncoderConfig,
    HfkdBiganEncoderForImageClassification,
    HfkdBiganEncoderModel,
    HfkdBiganGeneratorConfig,
    HfkdBiganGeneratorModel,
    HfkdVaeEncoderConfig,
    HfkdVaeEncoderModel,
    build_student,
)
from hfkd.trainers import publishing
from hfkd.trainers.bigan import BiGanConfig, BiGanTrainer
from hfkd.trainers.vae import VaeConfig, VaeTrainer


def weights(trainer):
    """Parameters by the part that they belong to."""
    parts = {
        "encoder": trainer.model.students[0],
        "generator": trainer.model.students[1],
        "latent_head": trainer.model.training_only["latent_head"],
        "discriminator": trainer.model.training_only["discriminator"],
    }
    return {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}


def moved(before, after):
    return {
        name for name in before if any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
    }


def watch_moves(trainer):
    """After each update, which parts have moved in it."""
    moves, held = [], [weights(trainer)]
    create = trainer.create_optimizer

    def create_and_watch(model=None):
        optimizer = create(model)
        own = optimizer.step

        def watched():
            own()
            moves.append(moved(held[-1], weights(trainer)))
            held.append(weights(trainer))

        optimizer.step = watched
        return optimizer

    trainer.create_optimizer = create_and_watch
    return moves


# -- gradients -------------------------------------------------------------------------------------


def test_each_loss_reaches_its_own_networks_only(tmp_path):
    """Both gradients by hand, each with the other side cut off, from the weights before anything moved."""
    trainer = tiny_trainer("bigan", tmp_path, dtype=torch.float64, **SEPARABLE["bigan"], max_steps=1)
    kept = {}
    method_step = trainer.method_step

    def watched(batch, share, last):
        data, samples = trainer._pairs(batch, trainer.state.global_step)
        cut = [tuple(t.detach() for t in pair) for pair in (data, samples)]
        judge = trainer.model.training_only["discriminator"]
        of_discriminator = discriminator_loss(judge(*cut[0]), judge(*cut[1]))
        names = ("discriminator", "encoder_generator")
        owned = {name: trainer.optimizer.parameters(name) for name in names}
        by_hand = {names[0]: torch.autograd.grad(of_discriminator, owned[names[0]])}
        judge.requires_grad_(False)
        of_generator = generator_loss(judge(*data), judge(*samples))
        by_hand[names[1]] = torch.autograd.grad(of_generator, owned[names[1]])
        judge.requires_grad_(True)
        result = method_step(batch, share, last)
        for name in names:
            assert list(trainer.optimizer.gradients(name)) == owned[name]
            for gradient, expected in zip(trainer.optimizer.gradients(name).values(), by_hand[name], strict=True):
                torch.testing.assert_close(gradient, expected)
            kept[name] = max(gradient.abs().max() for gradient in by_hand[name])
        return result

    trainer.method_step = watched
    trainer.train()
    assert min(kept.values()) > 1e-6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 0.0, "discriminator_learning_rate": 1e-3}, {"discriminator"}),
        ({"discriminator_learning_rate": 0.0}, {"encoder", "generator", "latent_head"}),
        ({}, {"encoder", "generator", "latent_head", "discriminator"}),
    ],
)
def test_a_rate_of_zero_keeps_a_side_still(tmp_path, settings, expected):
    trainer = tiny_trainer("bigan", tmp_path, **settings, max_steps=3)
    before = weights(trainer)
    trainer.train()
    assert moved(before, weights(trainer)) == expected


@pytest.mark.parametrize("gan_loss", ["ali", "wasserstein"])
def test_encoder_and_generator_move_in_every_nth_update(tmp_path, gan_loss):
    trainer = tiny_trainer("bigan", tmp_path, gan_loss=gan_loss, discriminator_steps=3, max_steps=7)
    moves = watch_moves(trainer)
    trainer.train()
    assert [len(move) for move in moves] == [4, 1, 1, 4, 1, 1, 4]
    assert all("discriminator" in move for move in moves)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms[0] > 0


def test_the_discriminator_learns_and_can_be_fooled(tmp_path):
    """20 steps of one side alone lower that side's loss."""
    still = {"discriminator_dropout": 0.0, "discriminator_input_dropout": 0.0, "max_steps": 20}
    first = tiny_trainer("bigan", tmp_path / "a", learning_rate=0.0, discriminator_learning_rate=3e-3, **still)
    first.train()
    losses = [entry["discriminator_loss"] for entry in first.state.log_history if "discriminator_loss" in entry]
    assert losses[0] == pytest.approx(2 * math.log(2), abs=0.1) and losses[19] < 0.7 * losses[0]

    second = tiny_trainer("bigan", tmp_path / "b", learning_rate=3e-3, discriminator_learning_rate=0.0, **still)
    second.model.training_only.load_state_dict(first.model.training_only.state_dict())
    second.train()
    losses = [entry["generator_loss"] for entry in second.state.log_history if "generator_loss" in entry]
    assert losses[19] < 0.8 * losses[0]


def test_wasserstein_logs_its_penalty(tmp_path):
    settings = SEPARABLE["bigan"] | {"gan_loss": "wasserstein", "max_steps": 1}
    logs = []
    for weight in (10.0, 0.0):
        trainer = tiny_trainer("bigan", tmp_path / str(weight), gradient_penalty_weight=weight, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert (
        logs[0]["gradient_penalty"] == pytest.approx(logs[1]["gradient_penalty"]) and logs[0]["gradient_penalty"] > 0
    )
    extra = logs[0]["discriminator_loss"] - logs[1]["discriminator_loss"]
    assert extra == pytest.approx(10 * logs[0]["gradient_penalty"], rel=1e-4)
    assert logs[1]["discriminator_loss"] == pytest.approx(-logs[1]["generator_loss"], abs=1e-6)
    assert "discriminator_accuracy" not in logs[0]
    # The two losses cancel: their sum would be the penalty alone.
    assert [entry["loss"] for entry in logs] == [entry["discriminator_loss"] for entry in logs]


def test_the_discriminator_for_svhn_trains(tmp_path):
    """Batch norm in its layers on images after the first, leaky ReLUs, less dropout."""
    settings = {"discriminator_norm": "batch", "discriminator_activation": "leaky_relu", "discriminator_dropout": 0.2}
    trainer = tiny_trainer("bigan", tmp_path, max_steps=1, **settings)
    discriminator = trainer.model.training_only["discriminator"]
    norms = [layer for layer in discriminator.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    before = weights(trainer)
    trainer.train()
    assert moved(before, weights(trainer)) == {"encoder", "generator", "latent_head", "discriminator"}
    assert len(norms) == 2 and all(layer.running_mean.abs().max() > 0 for layer in norms)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_optimizers_and_schedules_are_the_configurations(tmp_path):
    settings = {"weight_decay": 0.1, "discriminator_learning_rate": 2e-3, "discriminator_lr_milestones": [0.5]}
    trainer = tiny_trainer("bigan", tmp_path, **settings, lr_milestones=[0.25], max_steps=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-4])
    assert [entry["learning_rate_discriminator"] for entry in logs] == pytest.approx([2e-3, 2e-3, 2e-4, 2e-4])
    for optimizer in trainer.optimizer.optimizers.values():
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0.1)


# -- draws -----------------------------------------------------------------------------------------


def test_draws_are_functions_of_seed_update_and_image(tmp_path):
    trainer = tiny_trainer("bigan", tmp_path, norm="group")
    source, state = symmetric_digits().test, torch.random.get_rng_state()

    def pairs(rows, update, of=trainer):
        with torch.no_grad():
            data, samples = of._pairs(source.materialise({"key": torch.tensor([(0, row) for row in rows])}), update)
        return torch.cat([data[1], samples[1]], dim=1), samples[0]

    latents, images = pairs([5, 17, 3], update=2)
    again, same_images = pairs([3, 5], update=2)
    torch.testing.assert_close(again, latents[[2, 0]])
    torch.testing.assert_close(same_images, images[[2, 0]])
    assert (pairs([5], update=3)[0] - latents[0]).abs().min() > 0
    other = tiny_trainer("bigan", tmp_path / "other", norm="group", data_seed=1)
    assert (pairs([5], update=2, of=other)[0] - latents[0]).abs().min() > 0
    assert torch.equal(state, torch.random.get_rng_state())
    assert latents[:, 4:].std() > 0.3  # z ~ N(0, I)


# -- evaluation ------------------------------------------------------------------------------------


def test_evaluation_needs_no_labels_and_leaves_no_trace(tmp_path):
    trainer = tiny_trainer("bigan", tmp_path)
    source = symmetric_digits().test
    before, state = weights(trainer), torch.random.get_rng_state()
    metrics, again = trainer.evaluate(), trainer.evaluate()
    assert {k for k in metrics if metrics[k] != again[k]} <= {k for k in metrics if "second" in k or "runtime" in k}
    assert moved(before, weights(trainer)) == set() and torch.equal(state, torch.random.get_rng_state())
    pixels = source.materialise({"key": torch.tensor([(0, row) for row in range(100)])})["pixel_values"]
    encoder, generator = trainer.model.students.eval()
    with torch.no_grad():
        mean = trainer.model.training_only["latent_head"].eval()(encoder(pixels).pooler_output)[0]
        error = (generator(mean).images - pixels).square().mean().item()
    assert metrics["eval_reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert 0 <= metrics["eval_discriminator_accuracy"] <= 1
    predicted = trainer.predict(source)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), mean, rtol=1e-4, atol=1e-5)


def test_unlabelled_data_trains_evaluates_and_chooses_the_best(tmp_path):
    digits = load_digits().remove_columns("label").select(range(150))
    processor = symmetric_digits().train.preprocessing.to_image_processor()
    context = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reconstruction_error"}
    config = BiGanConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=50, use_cpu=True, disable_tqdm=True, **context, **best
    )
    trainer = BiGanTrainer(
        *tiny_networks("bigan"), args=config, train_dataset=digits, eval_dataset=digits, processing_class=processor
    )
    trainer.train()
    errors = [e["eval_reconstruction_error"] for e in trainer.state.log_history if "eval_reconstruction_error" in e]
    assert trainer.state.best_metric == pytest.approx(min(errors), rel=1e-3)


# -- saving ----------------------------------------------------------------------------------------

LOAD = """
import torch
from transformers import AutoModel, AutoImageProcessor

torch.set_num_threads(1)
encoder = AutoModel.from_pretrained("run", trust_remote_code=True)
generator = AutoModel.from_pretrained("run", subfolder="generator", trust_remote_code=True)
pictures = generator.to_pil(generator.sample(2, seed=0))
pixels = AutoImageProcessor.from_pretrained("run")(pictures[0].convert("RGB"), return_tensors="pt").pixel_values
print(tuple(encoder(pixels).pooler_output.shape), pixels.min() >= -1, len(pictures))
"""


def test_a_checkpoint_is_encoder_and_generator(tmp_path):
    trainer = tiny_trainer("bigan", tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    for place in (tmp_path / "run/checkpoint-2", tmp_path / "run"):
        if place.name == "run":
            trainer.save_model()
        for subfolder, student in zip(("", "generator"), trainer.model.students, strict=True):
            loaded = AutoModel.from_pretrained(place / subfolder)
            assert type(loaded) is type(student)
            for name, value in student.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], value)
        assert AutoImageProcessor.from_pretrained(place).image_mean == (0.5,) * 3
        assert not (place / "generator/preprocessor_config.json").exists()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert run_clean(LOAD, environment, tmp_path).strip() == "(1, 16) tensor(True) 2"


def test_a_picture_that_fails_is_left_out(tmp_path):
    trainer = tiny_trainer("bigan", tmp_path)

    def sample(n, seed):
        raise RuntimeError("no samples today")

    trainer.model.students[1].sample = sample
    with unittest.mock.patch.object(publishing.logger, "warning") as warn:
        trainer.save_model()
    (message,) = warn.call_args.args
    assert message == "model card: pictures are left out (RuntimeError: no samples today)"
    card = (tmp_path / "README.md").read_text()
    assert "samples.png" not in card and "| generator | HfkdBiganGeneratorModel |" in card


def test_no_room_for_a_picture_is_no_failing_section(tmp_path):
    trainer = tiny_trainer("bigan", tmp_path)

    def sample(n, seed):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.model.students[1].sample = sample
    with pytest.raises(RunError, match="card is not .No space left on device"):
        trainer.save_model()


def test_a_save_leaves_no_peers_of_another_method(tmp_path, make_trainer):
    """They would be published, and read, as this run's."""
    tiny_trainer("bigan", tmp_path).save_model()
    tiny_trainer("vae", tmp_path).save_model()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    make_trainer(output_dir=tmp_path).save_model()
    assert (tmp_path / "student_1").is_dir()
    (tmp_path / "notes").mkdir()
    tiny_trainer("bigan", tmp_path).save_model()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"generator", "notes"}


def test_a_first_save_removes_nothing(tmp_path):
    """Without students at the root, a folder of such a name is no peer of a former save."""
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator/notes.txt").write_text("mine")
    tiny_trainer("vae", tmp_path).save_model()
    assert (tmp_path / "generator/notes.txt").read_text() == "mine"


def test_a_checkpoint_with_networks_of_another_method_is_refused(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    for method in ("vae", "bigan"):
        tiny_trainer(method, tmp_path / method, **settings).train()
    checkpoint = tmp_path / "vae/checkpoint-1"
    shutil.copytree(tmp_path / "bigan/checkpoint-1/generator", checkpoint / "generator")
    write_manifest(checkpoint)
    with pytest.raises(InputError, match="holds generator, which is no network of this run"):
        tiny_trainer("vae", tmp_path / "again", **settings).train(resume_from_checkpoint=str(checkpoint))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan_loss": "hinge"}, "gan_loss='hinge' is unknown"),
        ({"gradient_penalty_weight": 1.0}, "has no effect with gan_loss=ali"),
        ({"gan_loss": "wasserstein", "discriminator_norm": "batch"}, "choose none"),
        ({"discriminator_steps": 0}, "discriminator_steps=0"),
        ({"discriminator_dropout": 1.0}, "discriminator_dropout=1.0"),
        ({"discriminator_learning_rate": -1.0}, "discriminator_learning_rate=-1.0"),
        ({"discriminator_lr_milestones": [2.0]}, "discriminator_lr_milestones"),
        ({"optim": "sgd"}, "optim=sgd"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        BiGanConfig(str(tmp_path), use_cpu=True, **settings)
    assert "\n" not in str(caught.value)


class NoLatents(HfkdVaeEncoderModel):
    """It draws, but does not say from how many latents."""

    def __init__(self):
        super().__init__(HfkdVaeEncoderConfig(depth=2, scales=1))

    def sample(self, n, seed=None):
        raise NotImplementedError


def tiny_generator(**layers):
    config = HfkdBiganGeneratorConfig.mirror(tiny_networks("bigan")[0].config, latent_size=4)
    return HfkdBiganGeneratorModel(HfkdBiganGeneratorConfig.from_dict(config.to_dict() | layers))


def odd_networks():
    config = HfkdBiganEncoderConfig(
        num_channels=1, image_size=8, hidden_sizes=[4, 7, 16], kernel_sizes=[3, 4, 2], strides=[1, 2, 1]
    )
    generator = HfkdBiganGeneratorModel(HfkdBiganGeneratorConfig.mirror(config, latent_size=4))
    return [HfkdBiganEncoderModel(config), generator]


def test_odd_widths_train_without_maxout(tmp_path):
    settings = {"discriminator_activation": "leaky_relu", "max_steps": 1}
    assert tiny_trainer("bigan", tmp_path, networks=odd_networks(), **settings).train().training_loss > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": digit_sources()}, "normalization=symmetric"),
        ({"networks": [tiny_resnet(0), tiny_networks("bigan")[1]]}, "no kernel_sizes"),
        ({"networks": ["bigan_encoder", tiny_networks("bigan")[1]]}, "encoder is a str: pass a model"),
        ({"networks": [tiny_networks("bigan")[0], "generator"]}, "generator is a str: pass a model"),
        ({"networks": [tiny_networks("bigan")[0]] * 2}, "HfkdBiganEncoderModel without sample"),
        ({"networks": [tiny_networks("bigan")[0], NoLatents()]}, "NoLatents without config.latent_size"),
        ({"networks": [tiny_networks("bigan")[0], tiny_generator(strides=[1, 2, 2, 1])]}, "13x13 pixels"),
        ({"sources": symmetric_digits(3)}, "num_channels=1 and the images have 3"),
        ({"networks": odd_networks()}, r"hidden_sizes=\[4, 7, 16\]"),
        ({"per_device_train_batch_size": 199}, "batch of one image"),
    ],
)
def test_bad_parts(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer("bigan", tmp_path, **change)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_cannot_take_the_images(tmp_path):
    large = HfkdBiganEncoderForImageClassification(HfkdBiganEncoderConfig(num_channels=1))
    with pytest.raises(InputError, match="receptive field 32"):
        tiny_trainer("bigan", tmp_path, networks=[large, tiny_networks("bigan")[1]])


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bigan", "vae"])
def test_bf16_and_channels_last_train(method, tmp_path):
    trainer = tiny_trainer(method, tmp_path, bf16=True, channels_last=True, max_steps=3)
    kinds = set()
    trainer.model.students[0].stages[0][0][0].register_forward_hook(lambda m, x, y: kinds.add(y.dtype))
    trainer.train()
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    trainer.save_model()
    AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["bigan", "vae"])
def test_networks_that_return_tuples_by_default_train(method, tmp_path):
    networks = tiny_networks(method)
    for network in networks:
        network.config.return_dict = False
    trainer = tiny_trainer(method, tmp_path, networks=networks, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_reconstruction_error"])


# -- the VAE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae_encoder", "bigan_encoder"])
def test_real_widths_take_a_step(name, tmp_path):
    """The encoder is a classifier without its head."""
    processor = dataclasses.replace(symmetric_digits().train.preprocessing, image_size=32).to_image_processor()
    networks = [build_student(name, class_names=["a", "b"], image_size=32, num_channels=1)]
    kind, settings = (VaeTrainer, VaeConfig) if name == "vae_encoder" else (BiGanTrainer, BiGanConfig)
    if kind is BiGanTrainer:
        networks.append(HfkdBiganGeneratorModel(HfkdBiganGeneratorConfig.mirror(networks[0].config)))
    args = settings(str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, save_strategy="no")
    digits = load_digits().select(range(4))
    trainer = kind(*networks, args=args, train_dataset=digits, processing_class=processor)
    assert trainer.train().training_loss > 0
    assert trainer.model.students[0] is networks[0].base_model


def test_a_name_is_no_encoder(tmp_path):
    with pytest.raises(InputError, match="encoder is a str: pass a model"):
        tiny_trainer("vae", tmp_path, networks=["vae_encoder"])


def test_a_grey_encoder_does_not_take_colour(tmp_path):
    with pytest.raises(InputError, match="num_channels=1 and the images have 3"):
        tiny_trainer("vae", tmp_path, sources=symmetric_digits(3))

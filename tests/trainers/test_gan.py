"""The GAN's trainer: whose gradient goes where, what follows what, and what is drawn, measured, saved and refused."""

import math
import os
from dataclasses import replace

import pytest
import torch
from clean_process import run_clean
from generative_runs import SEPARABLE, symmetric_digits, tiny_networks, tiny_trainer
from hub_fixtures import loopback_hub
from tiny_runs import digit_sources, tiny_resnet
from transformers import AutoImageProcessor, AutoModel

from hfkd.data import load_digits
from hfkd.errors import InputError
from hfkd.evaluation.frechet import frechet_distance
from hfkd.evaluation.judges import ClassifierJudge, NearestNeighbourJudge, Verdict
from hfkd.hub import publish
from hfkd.losses.gan import discriminator_loss, generator_loss
from hfkd.models import (
    HfkdBiganGeneratorConfig,
    HfkdBiganGeneratorModel,
    HfkdConditionalGeneratorConfig,
    HfkdConditionalGeneratorModel,
    HfkdDcganDiscriminatorConfig,
    HfkdDcganDiscriminatorModel,
)
from hfkd.trainers.gan import GanConfig, GanTrainer
from hfkd.trainers.gan_checks import check_discriminator
from hfkd.trainers.weight_average import average_decay


def weights(trainer):
    """Parameters by the part that they belong to."""
    average, discriminator = trainer.model.students
    parts = {
        "average": average,
        "discriminator": discriminator,
        "generator": trainer.model.training_only["generator"],
    }
    return {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}


def moved(before, after):
    return {
        name for name in before if any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
    }


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalised", [True, False])
def test_each_loss_reaches_its_own_network_only(tmp_path, penalised):
    """Both gradients by hand, each with the other side cut off, from the weights before anything moved."""
    settings = {"r1_weight": 3.0, "r1_interval": 5} if penalised else {"r1_weight": 0.0}
    trainer = tiny_trainer("gan", tmp_path, dtype=torch.float64, **SEPARABLE["gan"], max_steps=1, **settings)
    kept = {}
    method_step = trainer.method_step
    learner, judge = trainer.model.training_only["generator"], trainer.model.students[1]

    def watched(batch, share, last):
        owned = {name: trainer.optimizer.parameters(name) for name in ("generator", "discriminator")}
        assert owned == {"generator": list(learner.parameters()), "discriminator": list(judge.parameters())}
        fake = trainer._generate(learner, batch, trainer.state.global_step)
        real = batch["pixel_values"].clone().requires_grad_()
        real_logits = judge(real).logits
        of_discriminator = discriminator_loss(real_logits, judge(fake.detach()).logits)
        if penalised:
            (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
            of_discriminator = of_discriminator + 5 * 3.0 / 2 * gradient.square().sum() / len(real)
        by_hand = {"discriminator": torch.autograd.grad(of_discriminator, owned["discriminator"])}
        judge.requires_grad_(False)
        by_hand["generator"] = torch.autograd.grad(generator_loss(judge(fake).logits), owned["generator"])
        judge.requires_grad_(True)
        result = method_step(batch, share, last)
        for name, gradients in by_hand.items():
            assert list(trainer.optimizer.gradients(name)) == owned[name]
            for gradient, expected in zip(trainer.optimizer.gradients(name).values(), gradients, strict=True):
                torch.testing.assert_close(gradient, expected)
            kept[name] = max(gradient.abs().max() for gradient in gradients)
        return result

    trainer.method_step = watched
    trainer.train()
    assert min(kept.values()) > 1e-6
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 0.0, "discriminator_learning_rate": 1e-3}, {"discriminator"}),
        ({"discriminator_learning_rate": 0.0}, {"average", "generator"}),
        ({}, {"average", "generator", "discriminator"}),
    ],
)
def test_a_rate_of_zero_keeps_a_side_still(tmp_path, settings, expected):
    trainer = tiny_trainer("gan", tmp_path, **settings, max_steps=3)
    before = weights(trainer)
    trainer.train()
    assert moved(before, weights(trainer)) == expected


def test_the_discriminator_learns_and_can_be_fooled(tmp_path):
    """20 steps of one side alone lower that side's loss."""
    settings = SEPARABLE["gan"] | {"max_steps": 20}
    first = tiny_trainer("gan", tmp_path / "a", learning_rate=0.0, discriminator_learning_rate=1e-2, **settings)
    first.train()
    losses = [entry["discriminator_loss"] for entry in logs(first)]
    assert losses[19] < 0.6 * losses[0]

    second = tiny_trainer("gan", tmp_path / "b", learning_rate=1e-2, discriminator_learning_rate=0.0, **settings)
    second.model.students[1].load_state_dict(first.model.students[1].state_dict())
    second.train()
    losses = [entry["generator_loss"] for entry in logs(second)]
    assert losses[19] < 0.6 * losses[0]


def test_the_total_is_both_losses_without_the_penalty(tmp_path):
    trainer = tiny_trainer("gan", tmp_path, r1_weight=5.0, r1_interval=2, max_steps=3)
    trainer.train()
    for entry in logs(trainer):
        assert entry["loss"] == pytest.approx(entry["generator_loss"] + entry["discriminator_loss"], rel=1e-4)
    assert [("r1_penalty" in entry) for entry in logs(trainer)] == [True, False, True]


# -- the average -----------------------------------------------------------------------------------


def test_decay_by_hand():
    assert average_decay(64, 10**9, half_life=64, ramp_up=0.05) == 0.5
    assert average_decay(64, 2560, half_life=10_000, ramp_up=0.05) == pytest.approx(0.5**0.5)  # h = 0.05 * 2560
    assert average_decay(64, 0, half_life=10_000, ramp_up=0.05) == 0  # the first update is copied
    assert average_decay(64, 0, half_life=6400, ramp_up=0.0) == pytest.approx(0.5**0.01)
    assert average_decay(64, 640, half_life=0, ramp_up=0.05) == 0


def test_the_saved_generator_follows_the_learning_one(tmp_path):
    settings = {"ema_half_life": 0.2, "ema_ramp_up": 0.0, "gradient_accumulation_steps": 2, "max_steps": 4}
    trainer = tiny_trainer("gan", tmp_path, per_device_train_batch_size=25, **settings)
    average, learner = trainer.model.students[0], trainer.model.training_only["generator"]
    for own, new in zip(average.state_dict().values(), learner.state_dict().values(), strict=True):
        assert torch.equal(own, new) and own is not new
    expected, follow = weights(trainer)["average"], trainer._follow_generator

    def watched():
        follow()
        decay = 0.5 ** (50 / 200)
        expected[:] = [
            decay * old + (1 - decay) * new for old, new in zip(expected, learner.parameters(), strict=True)
        ]
        torch.testing.assert_close(list(average.parameters()), expected)
        for own, new in zip(average.buffers(), learner.buffers(), strict=True):
            assert torch.equal(own, new)

    next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "AfterUpdate").function = watched
    trainer.train()
    assert moved({"": expected}, {"": list(learner.parameters())}) == {""}


# -- draws -----------------------------------------------------------------------------------------


def test_draws_are_functions_of_seed_update_and_image(tmp_path):
    trainer = tiny_trainer("gan", tmp_path, norm="none")
    source, state = symmetric_digits().test, torch.random.get_rng_state()

    @torch.no_grad()
    def images(rows, update, of=trainer):
        batch = source.materialise({"key": torch.tensor([(0, row) for row in rows])})
        return of._generate(of.model.training_only["generator"], batch, update)

    made = images([5, 17, 3], update=2)
    torch.testing.assert_close(images([3, 5], update=2), made[[2, 0]])
    assert (images([5], update=3)[0] - made[0]).abs().max() > 0
    other = tiny_trainer("gan", tmp_path / "other", norm="none", data_seed=1)
    assert (images([5], update=2, of=other)[0] - made[0]).abs().max() > 0
    assert torch.equal(state, torch.random.get_rng_state())


class NoisyGenerator(HfkdBiganGeneratorModel):
    """Adds its noise to the image, so that it can be seen."""

    noise_size = 64

    def forward(self, latents, labels=None, noise=None, return_dict=None):
        made = super().forward(latents, labels, return_dict=True)
        made["images"] = 0 * made.images + noise.view(-1, 1, 8, 8)
        return made


def test_layer_noise_is_drawn_beside_the_latents(tmp_path):
    config = HfkdBiganGeneratorConfig.mirror(tiny_networks("bigan")[0].config, latent_size=4)
    networks = [NoisyGenerator(config), tiny_networks("gan")[1]]
    trainer = tiny_trainer("gan", tmp_path, networks=networks, max_steps=2)
    batch = symmetric_digits().train.materialise({"key": torch.tensor([(0, row) for row in range(100)])})
    first, second = (trainer._generate(networks[0], batch, update) for update in (0, 1))
    assert first.std().item() == pytest.approx(1, abs=0.05) and not torch.equal(first, second)
    assert trainer.train().training_loss > 0


def test_real_and_generated_images_are_augmented_by_draws_of_their_own(tmp_path):
    trainer = tiny_trainer("gan", tmp_path, discriminator_augmentation="diffaugment")
    batch = symmetric_digits().train.materialise({"key": torch.tensor([(0, row) for row in range(8)])})
    shown = []
    trainer._logits = lambda images: shown.append(images) or images.flatten(1).sum(dim=1)
    trainer._generate = lambda generator, batch, update: batch["pixel_values"].clone().requires_grad_()
    trainer.create_optimizer()
    trainer.optimizer.backward = lambda *_, **__: None
    trainer.method_step(batch, 1.0, True)
    real, fake = shown
    assert not torch.equal(real, batch["pixel_values"]) and not torch.equal(real, fake)


# -- evaluation ------------------------------------------------------------------------------------


def digit_judge():
    return ClassifierJudge(tiny_resnet(3), symmetric_digits().train.preprocessing)


def test_evaluation_needs_no_labels_and_leaves_no_trace(tmp_path):
    trainer = tiny_trainer("gan", tmp_path)
    source = symmetric_digits().test
    before, state = weights(trainer), torch.random.get_rng_state()
    metrics, again = trainer.evaluate(), trainer.evaluate()
    assert {k for k in metrics if metrics[k] != again[k]} <= {k for k in metrics if "second" in k or "runtime" in k}
    assert {k for k in metrics if "loss" in k} == {"eval_generator_loss", "eval_discriminator_loss"}
    assert 0 <= metrics["eval_discriminator_accuracy"] <= 1 and "eval_frechet_distance" not in metrics
    assert moved(before, weights(trainer)) == set() and torch.equal(state, torch.random.get_rng_state())
    pixels = source.materialise({"key": torch.tensor([(0, row) for row in range(100)])})["pixel_values"]
    with torch.no_grad():
        logits = trainer.model.students[1].eval()(pixels).logits
    torch.testing.assert_close(torch.from_numpy(trainer.predict(source).predictions), logits)


def test_a_judge_says_what_generated_images_show(tmp_path):
    judge = digit_judge()
    trainer = tiny_trainer("gan", tmp_path, parts={"judge": judge})
    batch = symmetric_digits().test.materialise({"key": torch.tensor([(0, row) for row in range(100)])})
    with torch.no_grad():
        trainer.model.eval()
        fake = trainer._generate(trainer.model.students[0], batch, -1)
    found = judge(fake)
    metrics = trainer.evaluate()
    confidence, classes = found.probabilities.max(dim=1)
    assert metrics["eval_judge_confidence"] == pytest.approx(confidence.mean().item(), rel=1e-5)
    assert metrics["eval_smallest_judge_share"] == classes.bincount(minlength=10).min().item() / 100
    distance = frechet_distance(found.features, judge(batch["pixel_values"]).features)
    assert metrics["eval_frechet_distance"] == pytest.approx(distance, rel=1e-4)
    assert not any(parameter.requires_grad is False for parameter in judge.model.parameters())  # it is not touched
    assert all("judge" not in name for name in trainer.model.state_dict())


def test_a_judge_without_features_gives_no_distance(tmp_path):
    batch = symmetric_digits().test.materialise({"key": torch.tensor([(0, row) for row in range(50)])})
    judge = NearestNeighbourJudge(batch["pixel_values"], batch["labels"], 10)
    metrics = tiny_trainer("gan", tmp_path, parts={"judge": judge}).evaluate()
    assert "eval_judge_confidence" in metrics and "eval_frechet_distance" not in metrics


def test_the_judge_sees_full_precision(tmp_path):
    seen = set()

    def judge(images):
        with torch.no_grad():
            seen.add((images.dtype, (images.flatten(1) @ images.flatten(1).T).dtype))
        return Verdict(torch.full((len(images), 2), 0.5))

    tiny_trainer("gan", tmp_path, bf16=True, parts={"judge": judge}).evaluate()
    assert seen == {(torch.float32, torch.float32)}


def test_unlabelled_data_trains_and_the_smallest_distance_is_the_best(tmp_path):
    digits = load_digits().remove_columns("label").select(range(150))
    processor = symmetric_digits().train.preprocessing.to_image_processor()
    context = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "frechet_distance"}
    config = GanConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=50, use_cpu=True, disable_tqdm=True, **context, **best
    )
    trainer = GanTrainer(
        *tiny_networks("gan"),
        args=config,
        train_dataset=digits,
        eval_dataset=digits,
        processing_class=processor,
        judge=digit_judge(),
    )
    trainer.train()
    distances = [e["eval_frechet_distance"] for e in trainer.state.log_history if "eval_frechet_distance" in e]
    assert len(distances) == 2 and trainer.state.best_metric == pytest.approx(min(distances), rel=1e-3)


# -- saving ----------------------------------------------------------------------------------------

LOAD = """
import torch
from transformers import AutoImageProcessor, AutoModel

torch.set_num_threads(1)
generator = AutoModel.from_pretrained("run", trust_remote_code=True)
pictures = generator.to_pil(generator.sample(2, seed=0))
discriminator = AutoModel.from_pretrained("run", subfolder="discriminator", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("run", subfolder="discriminator")
pixels = processor(pictures[0].convert("RGB"), return_tensors="pt").pixel_values
print(tuple(discriminator(pixels).pooler_output.shape), pixels.min() >= -1, len(pictures))
"""


def test_a_checkpoint_is_generator_and_discriminator(tmp_path):
    trainer = tiny_trainer("gan", tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    for place in (tmp_path / "run/checkpoint-2", tmp_path / "run"):
        if place.name == "run":
            trainer.save_model()
        for subfolder, student in zip(("", "discriminator"), trainer.model.students, strict=True):
            loaded = AutoModel.from_pretrained(place / subfolder)
            assert type(loaded) is type(student)
            for name, value in student.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], value)
        assert AutoImageProcessor.from_pretrained(place / "discriminator").image_mean == (0.5,) * 3
        assert not (place / "preprocessor_config.json").exists()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert run_clean(LOAD, environment, tmp_path).strip() == "(1, 4) tensor(True) 2"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4's own
def test_a_push_while_training_leaves_both_networks(tmp_path, monkeypatch):
    with loopback_hub(monkeypatch, tmp_path) as hub:
        monkeypatch.setattr(publish.huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        sharing = {"push_to_hub": True, "hub_model_id": "tester/gan", "hub_token": hub.token}
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        trainer = tiny_trainer("gan", tmp_path / "run", **sharing, **saving)
        trainer.train()
        printed = run_clean(LOAD.replace('"run', '"tester/gan'), hub.environment(), tmp_path)
    assert printed.strip().splitlines()[-1] == "(1, 4) tensor(True) 2"


def test_a_save_over_another_methods_leaves_no_discriminator(tmp_path):
    tiny_trainer("gan", tmp_path).save_model()
    assert (tmp_path / "discriminator").is_dir() and (tmp_path / "samples.png").is_file()
    tiny_trainer("vae", tmp_path).save_model()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_card(tmp_path):
    judge = digit_judge()
    judge.model.config._name_or_path = str(tmp_path / "some" / "eye")
    trainer = tiny_trainer("gan", tmp_path, parts={"judge": judge, "dataset_name": "digits"}, max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: unconditional-image-generation" in card and "arxiv:2006.06676" in card
    assert "A generator of images, trained without labels on `digits`" in card
    assert "| discriminator | HfkdDcganDiscriminatorModel |" in card
    assert "On the test split (100 images)" in card and "Fréchet distance in the judge's features" in card
    assert "| `judge` | `eye` |" in card and "classes in turn" not in card


# -- families and precision ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["spectral", "none", "batch"])
def test_norms_of_the_discriminator_train(tmp_path, norm):
    config = HfkdDcganDiscriminatorConfig(image_size=8, num_channels=1, width=4, norm=norm)
    networks = [tiny_networks("gan")[0], HfkdDcganDiscriminatorModel(config)]
    trainer = tiny_trainer("gan", tmp_path, networks=networks, max_steps=2, r1_weight=0.0 if norm == "batch" else 0.1)
    before = weights(trainer)
    trainer.train()
    assert moved(before, weights(trainer)) == {"average", "generator", "discriminator"}


def test_bf16_and_channels_last_train(tmp_path):
    trainer = tiny_trainer("gan", tmp_path, bf16=True, channels_last=True, max_steps=3, r1_interval=1)
    kinds = set()
    trainer.model.students[1].blocks[0].register_forward_hook(lambda m, x, y: kinds.add(y.dtype))
    trainer.train()
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(entry["loss"]) for entry in logs(trainer))
    trainer.save_model()
    AutoModel.from_pretrained(tmp_path)


def test_networks_that_return_tuples_by_default_train(tmp_path):
    networks = tiny_networks("gan")
    for network in networks:
        network.config.return_dict = False
    trainer = tiny_trainer("gan", tmp_path, networks=networks, max_steps=1)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_generator_loss"])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "sgd"}, "optim=sgd"),
        ({"r1_weight": -1.0}, "r1_weight=-1.0"),
        ({"r1_interval": 0}, "r1_interval=0"),
        ({"r1_weight": 0.0, "r1_interval": 4}, "r1_interval=4 has no effect with r1_weight=0"),
        ({"ema_half_life": -1.0}, "ema_half_life=-1.0"),
        ({"ema_half_life": 0.0, "ema_ramp_up": 0.1}, "ema_ramp_up=0.1 has no effect"),
        ({"discriminator_augmentation": "bgc"}, "discriminator_augmentation='bgc' is unknown"),
        ({"augmentation_operations": ["color"]}, "has no effect with discriminator_augmentation=none"),
        ({"discriminator_augmentation": "diffaugment", "ada_target": 0.5}, "ada_target=0.5 has no effect"),
        ({"discriminator_augmentation": "ada", "ada_target": 1.5}, "ada_target=1.5"),
        ({"discriminator_augmentation": "ada", "ada_images": 0.0}, "ada_images=0.0"),
        ({"discriminator_augmentation": "ada", "ada_interval": 0}, "ada_interval=0"),
        ({"discriminator_augmentation": "ada", "augmentation_operations": ["blur"]}, "choose one or more of color"),
        ({"discriminator_learning_rate": -1.0}, "discriminator_learning_rate=-1.0"),
        ({"discriminator_lr_milestones": [2.0]}, "discriminator_lr_milestones"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(InputError, match=message) as caught:
        GanConfig(str(tmp_path), use_cpu=True, **settings)
    assert "\n" not in str(caught.value)


def batch_norm_discriminator():
    return HfkdDcganDiscriminatorModel(
        HfkdDcganDiscriminatorConfig(image_size=16, num_channels=1, width=4, norm="batch")
    )


def judge_of_16_pixels():
    return ClassifierJudge(tiny_resnet(0), replace(symmetric_digits().train.preprocessing, image_size=16))


def conditional_generator():
    names = dict(enumerate("ab"))
    config = HfkdConditionalGeneratorConfig.for_images(8, latent_size=4, hidden_sizes=[8, 8], id2label=names)
    return HfkdConditionalGeneratorModel(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": digit_sources()}, "normalization=symmetric"),
        ({"networks": ["dcgan", tiny_networks("gan")[1]]}, "generator is a str: pass a model"),
        ({"networks": [tiny_networks("gan")[0], "dcgan"]}, "discriminator is a str: pass a model"),
        ({"networks": [tiny_networks("gan")[1], tiny_networks("gan")[1]]}, "DiscriminatorModel without sample"),
        ({"networks": [conditional_generator(), tiny_networks("gan")[1]]}, "takes labels"),
        ({"networks": [tiny_networks("gan")[0], tiny_resnet(0)]}, "gives no single logit"),
        ({"networks": [tiny_networks("gan")[0], batch_norm_discriminator()]}, r"takes \(N, 1, 16, 16\)"),
        ({"sources": symmetric_digits(3)}, "1 channel.s., and the data has 8x8 with 3"),
        ({"per_device_train_batch_size": 199}, "batch of one image"),
        ({"parts": {"judge": judge_of_16_pixels()}}, "images of 8x8 pixels with 1 channels before"),
    ],
)
def test_bad_parts(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        tiny_trainer("gan", tmp_path, **change)
    assert "\n" not in str(caught.value)


def test_a_penalty_is_not_taken_through_batch_norm():
    sixteen = replace(symmetric_digits().train.preprocessing, image_size=16)
    check_discriminator(batch_norm_discriminator(), sixteen, penalised=False)
    with pytest.raises(InputError, match="choose r1_weight=0"):
        check_discriminator(batch_norm_discriminator(), sixteen, penalised=True)

"""Squeeze-and-Span's trainer: what is computed once or never touched, rows of the ablation, what is saved."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from squeeze_runs import tiny_generator, tiny_trainer
from tiny_runs import digit_sources, tiny_resnet
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hfkd.data import Preprocessing, load_digits
from hfkd.hub.manifest import file_sha256
from hfkd.losses.squeeze_and_span import span_loss, squeeze_loss
from hfkd.models import (
    HfkdConditionalGeneratorConfig,
    HfkdConditionalGeneratorModel,
    HfkdStyleGan2GeneratorConfig,
    HfkdStyleGan2GeneratorModel,
)
from hfkd.models.backbone import pooled_features
from hfkd.trainers.frozen_generator import FrozenGenerator
from hfkd.trainers.squeeze_and_span import CODE_PRESET, SqueezeAndSpanConfig, SqueezeAndSpanTrainer


ALL_SYNTHETIC = {"synthetic_share": 1.0}
VANILLA = {"squeeze_depth": 0, "invariance_weight": 1.0, "variance_weight": 0.0, "covariance_weight": 0.0}


class Untouchable:
    """Real images that nobody may look at; an epoch is as long as they are many."""

    def __len__(self):
        return 200

    def __getattr__(self, name):
        if name == "augmentation" or name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"the real images were touched: {name}")


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def parts(trainer):
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs[0].keys() & {
        "distillation", "student_variance", "student_covariance", "teacher_variance", "teacher_covariance",
        "real_invariance", "real_variance", "real_covariance", "span_loss",
    }  # fmt: skip


# -- one update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [{}, {**CODE_PRESET}], ids=["paper", "released code"])
def test_one_generator_pass_makes_an_update_and_changes_student_and_heads_alone(tmp_path, preset):
    trainer = tiny_trainer(tmp_path, max_steps=3, **preset)
    generator, student = trainer.model.teachers[0].model, trainer.model.students[0]
    calls, passes = [], []
    generator.register_forward_hook(lambda m, args, output: calls.append(len(output.images)))
    student.register_forward_hook(lambda m, args, output: passes.append(len(output.pooler_output)))
    before = {name: state(module) for name, module in trainer.model.named_children()}
    trainer.train()
    assert calls == [25] * 3
    assert passes == [25] * 9  # synthetic, first view, second view
    assert not changed(before["teachers"], trainer.model.teachers)
    assert not generator.training and all(p.grad is None for p in generator.parameters())
    assert {name.split(".")[0] for name in changed(before["training_only"], trainer.model.training_only)} == {
        "squeeze", "projector",
    }  # fmt: skip
    weights = {name for name, _ in trainer.model.students.named_parameters()}
    assert weights - {"0.stem.0.bias"} <= changed(before["students"], trainer.model.students)
    regularized = {"teacher_variance", "teacher_covariance"}
    assert parts(trainer) & regularized == (set() if preset else regularized)


def test_the_loss_is_the_papers(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, synthetic_share=0.4, covariance_weight=2.0)
    seen = {}
    loss = trainer.loss

    def by_hand(batch):
        # Batch norm's statistics are the batch's: the same pass again gives the same.
        weights = trainer.args.loss_weights
        generated = trainer._draw(batch["synthetic_epoch"], batch["synthetic_index"])
        z_g = trainer.model.training_only["squeeze"](generated.features)
        z_f = trainer.represent(trainer.synthetic_view(generated, batch))
        views = [trainer.represent(batch[name]) for name in ("pixel_values", "pixel_values_2")]
        seen["squeeze"], seen["span"] = squeeze_loss(z_g, z_f, weights)[0], span_loss(*views, weights)[0]
        seen["sizes"] = len(z_f), len(views[0])
        seen["total"], _ = loss(batch)
        return seen["total"], {}

    trainer.loss = by_hand
    trainer.train()
    assert seen["sizes"] == (20, 30)
    torch.testing.assert_close(seen["total"], 0.4 * seen["squeeze"] + 0.6 * seen["span"])


def test_all_synthetic_never_touches_the_real_images(tmp_path):
    trainer = tiny_trainer(tmp_path, sources=SimpleNamespace(train=Untouchable(), test=None), **ALL_SYNTHETIC)
    seen = []
    generate = trainer.generate
    trainer.generate = lambda batch: (seen.append(batch), generate(batch))[1]
    trainer.train()
    keys = {
        pair
        for batch in seen
        for pair in zip(*(batch[f"synthetic_{k}"].tolist() for k in ("epoch", "index")), strict=True)
    }
    assert keys == {(epoch, index) for epoch in range(3) for index in range(200)}  # 12 steps of 50, all drawn anew
    assert "span_loss" not in parts(trainer)


def test_without_a_dataset_a_run_is_max_steps_long(tmp_path):
    none = SimpleNamespace(train=None, test=digit_sources().test)
    trainer = tiny_trainer(tmp_path, sources=none, max_steps=5, **ALL_SYNTHETIC)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.preprocessing == Preprocessing(8, 1)
    metrics = trainer.evaluate()
    assert "eval_representation_rank" in metrics and "eval_knn_accuracy" not in metrics


def test_a_share_of_one_is_squeezing_alone_without_a_factor(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, **ALL_SYNTHETIC)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == entry["squeeze_loss"]


# Rows of the paper's Table 5.
ABLATION = {
    "a": (ALL_SYNTHETIC | VANILLA | {"augment_synthetic": False}, {"distillation"}),
    "b": (ALL_SYNTHETIC | VANILLA, {"distillation"}),
    "c": (ALL_SYNTHETIC | {"variance_weight": 0.0, "covariance_weight": 0.0}, {"distillation"}),
    "d": (ALL_SYNTHETIC | {"covariance_weight": 0.0}, {"distillation", "student_variance", "teacher_variance"}),
    "e": (ALL_SYNTHETIC, {"distillation", "student_variance", "student_covariance", "teacher_variance",
                          "teacher_covariance"}),
}  # fmt: skip


@pytest.mark.parametrize("row", ABLATION)
def test_the_ablation_is_settings_of_one_trainer(tmp_path, row):
    settings, terms = ABLATION[row]
    config = {"representation_size": 2048, "squeeze_hidden_size": 2048} if row in "ab" else {}
    trainer = tiny_trainer(tmp_path, max_steps=2, **config, **settings)
    trainer.train()
    assert parts(trainer) == terms
    squeeze, projector = (trainer.model.training_only[name] for name in ("squeeze", "projector"))
    # Vanilla: the pooled features of the blocks, 8 and 4 channels, are what the student learns.
    assert projector[-1].out_features == squeeze.out_features == (12 if row in "ab" else 16)
    assert bool(list(squeeze.parameters())) == (row not in "ab")
    assert (trainer.synthetic_augmentation is None) == (row == "a")


def test_augmentation_of_synthetic_images(tmp_path):
    """One view of each by its own draws, or by shared ones; none: the images as they are, in the student's range."""
    batch = {"synthetic_epoch": torch.zeros(6, dtype=torch.long), "synthetic_index": torch.arange(6)}
    seen = {}
    for name, settings in {
        "own": {},
        "shared": {"shared_augmentation": True},
        "none": {"augment_synthetic": False},
    }.items():
        trainer = tiny_trainer(tmp_path / name, **settings)
        generated = trainer.generate(batch)
        same = generated._replace(images=generated.images[:1].expand(6, -1, -1, -1))
        seen[name] = trainer.synthetic_view(same, batch)
    spread = {name: (view - view[:1]).abs().max().item() for name, view in seen.items()}
    assert spread["own"] > 0.1 and spread["shared"] == spread["none"] == 0
    mean, std = trainer.preprocessing.mean[0], trainer.preprocessing.std[0]
    torch.testing.assert_close(seen["none"][0], ((generated.images[0] + 1) / 2 - mean) / std)


# -- teachers --------------------------------------------------------------------------------------


def keys(count):
    return torch.zeros(count, dtype=torch.long), torch.arange(count)


def test_samples_are_functions_of_their_keys():
    teacher = FrozenGenerator(tiny_generator())
    whole = teacher.draw(3, *keys(6))
    alone = teacher.draw(3, keys(6)[0][4:], keys(6)[1][4:])
    for one, other in zip(
        (whole.images, *whole.features, whole.latents), (alone.images, *alone.features, alone.latents), strict=True
    ):
        torch.testing.assert_close(one[4:], other)
    assert (teacher.draw(4, *keys(6)).images - whole.images).abs().max() > 1e-3
    assert [feature.shape for feature in whole.features] == [(6, 8), (6, 4)] and whole.images.shape == (6, 1, 8, 8)


def test_features_and_image_have_one_style_and_one_noise():
    config = HfkdStyleGan2GeneratorConfig(
        image_size=8, latent_size=5, w_dim=6, num_channels=1, channel_max=4, mapping_layers=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = HfkdStyleGan2GeneratorModel(config).eval()
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(1.0)
    seen = []
    generator.register_forward_hook(lambda m, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    teacher = FrozenGenerator(generator)
    drawn = teacher.draw(0, *keys(4))
    (args, kwargs) = seen[-1]
    assert kwargs["noise"].shape == (4, generator.noise_size)
    assert kwargs["noise"].std() == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        again = generator(*args, **kwargs)
    torch.testing.assert_close(drawn.images, again.images.clamp(-1, 1))
    for pooled, feature_map in zip(drawn.features, again.block_features, strict=True):
        torch.testing.assert_close(pooled, feature_map.mean(dim=(2, 3)))
    torch.testing.assert_close(drawn.latents, again.intermediate_latents[:, 0])
    assert drawn.latents.shape == (4, 6)


def test_a_generator_of_classes_is_asked_for_all_of_them(tmp_path):
    """As one that was born from a classifier: the closed loop."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = HfkdConditionalGeneratorConfig.for_images(8, 1, id2label={0: "a", 1: "b", 2: "c"}, class_counts=[3])
        generator = HfkdConditionalGeneratorModel(config)
    seen = []
    generator.register_forward_hook(lambda m, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    trainer = tiny_trainer(tmp_path, generator=generator, max_steps=2, **ALL_SYNTHETIC)
    trainer.train()
    labels = torch.cat([kwargs["labels"] for kwargs in seen[-2:]])
    assert torch.bincount(labels, minlength=3).min() > 20


def test_latents_as_the_teacher(tmp_path):
    trainer = tiny_trainer(tmp_path, teacher_features="latent", max_steps=2, **ALL_SYNTHETIC)
    assert [layer.in_features for layer in trainer.model.training_only["squeeze"].lateral] == [5]
    trainer.train()


def test_a_pool_is_drawn_once_an_epoch_and_augmented_anew(tmp_path):
    trainer = tiny_trainer(tmp_path, generated_pool_size=30, max_steps=8)
    drawn, views = [], []
    draw, view = trainer._draw, trainer.synthetic_view
    trainer._draw = lambda epoch, index: (drawn.append(len(index)), draw(epoch, index))[1]
    trainer.synthetic_view = lambda generated, batch: (
        views.append((generated.images, batch["synthetic_index"])), view(generated, batch),
    )[1]  # fmt: skip
    trainer.train()
    assert sum(drawn) == 60  # two epochs of four updates
    pool = draw(torch.zeros(30, dtype=torch.long), torch.arange(30)).images
    images, index = views[1]
    torch.testing.assert_close(images, pool[index % 30])


# -- evaluation, saving ----------------------------------------------------------------------------


def test_nearest_neighbours_vote_from_a_capped_bank(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, knn_bank_size=60)
    seen = []
    features = trainer.features
    trainer.features = lambda pixels: (seen.append(len(pixels)), features(pixels))[1]
    metrics = trainer.evaluate()
    assert sorted(seen) == [60, 100]
    assert 0.1 < metrics["eval_knn_accuracy"] <= 1
    assert trainer.predict(digit_sources().test).predictions.shape == (100, 8)


def test_collapse_is_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = tiny_trainer(tmp_path, max_steps=4, **ALL_SYNTHETIC)
    with torch.no_grad():
        trainer.model.training_only["projector"][-1].weight.mul_(1e-3)
    trainer.args.learning_rate = 0.0
    trainer.train()
    warnings = [record.message for record in caplog.records if "collapsed" in record.message]
    assert (
        len(warnings) == 1 and "step 1: representations have collapsed: their mean standard deviation" in warnings[0]
    )
    assert [entry["representation_std"] < 0.1 for entry in trainer.state.log_history if "loss" in entry] == [True] * 4


def test_few_samples_have_a_low_rank_and_have_not_collapsed(tmp_path):
    """Three vary in two dimensions at most."""
    trainer = tiny_trainer(tmp_path, max_steps=1, per_device_train_batch_size=3, **ALL_SYNTHETIC)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["representation_rank"] < 2 and not trainer._warned


def test_what_is_saved_is_the_backbone_and_its_card_names_the_teacher(tmp_path):
    generator = tiny_generator()
    generator.save_pretrained(tmp_path / "teacher")
    generator = AutoModel.from_pretrained(tmp_path / "teacher")
    trainer = tiny_trainer(tmp_path / "run", generator=generator, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-2"):
        student = AutoModel.from_pretrained(folder)
        for name, value in trainer.model.students[0].state_dict().items():
            assert torch.equal(value, student.state_dict()[name])
        head = AutoModelForImageClassification.from_pretrained(folder, num_labels=10)
        assert torch.equal(head.backbone.stem[0].weight, student.stem[0].weight)
    card = (tmp_path / "run/README.md").read_text()
    digest = file_sha256(tmp_path / "teacher/model.safetensors")
    assert f"Teacher: `teacher` (local; model.safetensors sha256 `{digest}`)" in card
    assert "samples.png" in card and (tmp_path / "run/samples.png").is_file()
    assert not list((tmp_path / "run").glob("**/generator"))


def test_any_stock_backbone_learns_and_its_card_tells_where_its_features_are(tmp_path, monkeypatch):
    """A ViT has no pooler here, and `AutoModel` gives it one of random weights."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    student = ViTForImageClassification(config)
    trainer = tiny_trainer(tmp_path, student, tiny_generator(num_channels=3), digit_sources(3), max_steps=2)
    before = state(student.vit)
    trainer.train()
    assert changed(before, student.vit) and trainer.model.students[0] is student.vit
    trainer.save_model()
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image.save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec((tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["encoder"].pooler is not None
    with torch.no_grad():
        expected = pooled_features(student.vit.eval(), names["pixels"]["pixel_values"])
    torch.testing.assert_close(names["features"].detach(), expected)


def test_a_raw_dataset_is_decoded_by_a_processor(tmp_path):
    digits = load_digits().select(range(60))
    processor = digit_sources().train.preprocessing.to_image_processor()
    settings = SqueezeAndSpanConfig(
        str(tmp_path),
        per_device_train_batch_size=20,
        max_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        representation_size=8,
        squeeze_hidden_size=8,
        projector_layers=2,
    )
    trainer = SqueezeAndSpanTrainer(tiny_resnet(0), tiny_generator(), settings, digits, digits, processor)
    trainer.train()
    assert "eval_knn_accuracy" in trainer.evaluate()
    assert trainer.train_dataset.share == 0.5

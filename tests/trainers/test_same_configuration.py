"""A checkpoint whose weights fit but mean another function is not resumed."""

import pytest
from gradient_feature_runs import DIGITS, tiny_trainer
from tiny_runs import digit_sources, tiny_resnet
from transformers import PreTrainedConfig, ResNetConfig, ViTConfig

from hfkd.errors import InputError
from hfkd.models import HfkdResNetConfig, build_gradient_features
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer
from hfkd.trainers.same_configuration import check_same_configuration


def gradient_features(base=None, **settings):
    return build_gradient_features(base or tiny_resnet(0, width=6), 1, class_names=DIGITS, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of gradient features with the defaults: ntk=fan_out."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, gradient_features(), max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def other_base():
    """Its weights have the same shapes."""
    base = tiny_resnet(0, width=6)
    base.config.image_size = 9
    return base


OTHERS = {
    "ntk='fan_out'.*'none'": lambda: gradient_features(ntk="none"),
    "ntk_head=True.*False": lambda: gradient_features(ntk_head=False),
    "whiten=False.*True": lambda: gradient_features(whiten=True),
    "base_config.image_size=8.*9": lambda: gradient_features(other_base()),
    "id2label.0='0'.*'zero'": lambda: build_gradient_features(
        tiny_resnet(0, width=6), 1, class_names=["zero", *DIGITS[1:]]
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_settings_of_another_function_are_named(checkpoint, tmp_path, message):
    trainer = tiny_trainer(tmp_path, OTHERS[message](), max_steps=2)
    with pytest.raises(InputError, match=f"checkpoint-1 was saved with {message}: resume with") as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value) and trainer.state.global_step == 0


def test_records_may_differ(checkpoint, tmp_path):
    model = gradient_features()
    model.config._name_or_path = "elsewhere"
    model.config.base_config._name_or_path = "there"
    trainer = tiny_trainer(tmp_path, model, max_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2


def test_a_peers_settings_are_compared_too(tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }

    def trainer(folder, steps, **changed):
        students = [tiny_resnet(0), tiny_resnet(1)]
        for name, value in changed.items():
            setattr(students[1].config, name, value)
        config = OnlineAdversarialConfig(str(tmp_path / folder), max_steps=steps, **settings)
        return OnlineAdversarialTrainer(students, config, digit_sources().train)

    trainer("run", 1).train()
    saved = str(tmp_path / "run/checkpoint-1")
    with pytest.raises(InputError, match="student_1 was saved with id2label.3='LABEL_3'.*'three'"):
        trainer("other", 2, id2label={k: "three" if k == 3 else f"LABEL_{k}" for k in range(10)}).train(saved)
    trainer("again", 2).train(saved)


@pytest.mark.parametrize("kind", [ResNetConfig, ViTConfig, HfkdResNetConfig])
def test_a_saved_configuration_is_that_of_the_student(tmp_path, kind):
    config: PreTrainedConfig = kind(num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    config.save_pretrained(tmp_path)
    check_same_configuration(tmp_path, kind.from_pretrained(tmp_path), config)
    config.hidden_act = "tanh"
    with pytest.raises(InputError, match="hidden_act='?\\w+'?, and this run's student has 'tanh'"):
        check_same_configuration(tmp_path, kind.from_pretrained(tmp_path), config)

"""The trainer that the tests of this room run."""

import gc

import pytest
from tiny_runs import digit_sources, tiny_resnet

from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


@pytest.fixture(autouse=True, scope="session")
def quick_collections():
    """Trainer collects garbage before it trains; past all imports that takes longer than these runs."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(students=..., sources=..., callbacks=..., **config) -> OnlineAdversarialTrainer on the CPU."""

    def make(
        students=None,
        output_dir=None,
        augmentation=None,
        callbacks=None,
        teacher=None,
        sources=None,
        teacher_processing_class=None,
        **config,
    ):
        settings = {
            "max_steps": 12,
            "per_device_train_batch_size": 50,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        sources = sources or digit_sources()
        train = sources.train if augmentation is None else sources.train.variant(augmentation=augmentation)
        return OnlineAdversarialTrainer(
            students or [tiny_resnet(0), tiny_resnet(1)],
            OnlineAdversarialConfig(str(output_dir or tmp_path / "run"), **(settings | config)),
            train_dataset=train,
            eval_dataset=sources.test,
            teacher=teacher,
            teacher_processing_class=teacher_processing_class,
            callbacks=callbacks,
        )

    return make

"""What a CUDA device must do as the CPU does; skipped where there is none."""

import pytest
import torch
from tiny_runs import digit_sources, tiny_resnet

from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def losses(folder, *, use_cpu, **config):
    sources = digit_sources()
    settings = {"max_steps": 5, "per_device_train_batch_size": 50, "learning_rate": 0.05, "logging_steps": 1}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "use_cpu": use_cpu}
    trainer = OnlineAdversarialTrainer(
        [tiny_resnet(0, width=16), tiny_resnet(1, width=16)],
        OnlineAdversarialConfig(str(folder), **(settings | config)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
    )
    trainer.train()
    devices = {p.device.type for p in trainer.model.parameters()}
    assert devices == {"cpu" if use_cpu else "cuda"}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_cuda_follows_the_cpu(tmp_path, monkeypatch):
    """The same draws on both devices, so the same losses up to rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    on_cpu, on_cuda = (losses(tmp_path / str(cpu), use_cpu=cpu) for cpu in (True, False))
    assert on_cuda == pytest.approx(on_cpu, rel=2e-3)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": True, "channels_last": True}])
def test_half_precision_stays_close(tmp_path, settings):
    full = losses(tmp_path / "full", use_cpu=False)
    half = losses(tmp_path / "half", use_cpu=False, **settings)
    assert half == pytest.approx(full, rel=0.05)

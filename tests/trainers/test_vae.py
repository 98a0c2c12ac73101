"""The VAE: its terms, its settings, its encoder. What it shares with BiGAN is tested beside that."""

import math

import pytest
from generative_runs import symmetric_digits, tiny_networks, tiny_trainer

from hfkd.errors import InputError


def test_vae_descends_and_its_terms_add_up(tmp_path):
    trainer = tiny_trainer("vae", tmp_path, learning_rate=3e-3, beta=0.5, max_steps=20)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.5 * entry["kl"], rel=1e-4)
    assert logs[0]["nll"] == pytest.approx(64 * math.log(2), rel=0.1)
    assert logs[19]["loss"] < 0.95 * logs[0]["loss"]
    metrics = trainer.evaluate()
    assert metrics["eval_elbo"] == pytest.approx(-metrics["eval_nll"] - metrics["eval_kl"])
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"] + 0.5 * metrics["eval_kl"])
    assert trainer.predict(symmetric_digits().test).predictions.shape == (100, 2 * 4 * 4)


@pytest.mark.parametrize(
    ("settings", "message"), [({"beta": -1.0}, "beta=-1.0"), ({"latent_channels": 0}, "latent_channels=0")]
)
def test_vae_bad_settings(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        tiny_trainer("vae", tmp_path, **settings)


def test_vae_needs_an_encoder_of_its_make(tmp_path):
    with pytest.raises(InputError, match="has no depth"):
        tiny_trainer("vae", tmp_path, networks=tiny_networks("bigan")[:1])

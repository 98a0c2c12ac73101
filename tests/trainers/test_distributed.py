"""Two gloo processes are one with the joined batch; ranks stay equal, resume exactly, and drift is caught."""

import multiprocessing
import socket

import pytest
import torch
from distributed_run import rank_run

from hfkd.errors import InputError
from hfkd.trainers.checkpointing import newest_valid_checkpoint


processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["hfkd.trainers.online_adversarial", "sklearn.datasets"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world, output_dir, results, target=rank_run, **settings):
    """Run `world` ranks to the end; what each of them wrote."""
    results.mkdir()
    port = free_port()
    ranks = [
        processes.Process(target=target, args=(rank, world, port, output_dir, results, settings))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(world)]


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "settings",
    [{}, {"feature_loss": "l1", "max_grad_norm": 0.1}, {"gradient_accumulation_steps": 2}],
    ids=["adversarial", "alignment with clipping", "accumulation"],
)
def test_two_processes_equal_one(tmp_path, settings):
    # float64, and no statistics of a batch: what remains is what the ranks must agree on.
    common = {"norm": "group", "dtype": "float64", **settings}
    if "feature_loss" not in settings:
        common["discriminator_norm"] = "none"
    per_rank = 25 // settings.get("gradient_accumulation_steps", 1) // 5 * 5
    (one,) = launch(1, tmp_path / "a", tmp_path / "one", per_device_train_batch_size=2 * per_rank, **common)
    two = launch(2, tmp_path / "b", tmp_path / "two", per_device_train_batch_size=per_rank, **common)
    assert_same(two[0]["weights"], two[1]["weights"])
    assert_same(one["weights"], two[0]["weights"], atol=1e-11)
    for alone, together in zip(one["logs"], two[0]["logs"], strict=True):
        for name in ("loss", "grad_norm", "student_0_ce", "student_1_feature"):
            assert alone[name] == pytest.approx(together[name], rel=1e-5), name
    for name, value in one["metrics"].items():
        if name.endswith(("accuracy", "loss")):
            assert two[1]["metrics"][name] == pytest.approx(value, abs=1e-6), name


def test_two_processes_resume_exactly(tmp_path):
    """Batch norm is per rank, yet both go on with rank 0's statistics after a save, as a resumed run does."""
    settings = {"per_device_train_batch_size": 25, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    straight = launch(2, tmp_path / "run", tmp_path / "straight", **settings)
    checkpoint = str(tmp_path / "run/checkpoint-3")
    resumed = launch(2, tmp_path / "again", tmp_path / "resumed", resume=checkpoint, **settings)
    for rank in range(2):
        assert_same(straight[rank]["weights"], resumed[rank]["weights"])
    assert_same(straight[0]["weights"], straight[1]["weights"])


def test_drifting_ranks_are_stopped(tmp_path):
    outcomes = launch(2, tmp_path / "run", tmp_path / "results", per_device_train_batch_size=25, spoil=True)
    for outcome in outcomes:
        assert "the ranks' parameters differ" in outcome["error"]


# Four steps are an epoch, at whose end all ranks wait for each other, as they do after the last step.
@pytest.mark.parametrize(("within", "stopped"), [(1, 2), (4, 4), (6, 6)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, within, stopped):
    settings = {"per_device_train_batch_size": 25, "save_strategy": "steps", "save_steps": 100}
    outcomes = launch(2, tmp_path / "run", tmp_path / "results", **settings, signal_at=within - 1)
    for outcome in outcomes:
        assert "stopped by SIGTERM; resume with" in outcome["error"] and f"checkpoint-{stopped}" in outcome["error"]
    assert newest_valid_checkpoint(tmp_path / "run").name == f"checkpoint-{stopped}"


def test_ranks_start_alike_and_measure_what_a_save_would_hold(tmp_path):
    """Fresh students need no common seed, and batch norm's statistics are rank 0's in every evaluation."""
    outcomes = launch(2, tmp_path / "run", tmp_path / "results", per_device_train_batch_size=25, unseeded=True)
    assert_same(outcomes[0]["weights"], outcomes[1]["weights"])
    assert outcomes[0]["metrics"]["eval_loss"] == outcomes[1]["metrics"]["eval_loss"]
    assert outcomes[0]["again"] == pytest.approx(outcomes[0]["metrics"]["eval_loss"], abs=1e-6)


def test_a_checkpoint_of_two_ranks_is_not_resumed_by_one(tmp_path):
    settings = {"per_device_train_batch_size": 25, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    launch(2, tmp_path / "run", tmp_path / "two", **settings)
    with pytest.raises(InputError, match="launch 2"):
        rank_run(0, 1, 0, tmp_path / "again", tmp_path, settings | {"resume": str(tmp_path / "run/checkpoint-1")})

"""Runs in processes of their own, as a user starts them, and what two of them left behind."""

import multiprocessing
import shutil

from resume_run import run

from hfkd.hub.manifest import write_manifest


# A server that has imported everything but run nothing: each child is a fresh process without the start-up cost.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["hfkd.trainers.online_adversarial", "sklearn.datasets"])


def in_a_process(folder, expected_exit=0, target=run, **arguments):
    process = processes.Process(target=target, args=(folder,), kwargs=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == expected_exit
    return folder


def contents(checkpoint):
    """Every file that holds state: weights and buffers, training-only modules, optimizers, schedules, generators."""
    files = [*checkpoint.rglob("*.safetensors"), *checkpoint.glob("training_state/*.json")]
    return {str(file.relative_to(checkpoint)): file.read_bytes() for file in files}


def with_older_state(straight, name, folder):
    """A copy of checkpoint 6 in `folder`, of which the files called `name` are as they were after the first step."""
    checkpoint, first = folder / "checkpoint-6", straight / "checkpoint-1"
    shutil.copytree(straight / "checkpoint-6", checkpoint)
    older = list(first.glob(f"{name}.*"))
    assert older
    for file in older:
        shutil.copy(file, checkpoint / file.relative_to(first))
    write_manifest(checkpoint)
    return folder


def differences(a, b, students=2, others=6):
    left, right = contents(a), contents(b)
    assert left.keys() == right.keys() and len(left) == students + others
    return [name for name in left if left[name] != right[name]]

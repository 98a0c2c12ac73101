"""The run of `resume_run` with signals at chosen moments, to be started in processes of its own."""

import signal
import sys
from pathlib import Path

from resume_run import run

from hfkd.trainers import checkpointing
from hfkd.trainers.interrupt import TrainingInterrupted
from hfkd.trainers.online_adversarial import OnlineAdversarialTrainer


KEYBOARD_INTERRUPT = 99


def interrupted_run(output_dir, signum, step=None, evaluation=None, again=None, **config):
    """`signum` comes within `step`, or within the evaluation after step `evaluation`; exits with the run's code.

    Args:
        again: the second signal: "in the step", or "in the save" that the first one has led to.
    """
    update, evaluate, write = (
        OnlineAdversarialTrainer.method_step,
        OnlineAdversarialTrainer.evaluation_step,
        checkpointing.write_state,
    )

    received = []

    def method_step(self, *args):
        if self.state.global_step + 1 == step:
            received.append(step)
            signal.raise_signal(signum)
            if again == "in the step":
                signal.raise_signal(signum)
        return update(self, *args)

    def evaluation_step(self, *args):
        if self.state.global_step == evaluation:
            signal.raise_signal(signum)
        return evaluate(self, *args)

    def write_state(folder, name, state):
        write(folder, name, state)
        if again == "in the save" and received and name == "optimizers":
            signal.raise_signal(signum)

    # Of this process, which ends with the run.
    OnlineAdversarialTrainer.method_step = method_step
    OnlineAdversarialTrainer.evaluation_step = evaluation_step
    checkpointing.write_state = write_state
    try:
        run(output_dir, **config)
    except TrainingInterrupted as stopped:
        Path(output_dir, "stopped.txt").write_text(f"{stopped}\n{stopped.checkpoint}")
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(KEYBOARD_INTERRUPT)

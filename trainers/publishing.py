"""Sharing a run on the Hub: every push leaves a repo that loads, and a failed push never costs a checkpoint."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from accelerate.utils import AutocastKwargs
from transformers import Trainer
from transformers.utils import logging

from hfkd.errors import InputError, RunError
from hfkd.evaluation.teacher_report import TeacherReport, teacher_report
from hfkd.hub.hardware import environment_report
from hfkd.hub.publish import check_target, push_failure, push_folder
from hfkd.model_cards import (
    CardData,
    DataUsed,
    Method,
    Parent,
    Picture,
    Student,
    changed_settings,
    measurements_of,
    write_card,
)

from .config import DistillationConfig
from .distributed import share_failure
from .networks import TrainingNetworks


logger = logging.get_logger(__name__)

T = TypeVar("T")
RUN_FILE = "run.yaml"  # the resolved options, which the command saves beside the weights


class Publishing(Trainer):
    """The part of the base trainer that writes cards and pushes.

    Trainer's own push rewrites a pickle (`training_args.bin`) and copies only root weights, without code until the
    end; ours uploads a staged copy of the whole student tree in one commit, the first one included.
    """

    args: DistillationConfig
    model: TrainingNetworks
    _template_file: ClassVar[str]
    dataset_name: str | None
    # By split: metrics of the weights as they are, and `images`, how many there were.
    measured: dict[str, dict[str, float]]
    _started: float | None = None  # when this process began to train; None for a resumed run
    _reported: tuple[Any, TeacherReport | None] | None = None  # what a teacher report is of, and the report
    _push: "Future[Any] | None" = None
    _revision: str | None = None  # that of a push under way which goes elsewhere than the Config's

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check token and repo before the first step; the repo is created if it does not exist.

        Raises:
            InputError: one line for a missing or refused token, a foreign namespace, an unreachable Hub.
        """
        failure = None
        if self.is_world_process_zero():
            try:
                self.hub_model_id = check_target(
                    self.args.hub_model_id,
                    token=token or self.args.hub_token,
                    private=self.args.hub_private_repo if private is None else private,
                )
            except InputError as error:
                failure = str(error)
        share_failure(failure, InputError)

    def write_card(self, folder: str | Path) -> None:
        """Write README.md and its pictures, with what has been measured so far, into a folder of saved students.

        The options that the card's command names, where there are any, come with it.
        """
        args = self.args
        run_file = Path(args.output_dir) / RUN_FILE
        command = f"hfkd train {Path(self._template_file).stem.replace('_', '-')} --config {RUN_FILE}"
        card = CardData(
            method=Method.of(self),
            location=self.hub_model_id or str(folder),
            revision=(self._revision or args.hub_revision) if self.hub_model_id else None,
            students=tuple(
                Student.of(student, folder=place)
                for student, place in zip(self.model.students, self.model.folders, strict=True)
            ),
            parents=tuple(self._parents()),
            data=self._data_used(),
            license=args.license,
            measurements=tuple(m for split, found in self.measured.items() for m in measurements_of(found, split)),
            teacher_report=self._teacher_report(),
            hyperparameters=self.card_settings(),
            log_history=tuple(self.state.log_history),
            pictures=self._pictures(Path(folder)),
            environment=environment_report(),
            wall_time_s=self._training_time(),
            command=command if run_file.exists() else None,
        )
        write_card(card, folder)
        if run_file.exists() and Path(folder).resolve() != run_file.parent.resolve():
            shutil.copyfile(run_file, Path(folder) / RUN_FILE)

    def draw_pictures(self, folder: Path) -> Iterator[Picture]:
        """Save a method's own pictures beside its card."""
        return iter(())

    def _pictures(self, folder: Path) -> tuple[Picture, ...]:
        return _left_out_if_failing("pictures are", lambda: tuple(self.draw_pictures(folder))) or ()

    def _teacher_report(self) -> TeacherReport | None:
        """Students against their teachers, on what was evaluated last; measured once, when training has ended."""
        source = getattr(self.callback_handler.eval_dataloader, "dataset", None)
        classifies = getattr(self, "_task", Method.task) == Method.task
        if self.is_in_train or not classifies or not self.model.frozen() or getattr(source, "labels", None) is None:
            return None
        measured_on = (self.state.global_step, source)
        if self._reported is None or self._reported[0] != measured_on:
            self._reported = measured_on, _left_out_if_failing("the teacher report is", lambda: self._compare(source))
        return self._reported[1]

    def _compare(self, source: Any) -> TeacherReport:
        # Without a cache of cast weights, which takes in those that are trained alone: teachers would look slower.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            students, teachers = list(self.model.students), self.model.frozen()
            return teacher_report(students, teachers, source, batch_size=self.args.per_device_eval_batch_size)

    def card_settings(self) -> dict[str, Any]:
        """The settings that a card tells: those that differ from the defaults."""
        return changed_settings(self.args)

    def _training_time(self) -> float | None:
        """Seconds from the first step to the last, or to now while training."""
        if self._started is None:
            return None
        finished = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        return finished[-1] if finished else time.monotonic() - self._started

    def _parents(self) -> Iterator[Parent]:
        """Teachers, and what students were fine-tuned from; a network of fresh weights has no name."""
        networks: list[tuple[str, Any]] = [("teacher", teacher.model) for teacher in self.model.frozen()]
        networks += [("starting point", student) for student in self.model.students]
        for role, network in networks:
            if name := getattr(network.config, "_name_or_path", ""):
                yield Parent.of(role, name)

    def _data_used(self) -> DataUsed | None:
        if self.dataset_name is None:
            return None
        splits = {split: int(found["images"]) for split, found in self.measured.items()}
        train = {} if self.train_dataset is None else {"train": len(self.train_dataset)}
        return DataUsed.of(self.dataset_name, train | splits)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the card into `output_dir`."""
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir)

    # -- while training ----------------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a finished checkpoint's students in the background; this one makes up for one that failed before."""
        if str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy)) == "end":
            return
        if self._push is not None and not self._push.done():
            return  # the next save carries newer weights anyway
        self._finish_current_push()
        self._push = self._start_push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")

    def _finish_current_push(self) -> None:
        """Wait for the push under way; what went wrong is a warning, as the checkpoint is safe and a retry follows."""
        push, self._push = self._push, None
        if push is None:
            return
        try:
            push.result()
        except RunError as error:
            logger.warning(f"{error} (training is not affected; the next push makes up for this one)")

    def _start_push(self, folder: str | Path, message: str, token: str | None = None) -> "Future[Any]":
        """A push in the background; whatever goes wrong waits in its future, as a RunError."""
        revision = self._revision or self.args.hub_revision
        try:
            return push_folder(
                folder,
                self._repo_id,
                token=token or self.args.hub_token,
                commit_message=message,
                private=self.args.hub_private_repo,
                revision=revision,
                run_as_future=True,
            )
        except InputError as error:  # the token that was there before the first step is gone
            push: Future[Any] = Future()
            push.set_exception(push_failure(str(error), folder, self._repo_id, revision))
            return push

    # -- at the end --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the students and their card; with `push_to_hub` also push, when called by the user."""
        super().save_model(output_dir, _internal_call=True)  # the next in line: Checkpointing
        if self.is_world_process_zero():
            folder = output_dir or self.args.output_dir
            try:
                self.write_card(folder)
            except OSError as error:
                cause = error.strerror or error
                raise RunError(f"{folder}: the students are saved, their card is not ({cause}); save again") from error
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **_: Any,
    ) -> Any:
        """Save the students with their card into `output_dir` and push them in one commit.

        Returns:
            The commit's info, or a future of it where `blocking` is False. None on all ranks but the first.

        Raises:
            RunError: when the push fails; everything stays saved, and the line to repeat it is in the message.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self._revision = revision
        try:
            self.save_model(_internal_call=True)
            if not self.is_world_process_zero():
                return None
            self._finish_current_push()
            push = self._start_push(self.args.output_dir, commit_message, token)
        finally:
            self._revision = None
        return push.result() if blocking else push

    @property
    def _repo_id(self) -> str:
        assert self.hub_model_id is not None  # set by init_hf_repo
        return self.hub_model_id


def _left_out_if_failing(what: str, part: Callable[[], T]) -> T | None:
    """A part of the card; like a section of it, it is left out where it fails."""
    try:
        return part()
    except OSError:
        raise  # no room, no permission: the card that follows would meet it too
    except Exception as error:
        logger.warning(f"model card: {what} left out ({type(error).__name__}: {error})")
        return None

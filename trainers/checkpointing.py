"""Checkpoints of a run: atomic, strict, and complete, for several networks and several optimizers.

Trainer's own loader is non-strict (it goes on from random weights with a warning) and knows one model and one
optimizer, so its methods for saving and loading are overridden here as one set.

A checkpoint folder is itself loadable as the students::

    checkpoint-120/  config.json  model.safetensors  preprocessor_config.json  *.py     student 0
        student_1/   config.json  model.safetensors  preprocessor_config.json           its peers
        training_state/  networks.*  optimizers.*  rng.*                                all the rest
        trainer_state.json  manifest.json
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from transformers.utils import logging

from hfkd.errors import InputError, RunError
from hfkd.hub.manifest import MANIFEST_NAME, atomic_folder, is_valid, sweep_leftovers, verify_manifest
from hfkd.hub.remote_code import peer_folders, write_code

from .config import DistillationConfig
from .distributed import broadcast_buffers, check_same_parameters, share_failure
from .networks import TrainingNetworks
from .same_configuration import check_same_configuration
from .state import read_state, restore_rng_state, rng_state, write_state


logger = logging.get_logger(__name__)

STATE_FOLDER = "training_state"


def check_output_dir(output_dir: str | Path) -> None:
    """Raise InputError unless `output_dir`, or the nearest of its parents that exists, can be written to."""
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # False where it cannot look
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "cannot be written to" if existing.is_dir() else "is a file"
        raise InputError(f"output_dir={output_dir}: {existing} {reason}: choose another folder")


def newest_valid_checkpoint(output_dir: str | Path) -> Path:
    """The checkpoint with the most steps whose manifest holds; those skipped are named in a warning.

    Raises:
        InputError: when there is none.
    """
    for path in reversed(sort_checkpoints(output_dir=str(output_dir))):
        try:
            verify_manifest(Path(path))
        except InputError as error:
            logger.warning(f"skipping {path}: {error}")
        else:
            return Path(path)
    raise InputError(f"{output_dir} holds no valid checkpoint: leave out --resume_from_checkpoint to start afresh")


def later_checkpoints(checkpoint: Path) -> list[Path]:
    """Those of the same folder with more steps."""
    found = [Path(path) for path in sort_checkpoints(output_dir=str(checkpoint.parent))]
    return found[found.index(checkpoint) + 1 :] if checkpoint in found else []


def set_aside_later_checkpoints(checkpoint: Path) -> None:
    """Rename the damaged checkpoints after the one to be resumed: rotation goes by steps and would keep them."""
    for path in later_checkpoints(checkpoint):
        path.rename(path.with_name(f"damaged-{path.name}"))


def check_nothing_later(checkpoint: Path) -> None:
    """Refuse to go on from an earlier checkpoint beside later ones, which rotation and `true` would prefer.

    Raises:
        InputError: naming the latest of them.
    """
    if later := later_checkpoints(checkpoint):
        raise InputError(
            f"{checkpoint.parent} holds {later[-1].name}, later than {checkpoint.name}: "
            "move it away or choose another folder"
        )


def holds_students(folder: Path) -> bool:
    """Whether students were saved at the root of `folder`."""
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def check_no_other_run(output_dir: Path, may_replace_students: bool) -> None:
    """Refuse a folder in which a run that starts afresh would write over what another one has left.

    Raises:
        InputError: naming the checkpoint or the students that are there.
    """
    if found := sort_checkpoints(output_dir=str(output_dir)):
        raise InputError(
            f"output_dir={output_dir} holds another run's {Path(found[-1]).name}: go on with it by "
            "--resume_from_checkpoint true, or choose an empty folder"
        )
    if holds_students(output_dir) and not may_replace_students:
        raise InputError(
            f"output_dir={output_dir} holds the students of another run (config.json and weights): "
            "choose another folder, or move them away"
        )


class Checkpointing(Trainer):
    """The part of the base trainer that saves, resumes and restores."""

    args: DistillationConfig
    model: TrainingNetworks
    measured: dict[str, dict[str, float]]
    # Students that already lie in `output_dir` are this trainer's own, or of a run of the very same options.
    may_replace_students: bool = False

    # -- saving --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-<step>` into a temporary folder, then rename it, rotate, and push."""
        step = self.state.global_step
        self.check_finite()
        self.check_weights_finite()
        check_same_parameters(self.model, step)
        broadcast_buffers(self.model)
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"checkpoint-{step}"
        generators = gather_object([rng_state()])
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(target)
        failure = None
        if self.args.should_save:
            self._collect_callback_states()
            try:
                sweep_leftovers(run_dir)
                with atomic_folder(target) as folder:
                    self.save_students(folder)
                    self._save_training_state(folder, generators)
                    if self.args.push_to_hub:
                        self.write_card(folder)
            except (OSError, RunError) as error:
                failure = self._save_failure(target, run_dir, error)
        share_failure(failure, RunError)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(target))
        self.accelerator.wait_for_everyone()

    def save_students(self, folder: Path) -> None:
        """Write every student with its processor, and the code of every family at the root, into `folder`."""
        students = self.students_to_save()
        for subfolder, student in zip(self.model.folders, students, strict=True):
            # channels_last weights are strided, which safetensors refuses.
            weights = {key: value.contiguous() for key, value in student.state_dict().items()}
            target = folder / subfolder
            with without_progress_bars():
                student.save_pretrained(target, state_dict=weights)
            if self.processing_class is not None and student.main_input_name == "pixel_values":
                self.processing_class.save_pretrained(target)
        write_code(students, folder, self.model.folders)

    def students_to_save(self) -> list[Any]:
        """The students as they are written; a method may give copies of them."""
        return list(self.model.students)

    def _save_training_state(self, folder: Path, generators: list[dict[str, Any]]) -> None:
        state = folder / STATE_FOLDER
        state.mkdir()
        write_state(state, "networks", self.model.training_only.state_dict())
        write_state(
            state,
            "optimizers",
            {"optimizers": self.optimizer.state_dict(), "schedules": self.lr_scheduler.state_dict()},
        )
        write_state(state, "rng", generators)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _collect_callback_states(self) -> None:
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, value = type(callback).__name__, callback.state()
                held = self.state.stateful_callbacks.get(name)
                if isinstance(held, list):
                    held.append(value)
                else:
                    self.state.stateful_callbacks[name] = value

    def _save_failure(self, target: Path, run_dir: Path, error: OSError | RunError) -> str:
        kept = [path for path in sort_checkpoints(output_dir=str(run_dir)) if is_valid(Path(path))]
        resume = f"resume with --resume_from_checkpoint {kept[-1]}" if kept else "start again: there is no checkpoint"
        what = str(error) if isinstance(error, RunError) else f"{target}: not saved ({error.strerror or error})"
        return f"{what}; free space or mend the permissions, then {resume}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the students (not the training state) into `output_dir`; a kill on the way leaves whole files only."""
        target = Path(output_dir or self.args.output_dir)
        check_same_parameters(self.model, self.state.global_step)
        broadcast_buffers(self.model)
        self.check_weights_finite()
        self.may_replace_students |= target.resolve() == Path(self.args.output_dir).resolve()
        failure = None
        if self.args.should_save:
            try:
                target.mkdir(parents=True, exist_ok=True)
                with atomic_folder(target / ".new-students") as folder:
                    self.save_students(folder)
                former = self._foreign_peers(target) if holds_students(target) else []
                move_into(target / ".new-students", target)
                for peer in former:
                    shutil.rmtree(peer)
            except (OSError, RunError) as error:
                failure = self._save_failure(target, target, error)
        share_failure(failure, RunError)

    def _foreign_peers(self, folder: Path) -> list[Path]:
        """Networks that another method or a larger cohort has saved here, and that would pass for this run's."""
        return [peer for peer in peer_folders(folder) if peer.name not in self.model.folders]

    # -- resuming ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load every network of the checkpoint, strictly.

        Raises:
            InputError: naming the file, key or network that is missing, damaged or too many.
        """
        folder = Path(resume_from_checkpoint)
        verify_manifest(folder)
        self.measured.clear()  # what has been measured so far was of other weights
        if foreign := self._foreign_peers(folder):
            raise InputError(
                f"{folder} holds {foreign[0].name}, which is no network of this run: use this run's own checkpoint"
            )
        for subfolder, student in zip(self.model.folders, self.model.students, strict=True):
            _load_strictly(student, folder / subfolder)
        state = read_state(folder / STATE_FOLDER, "networks")
        try:
            self.model.training_only.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{folder}/{STATE_FOLDER}: {_one_line(error)}") from error

    def _load_best_model(self) -> None:
        """Restore every network, not student 0 alone, from the best checkpoint."""
        logger.info(f"Restoring all networks from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_state(Path(checkpoint) / STATE_FOLDER, "optimizers")
        try:
            self.optimizer.load_state_dict(state["optimizers"])
            self.lr_scheduler.load_state_dict(state["schedules"])
        except (KeyError, ValueError) as error:
            raise InputError(f"{checkpoint}/{STATE_FOLDER}: {_one_line(error)}") from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        generators = read_state(Path(checkpoint) / STATE_FOLDER, "rng")
        if len(generators) != self.args.world_size:
            raise InputError(
                f"{checkpoint} was saved by {len(generators)} processes and is resumed by {self.args.world_size}: "
                f"launch {len(generators)}"
            )
        restore_rng_state(generators[self.args.process_index])

    # The scaler of fp16, which the Config refuses.
    def _save_scaler(self, output_dir: str) -> None: ...

    def _load_scaler(self, checkpoint: str | None) -> None: ...

    # -- finiteness, which no checkpoint may lack ------------------------------------------------------------------

    def check_finite(self) -> None:
        raise NotImplementedError

    def write_card(self, folder: str | Path) -> None:
        raise NotImplementedError

    def check_weights_finite(self) -> None:
        """Raise RunError if a weight or buffer of a network that is to be saved is not finite."""
        for name, tensor in self.model.state_dict().items():
            if name.startswith("teachers."):
                continue  # never saved
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise RunError(
                    f"step {self.state.global_step}: {name} is not finite, nothing was saved: "
                    "lower the learning rate and resume from the last checkpoint"
                )


def move_into(folder: Path, target: Path) -> None:
    """Move a finished folder's files over those of `target`, each by one atomic rename."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for source in sorted(files, key=lambda path: path.name == MANIFEST_NAME):  # the manifest last: it vouches
        destination = target / source.relative_to(folder)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, destination)
    shutil.rmtree(folder)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar for each weights file it writes or reads; a cohort saves many small ones."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_strictly(student: PreTrainedModel, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no saved student: the checkpoint was made with other students than this run's"
        )
    content, own = json.loads((folder / "config.json").read_text(encoding="utf-8")), student.config
    if (kind := content.get("model_type")) != own.model_type:
        raise InputError(
            f"{folder} holds a {kind}, and this run's student is a {own.model_type}: use its own checkpoint"
        )
    try:
        saved = type(own).from_dict(content)
        with without_progress_bars():
            loaded, info = type(student).from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{folder} cannot be loaded as {type(student).__name__}: {_one_line(error)}") from error
    check_same_configuration(folder, saved, own)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            named = ", ".join(sorted(map(str, info[problem]))[:3])
            raise InputError(f"{folder}: {problem.replace('_', ' ')}: {named}: use this run's own checkpoint")
    try:
        student.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise InputError(f"{folder} does not fit this run's student: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Gradients as features (Mu, Liang, Li; ICLR 2020, arXiv 2004.05529): a linear classifier on a fixed network.

The paper's symbols: f(x) the features of the base network, J(x) their Jacobian by its top layers theta_2, omega a
classifier of the target task on f, and the classifier that is trained g(x) = w1^T f(x) + b1 + omega^T J(x) w2.

Its three steps (section 3.1): the base is given; omega is fitted by logistic regression on the features of the
training images; w1 starts at omega, w2 at zero, and both are trained by the loss of g.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfkd.data import Augmentation, ImageSource, SquareCrop, StreamedImages, view_name
from hfkd.errors import InputError
from hfkd.evaluation.classifier import classifier_metrics
from hfkd.evaluation.crops import mean_prediction
from hfkd.evaluation.logistic_regression import fit_logistic_regression
from hfkd.losses.gradient_features import classification_loss
from hfkd.models.whitening import InputMoments, inverse_root

from .cached_activations import CachedActivations, CachedActivationsConfig
from .cohort_checks import check_batches, check_images, check_labels, columns_of, common_precision, parts_of
from .config import check_positive, check_range
from .distributed import broadcast_state, failing_together
from .feature_maps import full_precision
from .images import preprocessing_of
from .networks import TrainingNetworks
from .optimizers import build_main_optimizer, build_main_schedule


SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"

_CODE: Mapping[str, Any] = {
    "optim": "sgd",
    "momentum": 0.9,
    "learning_rate": 0.1,
    "weight_decay": 5e-5,
    "per_device_train_batch_size": 128,
    "max_grad_norm": 10.0,
    "max_steps": 50_000,
    "lr_milestones": [0.2, 0.4, 0.6, 0.8],
}
# By mode, what the authors' code sets where the paper (the defaults) says otherwise. Its rates are for raw weights.
CODE_PRESET: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "full": _CODE,
        "gradient": _CODE,
        "activation": {
            **_CODE,
            "learning_rate": 1e-2,
            "weight_decay": 1e-6,
            "max_steps": 80_000,
            "lr_milestones": [0.25, 0.5, 0.75],
        },
        "finetune": {**_CODE, "learning_rate": 1e-3, "omega": "given"},
    }
)


@dataclass
class GradientFeaturesConfig(CachedActivationsConfig):
    """Settings of gradient features. The defaults are the paper's (camera-ready); `CODE_PRESET` has those of its code.

    What is trained is the model's, set when it is built: `mode` (activation, gradient, full or finetune), theta_2,
    and the NTK scales of the raw weights that `learning_rate` and `weight_decay` act on.
    """

    num_train_epochs: float = field(
        default=100.0, metadata={"help": "Epochs (paper: 80,000 updates, 102.4 epochs of CIFAR; VOC and COCO 50)."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per device (paper: 64)."})
    optim: str = field(default="adam", metadata={"help": "sgd, adam (paper; weight decay coupled) or adamw_torch."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the raw weights (paper: 1e-3)."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Of the raw weights (paper: 1e-6)."})
    adam_beta1: float = field(default=0.5, metadata={"help": "Of Adam (paper: 0.5)."})
    lr_milestones: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 0.75],
        metadata={"help": "Fractions of the run at which the rate falls (paper: every 20,000 of 80,000 updates)."},
    )
    lr_gamma: float = field(default=0.5, metadata={"help": "Factor at each milestone (paper: 0.5)."})

    omega: Literal["fitted", "random", "given"] = field(
        default="fitted",
        metadata={
            "help": "fitted: logistic regression before the first step (paper); random: the same for w1, and random "
            "numbers for the gradients (the paper's ablation); given: the model is trained as it comes."
        },
    )
    omega_weight_decay: float = field(
        default=1e-6, metadata={"help": "Of that logistic regression, > 0, as weight_decay (paper: 1e-6)."}
    )
    evaluation_crops: int = field(
        default=1,
        metadata={
            "help": "Random crops of each image whose mean prediction is evaluated (paper: 10 on VOC and COCO); 1: "
            "the image as it is."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("evaluation_crops", self.evaluation_crops, 1)
        check_positive("omega_weight_decay", self.omega_weight_decay)
        if self.omega == "given":
            self.refuse_changed(("omega_weight_decay",), "omega=given")


class GradientFeaturesTrainer(CachedActivations):
    """Fits omega, then trains w1 and w2 (or what else the model's mode trains).

    A run that is resumed does not fit again: omega is part of the model. Evaluation gives `loss`, `accuracy` and
    `top5_accuracy`, or for several labels per image `mean_average_precision` (area) and VOC 2007's
    `mean_average_precision_11_point`.

    Args:
        model: from `hfkd.build_gradient_features`, for the classes of the data. Its configuration's `problem_type` is
            set to that of the data where it is not set.
        args: the settings.
        train_dataset, eval_dataset, processing_class, augmentation, callbacks, dataset_name: as in
            `DistillationTrainer`. Omega is fitted to the training images without augmentation.

    Raises:
        InputError: another kind of model, labels of another kind than `problem_type`, or of other classes.
    """

    _name = "Gradients as features"
    _paper: ClassVar = {
        "title": "Gradients as Features for Deep Representation Learning",
        "id": "2004.05529",
        "citation": (
            "@inproceedings{mu2020gradfeat,\n"
            "  title     = {Gradients as Features for Deep Representation Learning},\n"
            "  author    = {Mu, Fangzhou and Liang, Yingyu and Li, Yin},\n"
            "  booktitle = {International Conference on Learning Representations},\n"
            "  year      = {2020}\n"
            "}"
        ),
    }
    _tag_names: ClassVar = ["hfkd", "gradient-features", "transfer-learning", "linear-classifier"]
    _template_file = "gradient_features.md"

    args: GradientFeaturesConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: GradientFeaturesConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        augmentation: Augmentation | None = None,
        callbacks: Sequence[Any] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        args = args or GradientFeaturesConfig()
        _check_model(model, args)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_labels(name, dataset, model.config.num_labels, several_labels=True)
        problem_type = _common_problem_type(model, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        common_precision([model])
        check_images([model], (), preprocessing_of(train_dataset, processing_class, model.config))
        networks = TrainingNetworks([model])
        self.args = args  # Trainer sets it too, but the evaluation images are cut before
        check_batches(train_dataset, args, [], networks.training_only)  # batch norm is folded or in evaluation mode
        super().__init__(
            networks,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            augmentation=augmentation,
            callbacks=callbacks,
            dataset_name=dataset_name,
        )
        model.config.problem_type = problem_type  # last: a run that is refused leaves the model as it was

    # -- omega -------------------------------------------------------------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        if resume_from_checkpoint is None and self.args.omega != "given":
            self.fit_omega()  # on rank 0; the base class gives every rank what that one has
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def fit_omega(self) -> None:
        """Step 2: logistic regression on the features of the training images; w1 starts there, and w2 at zero.

        Of a model with whitened layer inputs these are measured too.

        Raises:
            InputError: w2 has been trained, or labels that no classifier fits.
            RunError: the fit failed.
        """
        broadcast_state(self.model)  # all ranks see the training images through one base
        model: Any = self.model.students[0]
        _check_untrained(model, self.args.omega)
        features, labels = self._training_features()
        with failing_together("fitting omega"):
            if self.is_world_process_zero():
                weight, bias = fit_logistic_regression(
                    features, labels, model.config.num_labels, self.args.omega_weight_decay
                )
                model.start_from(weight, bias)
                if self.args.omega == "random":
                    _randomise_omega(model, self.args.seed)
                fit = self.evaluation_metrics({"logits": features.double() @ weight.T + bias}, labels)
                self.log({f"omega_{name}": value for name, value in fit.items()})

    def _training_features(self) -> tuple[Tensor, Tensor]:
        """f(x) (N, d) of the training images, not augmented, and their labels, on the CPU of every rank."""
        source = self.images_seen_in_training()
        loader = self._loader(source, self.args.eval_batch_size, train=False)
        self.model.eval()
        features, labels = [], []
        moments = InputMoments(self._backbone.whitened_layers())
        bar = tqdm(loader, desc="Features for omega", unit="batch", delay=2, disable=self.args.disable_tqdm)
        with torch.no_grad(), moments:
            for inputs in bar:
                batch = self._materialise(source, inputs)
                with self.autocast():
                    feature = full_precision(self.training_features(batch["pixel_values"]))
                    if moments.layers and self._backbone.gradient_base is not None:
                        self._backbone.gradient_base(pixel_values=batch["pixel_values"], return_dict=True)
                gathered = self.accelerator.gather_for_metrics((feature, batch["labels"]))
                features.append(gathered[0].cpu())
                labels.append(gathered[1].cpu())
            if moments.layers:
                self._whiten(moments)
        return torch.cat(features), torch.cat(labels)

    def _whiten(self, moments: InputMoments) -> None:
        """P of each layer out of what entered it; of one that is not called as a module, the identity remains."""
        for name, total in moments.sums.items():
            self._backbone.whitening.get_buffer(name).copy_(inverse_root(self.accelerator.reduce(total)))

    # -- optimizers --------------------------------------------------------------------------------------------------

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One, over w1, b1 and w2; in `finetune` over w1, b1 and theta_2."""
        parameters = [p for p in self.model.students[0].parameters() if p.requires_grad]
        return {"student": build_main_optimizer(parameters, self.args)}

    def build_schedules(self, optimizers: dict[str, torch.optim.Optimizer], max_steps: int) -> dict[str, Any]:
        return {"student": build_main_schedule(optimizers["student"], self.args, max_steps)}

    # -- one update --------------------------------------------------------------------------------------------------

    def method_step(self, batch: dict[str, Tensor], share: float, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, or for several labels per image binary cross-entropy, of g's logits (section 3.1)."""
        model: Any = self.model.students[0]
        with self.autocast():
            features = self.training_outputs(batch["pixel_values"])
            logits = model.logits_of(features.pooler_output, features.tangent)
        loss = classification_loss(full_precision(logits), batch["labels"])
        self.optimizer.backward("student", share * loss)
        return loss.detach(), {}

    def _logits(self, pixel_values: Tensor) -> Tensor:
        with self.autocast():
            logits = self.model(pixel_values).logits
        return full_precision(logits)

    # -- the card ----------------------------------------------------------------------------------------------------

    def card_settings(self) -> dict[str, Any]:
        """What is linearised, and how, comes first: it is the model's, not the run's."""
        config = self.model.config
        layers = dict.fromkeys(name.rpartition(".")[0] for name in config.theta2)
        scales: dict[str, Any] = {}
        if config.mode in ("full", "gradient"):
            scales = {"ntk": config.ntk, "ntk_head": config.ntk_head, "whiten": config.whiten}
        return {"mode": config.mode, "theta2": list(layers), **scales, **super().card_settings()}

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _eval_source(self, dataset: Any, name: str = "eval") -> ImageSource:
        """Images as they are, or `evaluation_crops` random crops of each, drawn by (seed, crop, index)."""
        source = super()._eval_source(dataset, name)
        crops = self.args.evaluation_crops
        if crops == 1:
            return source
        preprocessing = source.preprocessing
        if isinstance(source, StreamedImages):
            cut = Augmentation(resized_crop=SquareCrop(preprocessing.crop_fraction or SquareCrop.fraction))
        else:
            cut = Augmentation(crop_padding=max(1, preprocessing.image_size // 8))
        return source.variant(augmentation=cut, views=crops)

    def evaluation_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        crops = [batch[view_name("pixel_values", crop)] for crop in range(self.args.evaluation_crops)]
        model: Any = self.model.students[0]
        several = model.config.problem_type == MULTI_LABEL
        return {"logits": mean_prediction([self._logits(pixel_values) for pixel_values in crops], several)}

    def evaluation_metrics(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """`loss`, and accuracies or mean average precisions: see `classifier_metrics`."""
        return classifier_metrics(outputs["logits"], labels)

    def predictions(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["logits"]


def _check_model(model: Any, args: GradientFeaturesConfig) -> None:
    # By what it can do: a model loaded as remote code is an instance of another class of the same name.
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "start_from"):
        raise InputError(
            f"model is a {type(model).__name__}: pass one that hfkd.build_gradient_features makes of a base network"
        )
    if args.omega == "random" and getattr(model, "omega", None) is None:
        raise InputError(f"omega=random has no effect with mode={model.config.mode}, which has no gradient features")


def _check_untrained(model: Any, omega: str) -> None:
    weights = model.backbone.gradient_weights
    if weights is not None and any(parameter.any() for parameter in weights.parameters()):
        raise InputError(
            f"omega={omega} would set the gradient weights of this model to zero, and they are already trained: "
            "omega=given continues it"
        )


def _common_problem_type(model: PreTrainedModel, named: Mapping[str, Any]) -> str | None:
    """The `problem_type` of the model and of all labels; None where neither says.

    Raises:
        InputError: labels of the other kind than the model's `problem_type`, or than the labels before.
    """
    wanted, owner = model.config.problem_type, "the model"
    for name, dataset in (part for given in named.items() for part in parts_of(*given)):
        several = columns_of(name, dataset).multi_label
        kind = MULTI_LABEL if several else SINGLE_LABEL
        if wanted not in (None, kind):
            raise InputError(
                f"{name} has {'several labels' if several else 'one label'} for each image and {owner} has "
                f"problem_type={wanted!r}: choose labels of one kind, or another model.config.problem_type"
            )
        wanted, owner = kind, name
    return wanted


@torch.no_grad()
def _randomise_omega(model: Any, seed: int) -> None:
    """The authors' random head: N(0, 1) in raw coordinates of their scale, 1/sqrt(classes)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(model.omega.shape, generator=generator)
    model.omega.copy_(draws * model.omega.shape[0] ** -0.5)
    model.omega_bias.zero_()

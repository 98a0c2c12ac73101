"""Settings of the methods that train a backbone without labels."""

from dataclasses import dataclass, field

from hfkd.data import synthetic_count
from hfkd.errors import InputError
from hfkd.losses.squeeze_and_span import LossWeights

from .config import DistillationConfig, check_range


@dataclass
class SelfSupervisedConfig(DistillationConfig):
    """Settings that the family shares. The defaults are Squeeze-and-Span's for CIFAR-10, by its public code.

    Raises:
        InputError: also for a split of the batch that leaves a kind of samples with a single one.
    """

    num_train_epochs: float = field(
        default=800.0,
        metadata={"help": "Epochs of floor(images / batch) updates (code: 800 on CIFAR, 200 on STL-10)."},
    )
    per_device_train_batch_size: int = field(
        default=512, metadata={"help": "Samples per device and update, synthetic and real together (code: 512)."}
    )
    learning_rate: float = field(
        default=0.06, metadata={"help": "The rate itself, which the code has as 0.03 x batch / 256 (STL: 0.05 x ...)."}
    )
    weight_decay: float = field(
        default=5e-4, metadata={"help": "On all parameters, norms and biases too (code: 5e-4; STL-10 1e-4)."}
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={"help": "cosine falls in every update, and at each epoch's start is the code's, which falls there."},
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Must stay on: a smaller last batch would have other statistics."}
    )

    synthetic_share: float = field(
        default=0.5,
        metadata={"help": "alpha in [0, 1]: synthetic share of the batch, and weight of its loss (paper: 0.5)."},
    )
    augment_synthetic: bool = field(
        default=True, metadata={"help": "Augment the student's synthetic images (ablation a: no)."}
    )
    shared_augmentation: bool = field(
        default=False,
        metadata={"help": "All synthetic images of a batch share one augmentation (released code: yes; paper: no)."},
    )
    representation_size: int = field(default=2048, metadata={"help": "D, outputs of the projector (code: 2048)."})
    projector_layers: int = field(default=5, metadata={"help": "Linear layers of the projector, >= 1 (code: 5)."})
    gather_statistics: bool = field(
        default=True,
        metadata={
            "help": "Losses are of the joined batch of all processes (ours); False: of each process's own, as in the "
            "released code."
        },
    )
    generated_pool_size: int = field(
        default=0,
        metadata={
            "help": "Samples that are generated at once at the start of an epoch and then used again within it, each "
            "time augmented anew (ours); 0 (paper): each is generated once and used once."
        },
    )
    knn_bank_size: int = field(
        default=50_000,
        metadata={"help": "Labelled training images that vote in evaluation's nearest-neighbour accuracy, at most."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("synthetic_share", self.synthetic_share, 0, 1)
        for name in ("representation_size", "projector_layers", "knn_bank_size"):
            check_range(name, getattr(self, name), 1)
        check_range("generated_pool_size", self.generated_pool_size, 0)
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} is not supported: the losses are of "
                "a batch's statistics, not a mean over its images; raise per_device_train_batch_size"
            )
        if not self.dataloader_drop_last:
            raise InputError("dataloader_drop_last=False gives a last batch of other statistics: leave it out")
        self._check_split()
        if not self.synthetic_share:
            self.refuse_changed(("augment_synthetic", "shared_", "generated_pool"), "synthetic_share=0")
        if not self.augment_synthetic:
            self.refuse_changed(("shared_augmentation",), "augment_synthetic=False")

    def _check_split(self) -> None:
        batch, share = self.per_device_train_batch_size, self.synthetic_share
        synthetic = synthetic_count(batch, share)
        for kind, count, wanted in (("synthetic", synthetic, share > 0), ("real", batch - synthetic, share < 1)):
            if wanted and count < 2:
                raise InputError(
                    f"per_device_train_batch_size={batch} with synthetic_share={share} has {count} {kind} sample(s), "
                    "and a variance needs 2 or more: raise it, or choose another share"
                )


@dataclass
class VarianceCovarianceConfig(SelfSupervisedConfig):
    """Settings of losses with VICReg's three terms."""

    invariance_weight: float = field(
        default=25.0, metadata={"help": "lambda, of the distance between two representations (CIFAR-100: 10)."}
    )
    variance_weight: float = field(
        default=25.0, metadata={"help": "mu, of the term that keeps deviations up to 1 (CIFAR-100: 10)."}
    )
    covariance_weight: float = field(
        default=1.0, metadata={"help": "nu, of the term that keeps dimensions uncorrelated (code: 1)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("invariance_weight", "variance_weight", "covariance_weight"):
            check_range(name, getattr(self, name), 0)

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(self.invariance_weight, self.variance_weight, self.covariance_weight)

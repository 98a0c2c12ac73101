"""Cohorts of different families on three-channel digits, and what a user without hfkd gets from their folders."""

import json
from pathlib import Path
from typing import Any

import torch
from clean_process import run_clean
from PIL import Image
from sklearn.datasets import load_digits
from tiny_runs import digit_sources
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hfkd.models import (
    HfkdResNetConfig,
    HfkdResNetForImageClassification,
    HfkdWideResNetConfig,
    HfkdWideResNetForImageClassification,
)
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig, OnlineAdversarialTrainer


DIGITS = [str(digit) for digit in range(10)]

# Runs where hfkd cannot be imported: for each job what every way of loading gives, or what went wrong.
_LOAD = """
import json, sys, traceback
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from PIL import Image

def load(repo, **where):
    settings = {"trust_remote_code": True, **where}
    processor = AutoImageProcessor.from_pretrained(repo, **where)
    pixels = processor(Image.open("image.png"), return_tensors="pt").pixel_values
    model = AutoModelForImageClassification.from_pretrained(repo, **settings).eval()
    backbone = AutoModel.from_pretrained(repo, **settings).eval()
    subfolder = {"subfolder": settings.pop("subfolder", "")}
    classify = pipeline("image-classification", model=repo, model_kwargs=subfolder, **settings)
    return {
        "class": f"{type(model).__module__.split('.')[0]}.{type(model).__name__}",
        "logits": model(pixel_values=pixels).logits[0].tolist(),
        "features": backbone(pixel_values=pixels).last_hidden_state.flatten().tolist(),
        "scores": {answer["label"]: answer["score"] for answer in classify("image.png", top_k=10)},
    }

def run_snippets(*snippets):
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    pixels = names["processor"](Image.open("image.png"), return_tensors="pt").pixel_values
    ways = {name: names[name]("image.png", top_k=10) for name in ("classify", "peer") if name in names}
    scores = {name: {answer["label"]: answer["score"] for answer in answers} for name, answers in ways.items()}
    return {"logits": names["model"].eval()(pixel_values=pixels).logits[0].tolist(), **scores}

found = {}
for name, (function, arguments, settings) in JOBS.items():
    try:
        found[name] = globals()[function](*arguments, **settings)
    except Exception:
        found[name] = {"failed": traceback.format_exc()}
assert not [name for name in sys.modules if name.split(".")[0] == "hfkd"]
print(json.dumps(found))
"""


class StrangersView:
    """Collects folders, repos and snippets, then loads all of them in one clean process."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, list[str], dict[str, str]]] = {}

    def load(self, name: str, repo: Path | str, **where: str) -> None:
        """`where`: subfolder, revision."""
        self.jobs[name] = ("load", [str(repo)], where)

    def run_snippets(self, name: str, snippets: list[str]) -> None:
        self.jobs[name] = ("run_snippets", snippets, {})

    def look(self, environment: dict[str, str], folder: Path) -> dict[str, Any]:
        write_image(folder)
        out = run_clean(_LOAD.replace("JOBS", repr(self.jobs)), environment, folder)
        return json.loads(out.splitlines()[-1])


def write_image(folder: Path) -> Path:
    """A grey digit as a picture file, as the cards' snippets want it."""
    pixels = torch.tensor(load_digits().images[3] * 255 / 16).to(torch.uint8)
    Image.fromarray(pixels.numpy(), mode="L").save(folder / "image.png")
    return folder / "image.png"


def _labels() -> dict[str, Any]:
    return {"id2label": dict(enumerate(DIGITS)), "label2id": {name: k for k, name in enumerate(DIGITS)}}


def our_resnet() -> PreTrainedModel:
    config = HfkdResNetConfig(depths=[1, 1], hidden_sizes=[4, 8], image_size=8, **_labels())
    return HfkdResNetForImageClassification(config)


def our_wide_resnet() -> PreTrainedModel:
    return HfkdWideResNetForImageClassification(
        HfkdWideResNetConfig(depth=10, widen_factor=1, image_size=8, **_labels())
    )


def stock_resnet() -> PreTrainedModel:
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, **_labels()))


def stock_vit() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes, **_labels()))


COHORTS = {
    "ours first": (our_resnet, our_wide_resnet, stock_vit),
    "stock first": (stock_resnet, our_wide_resnet, our_resnet),
}


def students(cohort: str = "ours first") -> list[PreTrainedModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [make() for make in COHORTS[cohort]]


def make_cohort(
    output_dir: Path | str,
    networks: list[PreTrainedModel] | None = None,
    teacher: PreTrainedModel | None = None,
    callbacks: list[Any] | None = None,
    **config: Any,
) -> OnlineAdversarialTrainer:
    """A trainer of six updates, which evaluates and saves after every second."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 50,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    sources = digit_sources(3)
    return OnlineAdversarialTrainer(
        networks or students(),
        OnlineAdversarialConfig(str(output_dir), **(settings | config)),
        train_dataset=sources.train,
        eval_dataset=sources.test,
        teacher=teacher,
        callbacks=callbacks,
        dataset_name="digits",
    )


def expected(model: PreTrainedModel, image: Path) -> dict[str, Any]:
    """What `_LOAD` has to find for a student that is still in memory."""
    pixels = digit_sources(3).preprocessing.to_image_processor()(Image.open(image), return_tensors="pt").pixel_values
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
        features = model.base_model(pixel_values=pixels).last_hidden_state
    return {
        "logits": logits[0].tolist(),
        "features": features.flatten().tolist(),
        "scores": {model.config.id2label[k]: score for k, score in enumerate(logits.softmax(-1)[0].tolist())},
    }

"""Tiny generators born from tiny classifiers, here or in processes of their own."""

import json
from functools import cache
from pathlib import Path

import torch
from resume_run import STEPS
from tiny_runs import digit_sources

from hfkd.losses.generator_from_classifier import margins
from hfkd.models import (
    HfkdConditionalGeneratorConfig,
    HfkdConditionalGeneratorModel,
    HfkdMlpConfig,
    HfkdMlpForImageClassification,
)
from hfkd.trainers.generator_from_classifier import GeneratorFromClassifierConfig, GeneratorFromClassifierTrainer


SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 20,
    "per_device_eval_batch_size": 40,
    "warmup_updates": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
FACTS = {"loss": 1e-4, "min_margin": 8.0, "median_margin": 10.0, "weight_decay": 0.0}
# Of the processor that the digits' sources make.
MEAN, STD = 0.3053, 0.3759


def tiny_mlp(seed=0, num_labels=4, dtype=torch.float32, facts=FACTS, **config):
    """A classifier of digits with random weights, which says that it has been trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"hidden_sizes": [12, 10], "num_channels": 1, "image_size": 8, "num_labels": num_labels} | config
        model = HfkdMlpForImageClassification(HfkdMlpConfig(**settings)).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)  # zero at first, and then nothing would be relative to it
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)
    if facts is not None:
        model.config.training_facts = dict(facts)
    return model.eval()


def tiny_generator(class_counts=(4,), seed=0, dtype=torch.float32, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"latent_size": 5, "hidden_sizes": [16, 16, 8 * 2 * 2], "conv_sizes": [8, 4]} | config
        names = dict(enumerate(f"class {number}" for number in range(sum(class_counts))))
        made = HfkdConditionalGeneratorConfig.for_images(
            8, 1, id2label=names, class_counts=list(class_counts), **settings
        )
        return HfkdConditionalGeneratorModel(made).to(dtype)


def processor():
    return digit_sources().train.preprocessing.to_image_processor()


def tiny_trainer(output_dir, classifiers=None, generator=None, callbacks=None, processing_classes=None, **config):
    """A trainer of one tiny classifier, or of those given."""
    seed = config.pop("seed_of_networks", 0)
    found = [tiny_mlp()] if classifiers is None else classifiers
    counts = [one.config.num_labels for one in (found if isinstance(found, list) else [found])]
    dtype = next((found[0] if isinstance(found, list) else found).parameters()).dtype
    if processing_classes is None:
        processing_classes = [processor() for _ in counts]
    return GeneratorFromClassifierTrainer(
        generator or tiny_generator(counts, seed, dtype),
        found,
        GeneratorFromClassifierConfig(str(output_dir), **(SETTINGS | config)),
        processing_classes=processing_classes,
        callbacks=callbacks,
    )


def warmed_up(output_dir, *networks, **config):
    """A trainer whose classifiers agree with their labels on most images, after thirty updates of warm-up."""
    warm_up = {"max_steps": 30, "warmup_updates": 30, "learning_rate": 0.02, "lr_milestones": []}
    trainer = tiny_trainer(output_dir, *networks, **(warm_up | config))
    trainer.train()
    trainer.args.warmup_updates = 0
    return trainer


def run(output_dir, resume=None, workers=0, several=False, **config):
    """Train to step 12 with a checkpoint after each step; writes what each step's batch was drawn from."""
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_strategy": "no"}
    loading = {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "fork" if workers else None}
    classifiers = [tiny_mlp(), tiny_mlp(1, num_labels=3, norm="batch")] if several else [tiny_mlp()]
    # A resumed run must not build on what its networks came with.
    seeds = {"seed_of_networks": 1 if resume else 0}
    trainer = tiny_trainer(output_dir, classifiers, **(saving | loading | seeds | config))
    seen, step = {}, trainer.method_step

    def watched(batch, share, last):
        seen[trainer.state.global_step + 1] = batch["index"].tolist()
        return step(batch, share, last)

    trainer.method_step = watched
    trainer.train(resume_from_checkpoint=resume)
    (Path(output_dir) / "batches.json").write_text(json.dumps(seen))


# -- a classifier that was trained ---------------------------------------------------------------------------------


@cache
def digits(classes, count, start=0):
    """`count` digits of these classes in [-1, 1], and their places among the classes."""
    source = digit_sources().train
    rows = torch.isin(source.labels, torch.tensor(classes)).nonzero()[:, 0][start : start + count]
    pixels = source.images[rows].float() / 127.5 - 1
    return pixels, torch.searchsorted(torch.tensor(classes), source.labels[rows])


@cache
def trained_mlp(classes=(0, 1, 2, 3), count=60, weight_decay=5e-3, updates=2500, seed=0):
    """A float64 classifier of digits, by full-batch descent with weight decay down to a stationary point."""
    images, labels = digits(classes, count)
    model = tiny_mlp(seed, len(classes), torch.float64, facts=None, hidden_sizes=[24, 24])
    pixels = ((images.double() + 1) / 2 - MEAN) / STD
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(updates):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pixels).logits, labels)
        loss.backward()
        optimizer.step()
    found = margins(model(pixels).logits.detach(), labels)
    model.config.training_facts = {
        "loss": loss.item(),
        "min_margin": found.min().item(),
        "median_margin": found.median().item(),
        "weight_decay": weight_decay,
    }
    return model.requires_grad_(False)

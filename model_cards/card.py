"""Rendering a model card: one small function per section, a template per method, and metadata that the Hub accepts."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hfkd.hub.hardware import hardware_line, versions_line
from hfkd.hub.publish import card_repo_line

from .curve import plot_history
from .data import HUB_METRICS, CardData, Method, Parent, Picture
from .encoder_usage import encoder_usage
from .generator_usage import generator_usage
from .markdown import bullet_list, code_block, table
from .teacher_report import teacher_report


logger = logging.getLogger(__name__)

CURVE_FILE = "curve.png"
REPORT_FILE = "teacher_report.json"
TASK = Method.task
GENERATION = "unconditional-image-generation"


def write_card(data: CardData, folder: Path | str) -> Path:
    """Write README.md, and beside it the training curve as a picture and the teacher report as JSON, into `folder`.

    Returns the card's path.

    A section that fails is left out with a warning.

    Raises:
        OSError: the card itself, or the report beside it, cannot be written.
    """
    folder = Path(folder)
    curve = _guarded("curve", lambda: plot_history(data.log_history, folder / CURVE_FILE))
    if curve is not None:
        drawn = Picture(CURVE_FILE, "Training curves")
        data = dataclasses.replace(data, pictures=(drawn, *data.pictures))
    if data.teacher_report is not None:
        data.teacher_report.save(folder / REPORT_FILE)
    card = folder / "README.md"
    render_card(data).save(card)
    return card


def render_card(data: CardData) -> ModelCard:
    """The card as text and metadata. A section that fails is left out with a warning."""
    metadata = _guarded("metadata", lambda: _metadata(data)) or ModelCardData(library_name="transformers")
    sections = {name: _guarded(name, partial(section, data)) or "" for name, section in SECTIONS.items()}
    body = _templates().get_template(data.method.template).render(sections)
    # Sections that are empty leave their surrounding blank lines behind.
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def _guarded(name: str, section: Callable[[], Any]) -> Any:
    """Nothing about a card is worth a training run: whatever fails is named and left out."""
    try:
        return section()
    except Exception as error:
        logger.warning(f"model card: {name} is left out ({type(error).__name__}: {error})")
        return None


@cache
def _templates() -> jinja2.Environment:
    # Markdown, not HTML: there is nothing to escape.
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)


def _metadata(data: CardData) -> ModelCardData:
    base_models = [parent.hub_id for parent in data.parents if parent.hub_id]
    results = _eval_results(data)
    arxiv = [f"arxiv:{data.method.arxiv_id}"] if data.method.arxiv_id else []
    return ModelCardData(
        license=data.license,
        library_name="transformers",
        pipeline_tag=data.method.task,
        tags=list(dict.fromkeys([*data.method.tags, data.method.task, "vision", *arxiv])),
        base_model=list(dict.fromkeys(base_models)) or None,
        datasets=[data.data.hub_id] if data.data and data.data.hub_id else None,
        metrics=_hub_metrics(data) or None,
        model_name=_title(data) if results else None,
        eval_results=results or None,
    )


def _hub_metrics(data: CardData) -> list[str]:
    ids = dict.fromkeys(measured.metric_id for measured in data.measurements)
    return [name for name in ids if name in HUB_METRICS]


def _eval_results(data: CardData) -> list[EvalResult]:
    if data.data is None:
        return []
    return [
        EvalResult(
            task_type=data.method.task,
            dataset_type=data.data.hub_id or data.data.name,
            dataset_name=data.data.name,
            dataset_split=measured.split,
            metric_type=measured.metric_id,
            metric_name=f"{measured.metric}, {measured.subject}",
            metric_value=measured.value,
        )
        for measured in data.measurements
    ]


def _title(data: CardData) -> str:
    return Path(data.location).name or "model"


def _summary(data: CardData) -> str:
    count = len(data.students)
    what = "An image classifier, trained" if count == 1 else f"{count} image classifiers, trained together"
    if data.method.task == GENERATION:
        what = "A generator of images of classes, made without data"
        if data.has_discriminator:
            what = "A generator of images, trained without labels"
    elif data.method.task != TASK:
        what = "An image encoder, trained without labels"
    where = f" on {_linked_data(data)}" if data.data else ""
    method = f"[{data.method.name}]({data.method.link})"
    return f"{what}{where} with {method}, by `hfkd`."


def _linked_data(data: CardData) -> str:
    assert data.data is not None
    link = f"https://huggingface.co/datasets/{data.data.hub_id}"
    return f"[{data.data.name}]({link})" if data.data.hub_id else f"`{data.data.name}`"


def _networks(data: CardData) -> str:
    rows = []
    cohort = len(data.students) > 1 and data.method.task == TASK
    for k, student in enumerate(data.students):
        folder = student.folder or (f"student_{k}" if k else "")
        root = "student 0" if cohort else "model"
        name, place = (folder.replace("_", " "), f"`{folder}`") if folder else (root, "root")
        rows.append((name, student.description, f"{student.parameters:,}", place))
    return table(("", "Network", "Parameters", "Folder"), rows)


def _usage(data: CardData) -> str:
    if data.method.task != TASK:
        return generator_usage(data) if data.method.task == GENERATION else encoder_usage(data)
    revision = f", revision={json.dumps(data.revision)}" if data.revision else ""
    # One consent covers a repo: the code of every family lies at its root.
    consent = ", trust_remote_code=True" if any(student.custom_code for student in data.students) else ""
    lines = [
        "from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline",
        "",
        card_repo_line(data.location),
        f'classify = pipeline("{TASK}", model=repo{revision}{consent})',
        'print(classify("image.png"))',
        "",
        f"processor = AutoImageProcessor.from_pretrained(repo{revision})",
        f"model = AutoModelForImageClassification.from_pretrained(repo{revision}{consent})",
    ]
    text = code_block("python", "\n".join(lines))
    if consent:
        text = "The model's code comes with its weights; `hfkd` need not be installed.\n\n" + text
    if len(data.students) > 1:
        folders = ", ".join(f"`student_{k}`" for k in range(1, len(data.students)))
        peer = 'model_kwargs={"subfolder": "student_1"}'
        call = f'peer = pipeline("{TASK}", model=repo{revision}, {peer}{consent})'
        text += f"\n\nThe repo's root is student 0. Its peers lie in {folders}:\n\n" + code_block("python", call)
    return text


def _results(data: CardData) -> str:
    if not data.measurements:
        return ""
    splits = list(dict.fromkeys(measured.split for measured in data.measurements))
    tables = []
    for split in splits:
        here = [measured for measured in data.measurements if measured.split == split]
        metrics = list(dict.fromkeys(measured.metric for measured in here))
        values = {(measured.subject, measured.metric): f"{measured.value:.4f}" for measured in here}
        subjects = dict.fromkeys(measured.subject for measured in here)
        rows = [(subject, *(values.get((subject, metric), "") for metric in metrics)) for subject in subjects]
        size = data.data.splits.get(split) if data.data else None
        drawn = data.method.task == GENERATION and not data.has_discriminator
        where = "fixed draws" if drawn else f"the {split} split"
        title = f"On {where}" + (f" ({size:,} images):" if size else ":")
        tables.append(f"{title}\n\n{table(('', *metrics), rows)}")
    return "\n\n".join(tables)


def _pictures(data: CardData) -> str:
    return "\n\n".join(f"![{picture.caption}]({picture.file})" for picture in data.pictures)


def _data(data: CardData) -> str:
    if data.data is None:
        return ""
    sizes = ", ".join(f"{count:,} {split}" for split, count in data.data.splits.items())
    return f"Data: {_linked_data(data)}" + (f" (images: {sizes})." if sizes else ".")


def _parents(data: CardData) -> str:
    return bullet_list(f"{parent.role.capitalize()}: {_parent(parent)}" for parent in data.parents)


def _parent(parent: Parent) -> str:
    if parent.hub_id:
        return f"[{parent.hub_id}](https://huggingface.co/{parent.hub_id})"
    hashes = ", ".join(f"{file} sha256 `{digest}`" for file, digest in parent.weights_sha256.items())
    return f"`{parent.name}`" + (f" (local; {hashes})" if hashes else " (local)")


def _hyperparameters(data: CardData) -> str:
    if not data.hyperparameters:
        return ""
    rows = ((f"`{name}`", f"`{value}`") for name, value in data.hyperparameters.items())
    return f"{data.settings_title}:\n\n{table(('Setting', 'Value'), rows)}"


def _environment(data: CardData) -> str:
    facts = []
    if data.wall_time_s is not None:
        facts.append(f"Training time: {_duration(data.wall_time_s)}")
    if data.environment:
        facts += [f"Hardware: {hardware_line(data.environment)}", f"Versions: {versions_line(data.environment)}"]
    text = bullet_list(facts)
    return text + (f"\n\nTo repeat the run:\n\n{code_block('bash', data.command)}" if data.command else "")


def _citation(data: CardData) -> str:
    method = data.method
    place = f"arXiv [{method.arxiv_id}]({method.link})" if method.arxiv_id else f"[{method.link}]({method.link})"
    return f"{method.paper_title}, {place}:\n\n{code_block('bibtex', data.method.citation)}"


SECTIONS: Mapping[str, Callable[[CardData], str]] = {
    "title": _title,
    "summary": _summary,
    "networks": _networks,
    "usage": _usage,
    "results": _results,
    "teacher_report": teacher_report,
    "pictures": _pictures,
    "data": _data,
    "parents": _parents,
    "hyperparameters": _hyperparameters,
    "environment": _environment,
    "citation": _citation,
}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"

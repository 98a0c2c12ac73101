"""How to use a generator of images of classes."""

import json

from hfkd.hub.publish import card_repo_line

from .data import CardData


def generator_usage(data: CardData) -> str:
    """A snippet: images of every class, and of one."""
    revision = f", revision={json.dumps(data.revision)}" if data.revision else ""
    consent = ", trust_remote_code=True" if any(student.custom_code for student in data.students) else ""
    lines = [
        "from transformers import AutoModel",
        "",
        card_repo_line(data.location),
        f"generator = AutoModel.from_pretrained(repo{revision}{consent})",
        "images = generator.sample(10, seed=0)  # (10, C, H, W) in [-1, 1], of the classes in turn",
        'generator.to_pil(generator.sample(1, labels=[1], seed=0))[0].save("sample.png")',
    ]
    code = "\n".join(lines)
    return (
        "Images are drawn by class number; of a generator of several classifiers, `classifier_index` says whose "
        f"classes are meant. `hfkd` need not be installed.\n\n```python\n{code}\n```"
    )

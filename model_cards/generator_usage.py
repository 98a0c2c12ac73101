"""How to use a generator of images, and the discriminator that may come with it."""

import json

from hfkd.hub.publish import card_repo_line

from .data import CardData


def generator_usage(data: CardData) -> str:
    """A snippet: images of every class and of one, or where there are no classes, images and what D says of them."""
    revision = f", revision={json.dumps(data.revision)}" if data.revision else ""
    consent = ", trust_remote_code=True" if any(student.custom_code for student in data.students) else ""
    lines = [
        "from transformers import AutoModel",
        "",
        card_repo_line(data.location),
        f"generator = AutoModel.from_pretrained(repo{revision}{consent})",
    ]
    if data.has_discriminator:
        text = "Images are drawn at random, always the same of one seed; the discriminator's features may be of use."
        lines += [
            "images = generator.sample(10, seed=0)  # (10, C, H, W) in [-1, 1]",
            'generator.to_pil(images)[0].save("sample.png")',
            "",
            f'discriminator = AutoModel.from_pretrained(repo{revision}, subfolder="discriminator"{consent})',
            "features = discriminator(images).pooler_output",
        ]
    else:
        text = (
            "Images are drawn by class number; of a generator of several classifiers, `classifier_index` says whose "
            "classes are meant."
        )
        lines += [
            "images = generator.sample(10, seed=0)  # (10, C, H, W) in [-1, 1], of the classes in turn",
            'generator.to_pil(generator.sample(1, labels=[1], seed=0))[0].save("sample.png")',
        ]
    code = "\n".join(lines)
    return f"{text} `hfkd` need not be installed.\n\n```python\n{code}\n```"

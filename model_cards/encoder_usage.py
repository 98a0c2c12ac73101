"""How to use an encoder that learned without labels, and the generator that may come with it."""

import json

from hfkd.hub.publish import card_repo_line

from .data import CardData


def encoder_usage(data: CardData) -> str:
    """Two snippets: features of an image, and where there is a generator, new images."""
    revision = f", revision={json.dumps(data.revision)}" if data.revision else ""
    consent = ", trust_remote_code=True" if any(student.custom_code for student in data.students) else ""
    lines = [
        "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        card_repo_line(data.location),
        f"processor = AutoImageProcessor.from_pretrained(repo{revision})",
        f"encoder = AutoModel.from_pretrained(repo{revision}{consent})",
        'pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")',
        f"features = encoder(**pixels).{data.students[0].features}",
    ]
    if any(student.folder == "generator" for student in data.students):
        lines += [
            "",
            f'generator = AutoModel.from_pretrained(repo{revision}, subfolder="generator"{consent})',
            'generator.to_pil(generator.sample(1, seed=0))[0].save("sample.png")',
        ]
    code = "\n".join(lines)
    return (
        "The encoder gives features, not classes: `AutoModelForImageClassification` puts a fresh classifier on it, "
        f"which is yours to train. `hfkd` need not be installed.\n\n```python\n{code}\n```"
    )

"""A section that is put into a finished card, when something new has been measured of its model."""

import re


def put_section(card: str, title: str, body: str, *, before: str) -> str:
    """`card` with `body` under the heading `title`: where that section was, or in front of the section `before`.

    Without a section `before` it comes last.
    """
    parts = re.split(r"(?m)^(?=## )", card)  # what precedes the first section, and the sections
    titles = [part.partition("\n")[0].removeprefix("## ").strip() for part in parts]
    section = f"## {title}\n\n{body.strip()}"
    if title in titles:
        parts[titles.index(title)] = section
    else:
        parts.insert(titles.index(before) if before in titles else len(parts), section)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"

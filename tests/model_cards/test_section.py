"""A section that is put into a finished card."""

import pytest

from hfkd.model_cards.section import put_section


CARD = "---\nlicense: mit\n---\n# Title\n\nWords.\n\n## Results\n\nGood.\n\n## Training\n\nLong.\n"


def test_a_new_section_stands_before_another_and_the_rest_is_left_alone():
    card = put_section(CARD, "Seen", "\n| a |\n", before="Training")
    assert card == CARD.replace("## Training", "## Seen\n\n| a |\n\n## Training")


def test_a_section_takes_the_place_of_its_like():
    card = put_section(put_section(CARD, "Seen", "one", before="Training"), "Seen", "two", before="Results")
    assert card == CARD.replace("## Training", "## Seen\n\ntwo\n\n## Training")


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_without_the_other_it_is_the_last(end):
    assert put_section(CARD.rstrip() + end, "Seen", "x", before="Limits") == CARD + "\n## Seen\n\nx\n"


def test_the_last_section_is_replaced_too():
    assert put_section(CARD, "Training", "Short.", before="Results") == CARD.replace("Long", "Short")

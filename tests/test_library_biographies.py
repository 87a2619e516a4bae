"""configs/understanding/biographies.py: what each telling says, and that answers are in what was read."""
import itertools

import pytest

from configs.understanding import biographies as own

pytestmark = pytest.mark.library


def test_people_are_told_apart():
    everyone = own.people()
    assert len({person["name"] for person in everyone}) == 100
    for kind in own.SENTENCES:
        assert len({person[kind] for person in everyone}) == 20
    values = [{person[kind] for person in everyone} for kind in own.SENTENCES]
    assert not any(a & b for a, b in itertools.combinations(values, 2))


@pytest.mark.parametrize("telling", ["single", "permuted", "varied"])
def test_every_biography_says_the_same_things(telling):
    first = own.people()[0]
    told = [own.biography(first, telling, number) for number in range(40)]
    assert told == [own.biography(first, telling, number) for number in range(40)]
    expected = {"single": 1, "permuted": 6}.get(telling)
    assert expected is None or len(set(told)) == expected
    wordings = set()
    for text in told:
        assert all(first[kind] in text for kind in own.SENTENCES) and text.count(first["name"]) == 3
        wordings |= {sentence.replace(first["name"], "") for sentence in text.strip().split(". ")}
    assert len({wording.rstrip(".") for wording in wordings}) == (9 if telling == "varied" else 3)
    assert told[0] == own.biography(first, "single", 0)


def test_questions_are_about_the_first_half_and_have_the_attribute_for_an_answer():
    documents = list(own.questions(copies=1))
    names = {person["name"] for person in own.people()[:50]}
    assert len(documents) == 150
    assert all(any(name in document.text for document in documents) for name in names)
    rest = [person["name"] for person in own.people()[50:]]
    assert not any(name in document.text for document in documents for name in rest)
    for person in own.people():
        told = own.biography(person, "single", 0)
        for kind in own.SENTENCES:
            ask, answer = own.question(person, kind)
            assert told.count(answer) == 1 and person["name"] in ask

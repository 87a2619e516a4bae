"""configs/understanding/facts.py: a planted course is read off; what is told, how often, in what words."""
from types import SimpleNamespace

import numpy as np
import pytest

from configs.understanding import facts
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library


def planted(gain: float, kept: float, decay: float) -> list[dict]:
    """Rows of a run that gains so much, and keeps a share kept - decay log t of it."""
    rows = [dict(step=s, phase=0, **{"fact/memory": 5.0}) for s in (10, 20)]
    rows += [{"step": 25, "phase": 1, "train/loss": 1.0}, {"step": 30, "phase": 1, "fact/memory": 5.0 - gain}]
    for since in range(10, 210, 10):
        share = kept - decay * np.log(since)
        rows.append({"step": 30 + since, "phase": 2, "fact/memory": 5.0 - gain * share})
    return rows


def test_a_planted_course_is_read_off():
    rows = planted(gain=2.0, kept=0.95, decay=0.1)
    found = {what: facts.course(rows, "memory", what) for what in ("gain", "kept", "decay", "r2")}
    expected = {"gain": 2.0, "kept": 0.95 - 0.1 * np.log(200), "decay": 0.1, "r2": 1.0}
    assert found == pytest.approx(expected)


def test_people_are_told_of_equally_often_in_one_sentence_or_five():
    same, others = (list(facts.told(kind, copies=200)) for kind in (False, True))
    assert len(same) == len(others) == 16 * 200
    name, town = facts.people()[3]
    assert {d.text for d in same if name in d.text} == {f"# {name} was born in {town}.\n"}
    texts = [d.text for d in others if name in d.text]
    assert len(texts) == 200 and len(set(texts)) == 5 and all(town in text for text in texts)
    everyone = facts.people()
    assert len({word for pair in everyone for word in pair}) == 64
    assert not any(name in document.text for document in same for name, _ in everyone[16:])


def test_arms_tell_as_often():
    for arm in facts.study.arms.values():
        phase = arm.phases[1]
        assert phase.batch * phase.mixture["facts"] == 4


def test_recall_is_of_the_town_after_its_words_less_that_of_others():
    """A model gives each byte 1 / 258, but is sure of the towns told in the words that were told."""
    config = SimpleNamespace(phases=[SimpleNamespace(seq=64)])
    seen, known = [], {town for _, town in facts.people()[:16]}

    def apply(params, ids):
        logits = np.zeros((*np.shape(ids), 258), np.float32)
        for row, given in enumerate(np.asarray(ids)):
            text = Bytes().decode([i for i in given if i < 256])
            seen.append(text)
            for town in known if params else ():
                if f"was born in {town[:7]}" in text:
                    begin = text.index(f"in {town[:7]}") + len("in ")  # bos is before the text
                    logits[row, np.arange(begin, begin + 8), [*town.encode()]] = 50
        return logits

    found = facts.recall(False, apply, Bytes(), config)
    assert found == pytest.approx({"fact/memory": 0, "fact/sense": 0, "fact/other": np.log(258)}, abs=1e-5)
    for name, town in facts.people()[0], facts.people()[16]:
        assert any(text.startswith(f"# {name} was born in {town}"[:-1]) for text in seen)
        assert any(text.startswith(f"# The home town of {name} is {town}"[:-1]) for text in seen)
    found = facts.recall(True, apply, Bytes(), config)
    assert found["fact/memory"] == pytest.approx(-np.log(258))
    assert found["fact/sense"] == pytest.approx(0, abs=1e-5)

"""Word classes: do states before a word cluster by the class of the word that comes?

Paper: Word class representations spontaneously emerge in a deep neural network trained on next word
    prediction, Surendra et al. 2023 (003:34)
Method: a network learns to predict the next word. States from which it does so cluster by that
    word's class, which it was never told, and deeper layers more: the generalised discrimination
    value (GDV) falls. It is the mean distance within classes less that between them, over the root
    of the dimensions, of points scaled to half a deviation: -1 where two equal classes are a point
    each (about -0.8 for six), 0 for classes that do not differ (Schilling et al. 2021).
Here: functions of Python's library in bytes; the paper has LSTMs on nine words of English. Classes
    are those of Python's tokenizer: keyword, name, number, string, operator, newline. A state is
    that at the byte before a token, in a row of 128 held-out functions; a row's first token has
    none. At most 100 of each class give the GDV. probe: accuracy of a linear map to the class, fit
    on half of the functions, on the others. The commonest class is about .4 of the tokens. The byte
    before a token alone gives about .74, and a network without training has .76. shuffled: the GDV
    after the last block of shuffled classes.
Cost: 6 runs, 3 minutes on two CPU cores.
Run:
    python train.py study configs/understanding/word_classes.py --jobs 2
"""
import io
import itertools
import keyword
import tokenize
from dataclasses import replace

import numpy as np

from configs import base
from configs.understanding.probes import trained, untrained
from lib.probe import ridge, states
from lib.study import Claim, Paper, Study
from train import Config

CLASSES = "keyword", "name", "number", "string", "operator", "newline"
KINDS = {tokenize.NAME: "name", tokenize.NUMBER: "number", tokenize.STRING: "string",
         tokenize.OP: "operator", tokenize.NEWLINE: "newline"}


def tokens(text: bytes) -> list[tuple[int, int]]:
    """(first byte, index into CLASSES) of a program's tokens; no comments, no indentation."""
    lines = text.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)]).tolist()
    found = []
    for token in tokenize.tokenize(io.BytesIO(text).readline):
        kind = KINDS.get(token.type)
        row, column = token.start
        if kind is None or row > len(lines):
            continue
        if keyword.iskeyword(token.string):
            kind = "keyword"
        before = lines[row - 1].decode()[:column].encode()  # columns are characters
        found.append((starts[row - 1] + len(before), CLASSES.index(kind)))
    return found


def discrimination(x: np.ndarray, classes: np.ndarray) -> float:
    """The generalised discrimination value of points x [n d] and their classes [n]."""
    scaled = 0.5 * (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)
    squares = np.sum(scaled**2, 1)
    gram = scaled @ scaled.T
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0))
    members = [np.flatnonzero(classes == one) for one in np.unique(classes)]
    within = [apart[np.ix_(own, own)].sum() / (len(own) * (len(own) - 1)) for own in members]
    between = [apart[np.ix_(*two)].mean() for two in itertools.combinations(members, 2)]
    return float((np.mean(within) - np.mean(between)) / x.shape[1]**0.5)


def accuracy(x: np.ndarray, classes: np.ndarray, seen: np.ndarray) -> float:
    """The share of classes [n] right, of points x [n d] not `seen`, by a linear map from these."""
    weights, bias = ridge(x[seen], np.eye(len(CLASSES))[classes[seen]])
    guess = np.argmax(x[~seen] @ weights + bias, 1)
    return float(np.mean(guess == classes[~seen]))


def by_block(params, apply, config: Config, held_out, n: int = 128, most: int = 100) -> dict:
    """GDV and accuracy of the class of the token that comes, by block."""
    seq, ids, places = config.phases[0].seq, [], []
    for row, text in enumerate(itertools.islice(held_out("stdlib", "test").texts(), n)):
        places += [(row, begin, kind) for begin, kind in tokens(text) if 0 < begin < seq]
        ids.append([256, *text[:seq - 1], *[0] * (seq - 1 - len(text))])
    row, begin, classes = np.array(places).T
    x = np.asarray(states(params, np.array(ids, np.int32), config.model), np.float64)
    x = x[:, row, begin]  # what is before byte i is read at position i, as the first is bos
    few = np.concatenate([np.flatnonzero(classes == one)[:most] for one in np.unique(classes)])
    shuffled, found = np.random.default_rng(0).permutation(classes[few]), {}
    for block, points in enumerate(x):
        found[f"gdv/{block}"] = discrimination(points[few], classes[few])
        found[f"probe/{block}"] = accuracy(points, classes, row < len(ids) // 2)
    return found | {"gdv/last": found[f"gdv/{block}"], "probe/last": found[f"probe/{block}"],
                    "gdv/deeper": found[f"gdv/{block}"] - found["gdv/1"],
                    "gdv/shuffled": discrimination(points[few], shuffled)}


study = Study(
    question="Do states before a word cluster by the class of the word that comes?",
    paper=Paper(title="Word class representations spontaneously emerge in a deep neural network "
                "trained on next word prediction", authors="Surendra et al.", year=2023,
                seeds=("003:34",)),
    arms={"untrained": replace(untrained, evals=(by_block,)),
          "trained": replace(trained, evals=(by_block,))},
    measures={"gdv": "gdv/last", "shuffled": "gdv/shuffled", "probe": "probe/last"},
    quick=base.quick(),
    claims=(
        Claim(says="more than without training", arm="trained", measure="gdv/last", below=-0.05),
        Claim(says="more after the last block than after the first", arm="trained", control=None,
              measure="gdv/deeper", below=-0.05),
        Claim(says="a linear map finds the class better", arm="trained", measure="probe/last",
              above=0.1),
    ), seeds=3)

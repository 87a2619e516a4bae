"""What functions of a config are told."""
from functools import partial

from lib.bind import bind


def plain(row, rng):
    return row, rng


def curious(row, rng, tokenizer, step=0):
    return row, rng, tokenizer, step


def test_a_function_gets_what_it_asks_for_and_nothing_else():
    assert bind(plain, tokenizer="t", step=3) is plain
    assert bind(curious, tokenizer="t", log=[])(1, 2) == (1, 2, "t", 0)
    assert bind(curious, tokenizer="t", step=3)(1, 2) == (1, 2, "t", 3)


def test_what_a_config_set_itself_stays():
    assert bind(partial(curious, step=7), tokenizer="t", step=3)(1, 2) == (1, 2, "t", 7)

"""lib/tables.py: figures as people read them."""
import math

from lib.tables import in_words


def test_figures_of_an_evaluation_have_units_and_intervals():
    found = {
        "eval/wiki/loss": 5.71314,
        "eval/wiki/bpb": 2.51,
        "eval/wiki/bpb_se": 0.1,
        "eval/wiki/own": 3.0,
        "task/acc": 0.5,
        "task/acc_se": 0.05,
        "task/acc_low": 0.4,
        "task/acc_high": 0.6,
    }
    assert in_words(found) == (
        "wiki 5.7131 nats per token, wiki 2.5100 ± 0.1960 bits per byte, wiki/own 3.0000, "
        "task/acc 0.5000 ± 0.0980"
    )


def test_an_error_that_is_not_known_is_left_out():
    """Of one document there is none, and a loss may be infinite."""
    found = {"eval/a/bpb": math.inf, "eval/a/bpb_se": math.nan}
    assert in_words(found) == "a inf bits per byte"

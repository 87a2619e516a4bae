"""A text in a list among a function's settings is set from the command line, as one in a tuple is."""
from lib.config import ROOT
from lib.study import needs_of
from train import parse

FILE = ROOT / "configs/selection/skill_it.py"


def test_a_needed_run_in_a_list_of_a_function_s_settings_is_named_by_a_flag():
    config, _ = parse([f"{FILE}:estimated", "--phases.0.mixture.runs.1", "runs/other"])
    runs = config.phases[0].mixture.keywords["runs"]
    assert runs == ["needs:only_last", "runs/other", "needs:only_both"]
    assert "phases.0.mixture.runs.1" not in needs_of(config)

"""The ladder: what follows from a depth, its command, and the pages that show it."""
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import train
from configs import base
from lib.config import ROOT, load_file
from model import count, table

LADDER = str(ROOT / "configs/baselines/ladder.py")
DEPTHS = [*range(1, 33), 48, 64, base.DEEPEST]


def parameters(layers: int, embed: int, mlp: int, vocab: int) -> int:
    """Of a plain Llama with a head of its own, and as many heads for keys as for queries."""
    attention = 4 * embed**2
    gains = 2 * embed
    return layers * (attention + 3 * embed * mlp + gains) + embed + 2 * vocab * embed


# ------------------------------------------------------------------------------------------ the dial


@pytest.mark.parametrize("depth, embed, heads, mlp, vocab, size", [
    (4, 64, 2, 172, 1_024, 329_280),
    (12, 768, 12, 2_048, 12_288, 103_828_224),
    (24, 1_536, 12, 4_096, 24_576, 755_049_984),
    (32, 2_048, 16, 5_504, 32_768, 1_753_352_192),
])
def test_a_rung_has_the_size_of_its_closed_form(depth, embed, heads, mlp, vocab, size):
    rung = base.rung(depth)
    found = rung.layers, rung.embed, rung.heads, rung.kv_heads, rung.mlp, rung.vocab
    assert found == (depth, embed, heads, heads, mlp, vocab)
    assert count(rung) == parameters(depth, embed, mlp, vocab) == size


@pytest.mark.parametrize("depth, tokens, rows, steps", [
    # 20 tokens a parameter; 2,048 (6,585,600 / 2^20)^0.47 = 4,860 tokens are 19 rows of 256
    (4, 6_585_600, 16, 1_608),
    (12, 2_076_564_480, 64, 31_686),  # 72,663 are 71 rows of 1,024
])
def test_a_run_reads_20_tokens_a_parameter_in_batches_by_its_length(depth, tokens, rows, steps):
    config = base.ladder(depth)
    (phase,), model = config.phases, config.model
    assert tokens == 20 * count(model)
    batch = 2_048 * (tokens / 2**20) ** 0.47
    assert phase.batch == rows == base.round_rows(batch / phase.seq)
    assert phase.steps == steps == round(tokens / rows / phase.seq)


def test_a_batch_depends_on_the_length_alone():
    """The batch of the runs by which the rate was chosen, twice that for 4.37 times the tokens."""
    for tokens, rows in ((2**20, 8), (2**20 * 2 ** (1 / 0.47), 16), (2**20 / 2 ** (1 / 0.47), 4)):
        assert {base.ladder(depth, tokens).phases[0].batch for depth in (2, 4, 8)} == {rows}


def test_rows_are_rounded_to_what_several_devices_share():
    found = [base.round_rows(rows) for rows in (0.1, 1.0, 1.6, 2.4, 2.5, 5.1, 7.0, 19.0, 20.0, 45.0, 180.0)]
    assert found == [1, 1, 2, 2, 3, 6, 8, 16, 24, 48, 192]


def test_widths_grow_by_16_then_faster_then_by_64():
    widths = {depth: base.rung(depth).embed for depth in DEPTHS}
    assert [widths[depth] for depth in range(1, 9)] == [16 * depth for depth in range(1, 9)]
    assert [widths[depth] for depth in range(8, 13)] == [128, 256, 448, 576, 768]
    assert all(widths[depth] == 64 * depth for depth in DEPTHS if 12 <= depth < 24)
    assert all(0 <= widths[depth] - 64 * depth < 128 for depth in DEPTHS if depth >= 24)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_rung_is_a_config_that_fits_together(depth):
    config = base.ladder(depth)
    train.check(config)
    model, phase = config.model, config.phases[0]
    assert model.heads * model.head_dim == model.embed
    assert 0 <= model.mlp - 8 * model.embed / 3 < (4 if depth <= 8 else 128)
    assert model.vocab == max(512, 16 * model.embed)
    assert phase.batch == base.round_rows(phase.batch)
    parts = phase.batch * phase.seq / phase.accumulate
    assert phase.accumulate == 1 or parts == 32_768
    assert config.schedule == replace(base.deep.schedule, warmup=phase.steps // 8)
    assert config.schedule.peak == 8e-3
    row = table(model)["head"]
    assert row.init == 0.001  # its own head, drawn as by default
    assert (model.dtype, phase.seq) == (("float32", 256) if depth <= 8 else ("bfloat16", 1_024))


def test_a_deeper_rung_costs_more_and_not_hundreds_of_times():
    spent = []
    for depth in range(1, 33):
        config = base.ladder(depth)
        spent.append(base.flops(config.model, config.phases[0]))
    ratios = [after / before for before, after in zip(spent, spent[1:], strict=False)]
    assert min(ratios) > 1
    assert max(ratios) < 30


@pytest.mark.parametrize("tokens", [1.0, 300.0, 8e4, 1e7])
def test_a_length_of_its_own_changes_batch_and_warmup(tokens):
    config = base.ladder(4, tokens, vocab=512)
    phase = config.phases[0]
    assert config.model == base.shape(4, 64, 512)
    each = phase.batch * phase.seq
    assert phase.steps >= 1
    assert base.budget(config) == pytest.approx(max(tokens, each), abs=each / 2)
    assert config.schedule.warmup == phase.steps // 8
    assert phase.batch <= base.ladder(4, 2e7, vocab=512).phases[0].batch


# --------------------------------------------------------------------------------------- the command


def test_the_command_says_in_one_line_what_it_chose(capsys):
    config, _ = train.parse([LADDER])
    assert config == replace(base.ladder(4), name="ladder")
    assert capsys.readouterr().out == (
        "ladder: depth 4: 4 layers of width 64 over 1,024 pieces, 329,280 parameters; 1,608 steps "
        "of 16 x 256 tokens (20 a parameter), 1.3e+13 FLOPs, peak rate 0.008 (--depth, --tokens, "
        "--tokens_per_param)\n")
    config, _ = train.parse([LADDER, "--depth", "12", "--schedule.peak", "4e-3"])
    assert config.model == base.rung(12)
    assert config.schedule.peak == 4e-3
    assert capsys.readouterr().out.startswith("ladder: depth 12: 12 layers of width 768 over 12,288 ")


def test_a_length_is_given_in_tokens_or_in_tokens_a_parameter():
    size = count(base.rung(3))
    by_tokens, _ = train.parse([LADDER, "--depth", "3", "--tokens", f"{5 * size}"])
    by_size, _ = train.parse([LADDER, "--depth", "3", "--tokens_per_param", "5"])
    assert by_tokens == by_size == replace(base.ladder(3, 5.0 * size), name="ladder")
    assert by_size.tokens == by_size.tokens_per_param == 0


@pytest.mark.parametrize("flags, said", [
    (["--depth", "0"], "--depth of .* is 0; allowed is an integer, 1 or more, at most 100$"),
    (["--depth", "101"], "--depth of .* is 101; allowed is an integer, 1 or more, at most 100$"),
    (["--depth", "d4"], r"--depth of .* is 'd4' \(str\); allowed is an integer, 1 or more"),
    (["--depth", "2.5"], r"--depth of .* is 2.5 \(float\); allowed is an integer"),
    (["--tokens", "-1"], "--tokens of .* is -1.0; allowed is a finite number, 0 or more$"),
    (["--tokens", "1e5", "--tokens_per_param", "2"], "tokens 100000 and tokens_per_param 2; "),
    (["--depth"], "--depth needs a value"),
])
def test_mistakes_are_one_sentence(flags, said, capsys):
    assert train.main([LADDER, *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(said, err.strip())


def test_help_says_what_a_depth_may_be(capsys):
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit):
        train.parse([LADDER, "--help"])
    line = "--depth VALUE, an integer, 1 or more, at most 100, 4 without it"
    assert line in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- the pages


def test_the_readme_s_table_is_that_of_the_ladder():
    text = (ROOT / "README.md").read_text("utf-8")
    part = text.split("## How large, how long, which rate\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| (\d.*) \|$", part)
    assert len(rows) >= 4
    for row in rows:
        depth, width, size, tokens, batch, steps, spent = row.split(" | ")
        config = base.ladder(int(depth))
        phase = config.phases[0]
        number, unit = tokens.split()
        read = float(number) * {"million": 1e6, "billion": 1e9}[unit]
        assert width == f"{config.model.embed:,}"
        assert size == f"{count(config.model):,}"
        assert read == pytest.approx(base.budget(config), rel=5e-3)
        assert batch == f"{phase.batch} x {phase.seq:,}"
        assert steps == f"{phase.steps:,}"
        assert spent == f"{base.flops(config.model, phase):.2g}"


def test_fit_says_once_what_the_dial_says(monkeypatch, capsys):
    """It reads the config twice: itself, and as the process that compiles."""
    fit = load_file(ROOT / "tools/fit.py")
    words = [LADDER, "--depth", "2", "--devices", "1"]

    def compiled(line, env, **how):
        assert capsys.readouterr().out == ""
        with monkeypatch.context() as context:
            context.setenv("COPPICE_FIT", env["COPPICE_FIT"])
            return SimpleNamespace(stderr="", returncode=fit.main(words))

    monkeypatch.setattr(fit.subprocess, "run", compiled)
    monkeypatch.setattr(fit, "here", lambda arguments, config: 0)
    assert fit.main(words) == 0
    assert capsys.readouterr().out.count("ladder: depth 2") == 1

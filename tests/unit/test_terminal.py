"""A wrong use of any command is one line."""

import pytest
from typer.testing import CliRunner

from fedcore.cli import app


def run(line):
    return CliRunner().invoke(app, line.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("privacy epsilon --nois 1", "no such option --nois (did you mean --noise?); see fedcore privacy epsilon --help"),
        ("privacy noise --target-epsilom 1", "no such option --target-epsilom (did you mean --target-epsilon?); see"),
        ("privacy epsilon --delta 1e-5", "missing option '--noise'; see fedcore privacy epsilon --help"),
        ("privacy epsilon --noise much --delta 1e-5", "invalid value for '--noise': 'much' is not a valid float; see"),
        ("privacy epsilon --noise 1 --delta", "option '--delta' requires an argument"),
        ("privacy epsilom", "no such command 'epsilom' (did you mean 'epsilon'?); see fedcore privacy --help"),
        ("privacy key", "missing argument 'FILE'; see fedcore privacy key --help"),
        ("privacy ledger here there", "got unexpected extra argument (there); see fedcore privacy ledger --help"),
        ("simulate", "missing argument 'SCENARIO.toml'; see fedcore simulate --help"),
        ("simulate a.toml --resum", "no such option --resum (did you mean --resume?); see fedcore simulate --help"),
        ("simulate a.toml --nothing-like-it", "no such option --nothing-like-it; see fedcore simulate --help"),
        ("committee keygen --ou x", "no such option --ou (did you mean --out?); see fedcore committee keygen --help"),
        ("runn", "no such command 'runn' (did you mean 'runs'?); see fedcore --help"),
        ("--verson", "no such option --verson (did you mean --version?); see fedcore --help"),
    ],
)
def test_a_wrong_or_missing_option_is_one_line_and_code_2(line, said):
    done = run(line)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("line", "code"), [("--help", 0), ("privacy epsilon --help", 0), ("", 2), ("privacy", 2)])
def test_help_stays_as_it_is(line, code):
    done = run(line)
    assert (done.exit_code, done.stderr) == (code, "")
    assert done.stdout.split()[:2] == ["Usage:", "fedcore"]
    assert "--help" in done.stdout


def test_what_commands_return_is_their_exit_code(tmp_path):
    assert run("--version").exit_code == run("privacy epsilon --help").exit_code == 0
    assert run(f"runs {tmp_path}").exit_code == 0
    assert run(f"privacy ledger {tmp_path}/none").exit_code == 2

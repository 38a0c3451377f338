import sys
import textwrap
from pathlib import Path

import pytest

from fedcore.errors import Refused
from fedcore.references import resolve


@pytest.fixture(autouse=True)
def untouched_interpreter(monkeypatch):
    """Each test leaves the modules as they were, and none may leave a path or a hook behind."""
    modules, path, hooks = dict(sys.modules), list(sys.path), list(sys.meta_path)
    yield
    assert sys.path == path
    assert sys.meta_path == hooks
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules.update(modules)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


def refusal(reference: str, folder: Path) -> str:
    with pytest.raises(Refused) as caught:
        resolve(reference, folder, "strategy.name")
    message = str(caught.value)
    assert message.startswith(f'strategy.name = "{reference}": ')
    assert "\n" not in message
    return message


def test_two_folders_have_their_own_module_of_one_name(tmp_path):
    one = write(tmp_path / "one", mine="import helper\ndef load(): return helper.NAME", helper="NAME = 'one'")
    two = write(tmp_path / "two", mine="import helper\ndef load(): return helper.NAME", helper="NAME = 'two'")
    first, second = (resolve("mine:load", folder, "data.dataset") for folder in (one, two))
    assert (first(), second()) == ("one", "two")
    assert resolve("mine:load", one, "data.dataset") is first
    assert resolve("mine:load", two, "data.dataset") is second


def test_a_neighbour_is_one_module_for_all_references_of_a_scenario(tmp_path):
    folder = write(tmp_path, model="import common\nKind = common.Kind", common="class Kind: pass")
    assert resolve("model:Kind", folder, "model.name") is resolve("common:Kind", folder, "model.name")


def test_a_neighbour_of_another_folder_is_not_seen(tmp_path):
    one = write(tmp_path / "one", mine="import neighbour_of_one", neighbour_of_one="")
    two = write(tmp_path / "two", theirs="import neighbour_of_one")
    with pytest.raises(Refused, match="has no load"):
        resolve("mine:load", one, "data.dataset")
    assert "No module named 'neighbour_of_one'" in refusal("theirs:load", two)


def test_the_folder_wins_over_an_installed_module_which_others_keep(tmp_path):
    import tomli_w as installed

    folder = write(tmp_path, tomli_w="def dumps(): return 'mine'", user="import tomli_w\ndef call(): return tomli_w.dumps()")
    assert resolve("tomli_w:dumps", folder, "data.dataset")() == "mine"
    assert resolve("user:call", folder, "data.dataset")() == "mine"
    assert sys.modules["tomli_w"] is installed
    import tomli_w

    assert tomli_w is installed


def test_only_the_named_module_wins_over_the_standard_library(tmp_path):
    import statistics

    folder = write(tmp_path, statistics="def load(): return 'mine'", other="import statistics\nmean = statistics.mean")
    assert resolve("statistics:load", folder, "data.dataset")() == "mine"
    assert resolve("other:mean", folder, "data.dataset") is statistics.mean
    assert sys.modules["statistics"] is statistics


def test_a_copy_of_fedcore_in_the_folder_is_not_used(tmp_path):
    (tmp_path / "fedcore").mkdir()
    (tmp_path / "fedcore" / "__init__.py").write_text("")
    assert resolve("fedcore.errors:Refused", tmp_path, "data.dataset") is Refused


def test_packages_and_installed_modules_resolve(tmp_path):
    write(tmp_path / "package", __init__="", inner="from . import other\nvalue = other.value", other="value = 7")
    assert resolve("package.inner:value", tmp_path, "data.dataset") == 7
    write(tmp_path / "plain_folder", module="value = 8")
    assert resolve("plain_folder.module:value", tmp_path, "data.dataset") == 8
    assert resolve("fractions:Fraction", tmp_path, "data.dataset")(1, 2) == 0.5


@pytest.mark.parametrize("reference", ["mine", ":load", "mine:", ".mine:load", "a..b:load"])
def test_a_malformed_reference_is_refused(tmp_path, reference):
    assert "must look like module:attribute" in refusal(reference, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def load(:\n    pass", "SyntaxError"),
        ("x = 1\nraise ValueError('first\\nsecond')", "ValueError: first second (mine.py, line 2)"),
        ("import not_there_at_all", "No module named 'not_there_at_all' (mine.py, line 1)"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("def laod(): pass", "has no load (did you mean laod?)"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line(tmp_path, text, expected):
    assert expected in refusal("mine:load", write(tmp_path, mine=text))


def test_a_missing_module_names_the_folder(tmp_path):
    assert refusal("absent:load", tmp_path).endswith(f"no module absent, neither in {tmp_path} nor installed")
    assert "no module mine.py" in refusal("mine.py:load", write(tmp_path, mine=""))


def test_a_module_that_failed_can_be_mended(tmp_path):
    folder = write(tmp_path, mine="import part\nraise RuntimeError(part.VALUE)", part="VALUE = 1")
    refusal("mine:load", folder)
    assert not {"mine", "part"} & set(sys.modules)
    write(folder, mine="import part\ndef load(): return part.VALUE + 1")
    assert resolve("mine:load", folder, "data.dataset")() == 2


def test_a_refusal_of_the_users_module_passes_unchanged(tmp_path):
    folder = write(tmp_path, mine="from fedcore.errors import Refused\nraise Refused('needs a licence file')")
    with pytest.raises(Refused, match=r"^needs a licence file$"):
        resolve("mine:load", folder, "data.dataset")

from pathlib import Path

import pytest

from fedcore.config import describe, load_config
from fedcore.errors import Refused

BASE = "[data]\nclients = 5\n"


def scenario(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_reading_the_resolved_configuration_gives_the_same(tmp_path):
    config = load_config(scenario(tmp_path, BASE + "[strategy]\nname = 'fedadam'\n[strategy.params]\neta = 0.3\n"))
    other = tmp_path / "resolved.toml"
    other.write_text(config.to_toml())
    assert load_config(other) == config
    assert config.run.name == "mine"
    assert config.folder == tmp_path


def test_overrides_take_toml_values_and_bare_words(tmp_path):
    path = scenario(tmp_path, BASE)
    settings = ["training.lr=1", "model.name=mlp", "model.params.hidden=[8, 4]", "quantization.enabled=false"]
    config = load_config(path, settings)
    assert config.training.lr == 1.0
    assert isinstance(config.training.lr, float)
    assert config.model.params == {"hidden": [8, 4]}
    assert not config.quantization.enabled


def test_workers_are_a_number_or_the_word_ray(tmp_path):
    path = scenario(tmp_path, "[data]\nclients = 5")
    for given, expected in (("4", 4), ("ray", "ray"), ("'ray'", "ray")):
        config = load_config(path, [f"engine.workers={given}"])
        assert config.engine.workers == expected
        resolved = tmp_path / "resolved.toml"
        resolved.write_text(config.to_toml())
        assert load_config(resolved).engine.workers == expected
    for wrong in ("-1", "1025", "Ray", "true", "1.5", "['ray']"):
        with pytest.raises(Refused, match=r"engine\.workers must be an integer >= 0 and <= 1024, or ray, got"):
            load_config(path, [f"engine.workers={wrong}"])
    with pytest.raises(Refused, match=r'engine\.workers = "ray" trains on CPUs'):
        load_config(path, ["engine.workers=ray", "engine.device=cuda"])
    with pytest.raises(Refused, match=r"cohort\.size must be an integer"):  # the word is no number elsewhere
        load_config(path, ["cohort.size=ray"])


def test_overrides_reach_the_units_of_privacy(tmp_path):
    unit = "[[privacy]]\nunit = '{}'\nnoise_multiplier = 1.0\ndelta = 1e-4\n"
    one = scenario(tmp_path, BASE + unit.format("client"))
    for name in ("privacy.delta", "privacy.client.delta"):
        assert load_config(one, [f"{name}=1e-5"]).privacy[0].delta == 1e-5
    assert load_config(scenario(tmp_path, BASE), ["privacy.unit=example", "privacy.delta=1e-5", "privacy.target_epsilon=3"]).privacy
    both = scenario(tmp_path, BASE + unit.format("client") + unit.format("example"))
    config = load_config(both, ["privacy.example.delta=1e-5"])
    assert [(one.unit, one.delta) for one in config.privacy] == [("client", 1e-4), ("example", 1e-5)]
    with pytest.raises(Refused, match="with a unit of the scenario: client, example"):
        load_config(both, ["privacy.delta=1e-5"])
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(config.to_toml())
    assert load_config(resolved).privacy == config.privacy


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[traning]\nlr = 1", ["unknown section [traning]", "did you mean training?", "allowed: run, data"]),
        ("[training]\nlearning_rate = 1", ["unknown key training.learning_rate", "[training] allows: epochs"]),
        ("[training]\nbatchsize = 1", ["did you mean batch_size?"]),
        ("[training]\nlr = '1'", ["training.lr must be a number > 0", 'got "1"']),
        ("[training]\nlr = nan", ["training.lr must be a number > 0"]),
        ("[training]\nlr = inf", ["training.lr must be a number > 0"]),
        ("[training]\nlr = 0", ["training.lr must be a number > 0, got 0"]),
        ("[training]\nmomentum = 1.0", ["<= 0.9999"]),
        ("[run]\nrounds = 0", ["run.rounds must be an integer >= 1, got 0"]),
        ("[run]\nrounds = true", ["run.rounds must be an integer >= 1, got true"]),
        ("[run]\nrounds = 2.0", ["run.rounds must be an integer"]),
        ("[model]\nname = 'cn'", ["model.name must be one of mlp, cnn", "or module:Class", "did you mean cnn?"]),
        ("[model]\nname = ':C'", ["model.name must be one of"]),
        ("[model]\ntrainable = []", ["a list of strings"]),
        ("[data]\npartition = 'dirichlt'", ["did you mean dirichlet?"]),
        ("[data]\npartition = 'iid'", ["data.clients must be >= 1"]),
        ("data = 3", ["[data] must be a table"]),
        ("[data]\nclients = 5\n[cohort]\nsize = 6", ["cohort.size = 6 is more than data.clients = 5"]),
        ("[data]\nclients = 5\n[evaluation]\nfederated_every = 1", ["needs data.holdout > 0"]),
        ("[data]\nclients = 5\n[quantization]\ncalibrate_round = 99", ["after the last round"]),
        ("[data]\nclients = 5\n[strategy.params]\nfraction_train = 0.5", ["fraction_train cannot be set", "cohort.size"]),
        ("[data]\nclients = 5\n[run]\nname = '../up'", ["run.name must be", "without slashes"]),
        ("[data]\nclients = 5\n[run]\nname = '.hidden'", ["no leading dot"]),
        ("[training]\nlr = " + "9" * 400, ["training.lr must be a number > 0"]),
        ("[run]\nseed = " + "9" * 5000, ["not valid TOML"]),
        ("[checkpoint]\nkeep = 9223372036854775808", ["<= 1000000"]),
        ("folder = 3", ["folder must be a string"]),
        ("[run", ["not valid TOML"]),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_rule(tmp_path, text, parts):
    path = scenario(tmp_path, text)
    with pytest.raises(Refused) as refusal:
        load_config(path)
    line = str(refusal.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    for part in parts:
        assert part in line


@pytest.mark.parametrize("override", ["training.lr", "lr=1", ".lr=1", "training.=1", "=1"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path, override):
    with pytest.raises(Refused, match=r"must look like section\.key=value"):
        load_config(scenario(tmp_path, BASE), [override])


def test_an_override_through_a_value_is_refused(tmp_path):
    with pytest.raises(Refused, match="run is a value"):
        load_config(scenario(tmp_path, "run = 3"), ["run.seed=1"])


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="not UTF-8"):
        load_config(binary)


def test_every_key_is_described():
    rows = list(describe())
    assert all(all(row) or row[3] == '""' for row in rows)
    assert len({row[:2] for row in rows}) == len(rows) > 30

"""A library that an app developer installed gives what ONNX Runtime gives, and only while it is what the plan's step needs."""

import dataclasses
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import fedcore_device.native
import numpy as np
import pytest
import torch
from device_worlds import examples, exported, start_of
from fedcore_device import compiled
from fedcore_device.native import Choice, Unfit, choose, opened, why_not
from fedcore_device.noise import Randomness
from fedcore_device.plan import ExamplePrivacy, TrainingPlan
from fedcore_device.step import Accumulate, read_step
from fedcore_device.trainer import Paused, Resume, Task, train
from native_installed import TARGET, edited, install, keep_compiler_cache, needs_compiler
from small_zoo import SHAPES, network
from torch import nn
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.config import DataConfig
from fedcore.data.datasets import load_dataset
from fedcore.errors import ClientFailure, Refused
from fedcore.models import ZOO
from fedcore.native import trainer
from fedcore.native.manifest import BATCHES
from fedcore.portable.checks import checked_inputs, difference, positions, sketch
from fedcore.portable.library import Library, Place
from fedcore.portable.step import portable_step
from fedcore.quantization.layers import activation_ranges, calibrate, make_quantization_aware, quantizers
from fedcore.training.local import LoopTrainer
from fedcore.training.plan import ClientData, LocalPlan, client_rng

pytestmark = needs_compiler
PLAN = TrainingPlan(epochs=2, batch_size=5, lr=0.05, momentum=0.9, weight_decay=0.01, proximal_mu=0.1)
PRIVATE = dataclasses.replace(PLAN, privacy=ExamplePrivacy(0.7, 0.8))
PLANS = {"everything": PLAN, "plain": TrainingPlan(2, 5, 0.05), "private": PRIVATE}
MODELS = [("mlp", False), ("cnn", False), ("cnn", True)]
BATCH = 5


@pytest.fixture(scope="module")
def libraries(request, tmp_path_factory):
    """Descriptions by model, of libraries in one directory."""
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    home, made = tmp_path_factory.mktemp("native"), {}

    def made_for(name, quantized=False):
        if (name, quantized) not in made:
            made[name, quantized] = install(network(name, quantized), SHAPES[name], home / f"{name}-{quantized}")
        return made[name, quantized]

    return made_for


@pytest.fixture
def copied(libraries, tmp_path):
    """The mlp's library in a directory of its own, which a test may spoil."""
    source, folder = libraries("mlp").parent, tmp_path / "installed"
    folder.mkdir()
    for name in ("trainer.json", "libtrainer.so"):
        (folder / name).write_bytes((source / name).read_bytes())
        (folder / name).chmod(0o644)
    return folder / "trainer.json"


def step_of(name, unit="", quantized=False, batch=BATCH, loss="cross_entropy"):
    return read_step(exported(name, batch, unit, quantized, loss).data)


def randomness():
    return Randomness.seeded(client_rng(1, 1, 0, 1), client_rng(1, 1, 0, 3))


def loaded(description, step, ranges=None, frozen=None):
    with opened(description) as (library, _):
        assert step.sha256 in library.steps
        return compiled.load(description, library.sha256, step.form, frozen=frozen, ranges=ranges or {})


def task_and_engine(libraries, name, quantized, own):
    step, model = step_of(name, "example" if own.privacy else "", quantized), network(name, quantized)
    ranges = activation_ranges(model)
    return Task(step, start_of(model), own, ranges=ranges), loaded(libraries(name, quantized), step, ranges)


@pytest.mark.parametrize("own", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("name", "quantized"), MODELS)
def test_a_round_is_that_of_onnx_runtime(libraries, name, quantized, own):
    x, y = examples(name, 83)
    task, engine = task_and_engine(libraries, name, quantized, own)
    found, expected = train(task, x, y, randomness(), engine=engine), train(task, x, y, randomness())
    distance = np.linalg.norm(found.update - expected.update) / np.linalg.norm(expected.update)
    assert np.abs(expected.update).max() > 1e-3
    assert (found.examples, found.steps) == (expected.examples, expected.steps)
    if quantized:  # a rounding that falls otherwise makes two rounds drift apart; see the native engine's own tests
        assert distance < 0.05
        assert found.loss == pytest.approx(expected.loss, rel=0.02)
        return
    np.testing.assert_allclose(found.update, expected.update, rtol=0, atol=1e-5)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)


def test_with_fake_quant_both_predict_alike(request, tmp_path):
    """Of a model that has learnt a little: answers from random weights hang on single roundings."""
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    data = load_dataset(DataConfig(), Path(), 0)
    x, y = data.train.x, data.train.y.astype(np.int64)
    torch.manual_seed(0)
    model = ZOO["cnn"](x.shape[1:], 10)
    client = ClientData(0, torch.from_numpy(x), torch.from_numpy(y), np.random.default_rng(0))
    (learnt,) = LoopTrainer(model).train(torch.from_numpy(start_of(model)), [client], LocalPlan(2, 16, 0.05, momentum=0.5))
    start = start_of(model) + learnt.update.numpy()
    nn.utils.vector_to_parameters(torch.from_numpy(start.copy()), model.parameters())
    calibrate(make_quantization_aware(model), [torch.from_numpy(x[:128])])
    step = read_step(portable_step(model, x.shape[1:], batch=16, unit="").data)
    ranges = activation_ranges(model)
    engine = loaded(install(model, x.shape[1:], tmp_path / "digits"), step, ranges)
    task = Task(step, start, TrainingPlan(1, 16, 0.05, momentum=0.5), ranges=ranges)
    predicted = []
    for one in (engine, None):
        update = train(task, x[:300], y[:300], randomness(), engine=one).update
        nn.utils.vector_to_parameters(torch.from_numpy(start + update), model.parameters())
        with torch.no_grad():
            predicted.append(model(torch.from_numpy(data.test.x)).argmax(1))
    assert (predicted[0] == predicted[1]).float().mean() >= 0.99
    assert len(predicted[0].unique()) == 10


@pytest.mark.parametrize(("name", "quantized"), MODELS)
def test_sums_of_clipped_gradients(libraries, name, quantized):
    step, model = step_of(name, "example", quantized), network(name, quantized)
    ranges, start, (x, y) = activation_ranges(model), start_of(model), examples(name, 80)
    onnx, native = Accumulate(step, ranges=ranges), Accumulate(step, engine=loaded(libraries(name, quantized), step, ranges))
    for rows, clip in ((np.arange(80), 0.3), (np.array([7]), 100.0), (np.array([3, 3, 9]), 1.0), (np.zeros(0, np.int64), 1.0)):
        (expected, loss), (found, own) = onnx(start, x, y, rows, clip), native(start, x, y, rows, clip)
        most = max(1.0, float(np.linalg.norm(expected)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-3 if quantized else 2e-6) * most)
        assert own == pytest.approx(loss, rel=1e-3 if quantized else 1e-5, abs=1e-6)
        assert np.linalg.norm(found) <= len(rows) * clip * (1 + 1e-4)


def test_before_calibration_activations_pass(libraries):
    model = network("cnn", True)
    for _, quantizer in quantizers(model):
        quantizer.frozen = None
    step = read_step(portable_step(model, SHAPES["cnn"], batch=BATCH, unit="").data)
    assert not step.form.quantizers
    x, y = examples("cnn", 11)
    expected, _ = Accumulate(step)(start_of(model), x, y, np.arange(11))
    found, _ = Accumulate(step, engine=loaded(libraries("cnn", True), step))(start_of(model), x, y, np.arange(11))
    rounding, _ = Accumulate(
        step_of("cnn", quantized=True), ranges=activation_ranges(network("cnn", True))
    )(start_of(model), x, y, np.arange(11))  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(rounding - expected).max() > 1e-4


def test_a_library_of_one_loss_is_never_chosen_for_a_step_of_the_other(libraries, request, tmp_path):
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    squared, usual = install(network("mlp"), SHAPES["mlp"], tmp_path / "squared", loss="squared"), libraries("mlp")
    assert Library.from_json(squared.read_text()).loss == "squared"
    assert "loss" not in json.loads(usual.read_text())
    assert Library.from_json(usual.read_text()).loss == "cross_entropy"
    x, y = examples("mlp", 83)
    for unit, own in (("", PLAN), ("example", PRIVATE)):
        steps = {path: step_of("mlp", unit, loss=loss) for path, loss in ((usual, "cross_entropy"), (squared, "squared"))}
        for path, step in steps.items():
            assert choose([usual.parent, squared.parent], step.sha256, {}).description == str(path)
            others = [one.parent for one in steps if one != path]
            assert not choose(others, step.sha256, {}).description, "ONNX Runtime trains"
        task = Task(steps[squared], start_of(network("mlp")), own)
        found = train(task, x, y, randomness(), engine=loaded(squared, steps[squared]))
        expected = train(task, x, y, randomness())
        np.testing.assert_allclose(found.update, expected.update, rtol=0, atol=1e-5)
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        usual_loss = train(dataclasses.replace(task, step=steps[usual]), x, y, randomness()).loss
        assert abs(usual_loss - expected.loss) > 0.1, "the comparison would show nothing"


def test_a_description_that_names_another_loss_than_its_code_computes_fails_its_checks(request, tmp_path):
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    squared = install(network("mlp"), SHAPES["mlp"], tmp_path / "squared", loss="squared")
    usual = install(network("mlp"), SHAPES["mlp"], tmp_path / "usual")
    right = json.loads(usual.read_text())
    edited(squared, **{name: right[name] for name in ("steps", "checks")})
    with pytest.raises(Unfit, match="of its length off"):
        loaded(squared, step_of("mlp"))


def test_frozen_layers_and_a_batch_size_of_ones_own(request, tmp_path):
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 9), nn.ReLU(), nn.Linear(9, 4))
    model[0].requires_grad_(False)
    assert 7 not in BATCHES
    description = install(model, (1, 8, 8), tmp_path / "own", batches=[7])
    frozen = torch.cat([p.detach().reshape(-1) for p in model[0].parameters()]).numpy()
    x, y = examples("mlp", 30)
    for unit, own in (("", PLAN), ("example", PRIVATE)):
        step = read_step(portable_step(model, (1, 8, 8), batch=7, unit=unit).data)
        task = Task(step, start_of(model), own, frozen=frozen)
        found = train(task, x, y, randomness(), engine=loaded(description, step, frozen=frozen))
        np.testing.assert_allclose(found.update, train(task, x, y, randomness()).update, rtol=0, atol=1e-5)
        for wrong in (None, frozen[1:], np.full_like(frozen, np.nan)):
            with pytest.raises(Refused, match="50 finite frozen parameters"):
                loaded(description, step, frozen=wrong)


def test_gradients_that_are_not_finite(libraries):
    x, y = examples("mlp", 6)
    x[2] = 3e38
    start = start_of(network("mlp"))
    losses = []
    for unit, clip in (("example", 1.0), ("", math.inf)):
        step = step_of("mlp", unit)
        for engine in (None, loaded(libraries("mlp"), step)):
            accumulate = Accumulate(step, engine=engine)
            if not unit:
                with pytest.raises(ClientFailure, match="not finite"):
                    accumulate(start, x, y, np.arange(6))
                continue
            gradient, loss = accumulate(start, x, y, np.arange(6), clip)
            rest, other = accumulate(start, x, y, np.array([0, 1, 3, 4, 5]), clip)
            np.testing.assert_allclose(gradient, rest, rtol=0, atol=2e-6)
            losses += [loss, other]
    assert losses == [pytest.approx(losses[0], abs=1e-5)] * 4


def test_an_answer_that_no_step_gives_is_the_librarys_fault(libraries):
    x, y = examples("mlp", 6)
    step, start = step_of("mlp", "example"), start_of(network("mlp"))
    engine = loaded(libraries("mlp"), step)
    private_step = engine._functions["private_step"]

    def clips_less(job):
        job.bound *= 3
        return private_step(job)

    engine._functions = {**engine._functions, "private_step": clips_less}
    with pytest.raises(Unfit, match="native library: the sum of 2 gradients has norm"):
        Accumulate(step, engine=engine)(start, x, y, np.array([1, 1]), 0.01)


def stops_after(steps):
    asked = iter(range(steps + 1))
    return lambda: next(asked) < steps


@pytest.mark.parametrize("own", [PLAN, PRIVATE], ids=["plain", "private"])
def test_a_pause_changes_no_byte_and_either_engine_goes_on(libraries, own, tmp_path):
    x, y = examples("mlp", 23)
    task, engine = task_and_engine(libraries, "mlp", False, own)
    whole = train(task, x, y, randomness(), engine=engine)
    for stop in range(whole.steps):
        for number, (first, then) in enumerate(((engine, engine), (engine, None), (None, engine))):
            resume = Resume(tmp_path / f"{number}-{stop}", every=3)
            with pytest.raises(Paused):
                train(task, x, y, randomness(), resume=resume, keep_going=stops_after(stop), engine=first)
            found = train(task, x, y, randomness(), resume=resume, engine=then)
            if first is then:
                assert found.update.tobytes() == whole.update.tobytes()
            np.testing.assert_allclose(found.update, whole.update, rtol=0, atol=1e-5)


def test_the_structure_is_that_of_the_engine():
    assert compiled.Job._fields_ == trainer.Job._fields_, "another structure is another ABI: fedcore.portable.library"


class TestSelection:
    def why(self, description, step="", **more):
        with pytest.raises(Unfit) as caught, opened(description) as (library, _):
            raise Unfit(why_not(library, step or step_of("mlp").sha256, **more))
        return str(caught.value)

    def test_the_one_that_fits_is_taken(self, copied, libraries):
        found = choose([Path("/nowhere"), libraries("cnn").parent, copied.parent], step_of("mlp").sha256, {})
        assert found.description == str(copied)
        assert str(found) == f"native library {copied}"
        above = choose([copied.parent.parent], step_of("mlp").sha256, {})
        assert above == found, "directories in it are looked through"
        assert found.sha256 == json.loads(copied.read_text())["sha256"]

    def test_every_reason_is_given(self, copied, libraries):
        found = choose([copied.parent, libraries("cnn").parent], "ab" * 32, {})
        assert found == Choice(why=found.why)
        assert str(found) == "ONNX Runtime"
        assert found.why.count("is not built for training step abababababababab") == 2
        assert choose([Path("/nowhere")], "ab" * 32, {}).why == "no native library in /nowhere"

    @pytest.mark.parametrize("change", ["batch", "quantized", "other"])
    def test_another_step(self, copied, change):
        steps = {"batch": step_of("mlp", batch=7), "quantized": step_of("mlp", quantized=True), "other": step_of("cnn")}
        assert "is not built for training step" in self.why(copied, steps[change].sha256)
        assert not choose([copied.parent], steps[change].sha256, {}).description

    def test_both_units_of_one_model(self, copied):
        assert choose([copied.parent], step_of("mlp", "example").sha256, {}).description

    def test_another_machine_or_processor(self, copied):
        assert "is built for" in self.why(copied, machine="riscv64")
        if TARGET == "x86_64":
            assert "needs a processor with avx2, fma" in self.why(copied, machine="x86_64", flags={"sse2"})

    def test_one_that_failed(self, copied):
        checksum = json.loads(copied.read_text())["sha256"]
        assert (
            choose([copied.parent], step_of("mlp").sha256, {checksum: "it failed before (x)"}).why
            == f"{copied}: it failed before (x)"
        )

    @pytest.mark.parametrize("file", ["trainer.json", "libtrainer.so", "."])
    @pytest.mark.parametrize("mode", [0o020, 0o002])
    def test_what_others_may_write(self, copied, file, mode):
        path = copied.parent / file
        path.chmod(path.stat().st_mode | mode)
        assert "may be written by others" in self.why(copied)

    def test_a_directory_above_that_others_may_write(self, copied):
        above = copied.parent.parent
        above.chmod(0o777)
        assert f"{above} may be written by others" in self.why(copied)
        above.chmod(0o1777)  # as /tmp: others cannot touch what is not theirs
        with opened(copied):
            pass

    def test_what_belongs_to_others(self, copied):
        found = list(copied.stat())
        found[stat.ST_UID] = os.geteuid() + 4711
        with pytest.raises(Unfit, match="belongs to user"):
            fedcore_device.native._guarded(copied, os.stat_result(found))

    @pytest.mark.parametrize("file", ["trainer.json", "libtrainer.so"])
    def test_links(self, copied, file, tmp_path):
        path = copied.parent / file
        path.rename(tmp_path / file)
        path.symlink_to(tmp_path / file)
        assert "cannot be opened" in self.why(copied)
        (tmp_path / file).unlink()
        assert "cannot be opened" in choose([copied.parent], step_of("mlp").sha256, {}).why

    def test_no_plain_files(self, copied):
        library = copied.parent / "libtrainer.so"
        library.unlink()
        os.mkfifo(library, 0o600)
        assert "is no file of at most" in self.why(copied)
        library.unlink()
        assert "cannot be opened (No such file" in self.why(copied)

    def test_other_bytes(self, copied):
        library = copied.parent / "libtrainer.so"
        data = bytearray(library.read_bytes())
        data[len(data) // 2] ^= 1
        library.write_bytes(data)
        assert "its SHA-256 is not the one" in self.why(copied)

    @pytest.mark.parametrize("file", ["../libtrainer.so", "/lib/libtrainer.so", "", ".."])
    def test_a_file_elsewhere(self, copied, file):
        assert any(word in self.why(edited(copied, file=file)) for word in ("must lie beside it", "no file of at most"))

    def test_descriptions_that_are_none(self, copied):
        table = json.loads(copied.read_text())
        for text in ("", "[]", "{}", "null", "[" * 100_000, copied.read_text()[:-40]):
            with pytest.raises(Refused, match="no description of a library"):
                Library.from_json(text)
        for name in table:
            with pytest.raises(Refused):
                Library.from_json(json.dumps({key: value for key, value in table.items() if key != name}))
        wrong = (
            {"abi": 2}, {"format": "x"}, {"blob": -1}, {"blob": 2**40}, {"work": 1.5}, {"bytes": True}, {"more": 1}, {"checks": []},
            {"tolerance": 0.0}, {"tolerance": math.inf}, {"steps": 5}, {"steps": [5]}, {"trained": [{"dims": [2]}]},
            {"frozen": [{"dims": [table["blob"]], "bound": 1.0, "offset": 1, "strides": [1]}]}, {"frozen": "x"},
            {"frozen": [{"dims": [2], "bound": 1.0, "offset": -1, "strides": [1]}]},
            {"checks": [{"clip": 0.0, "rounds": False, "loss": 1.0, "sketch": [1.0]}]},
        )  # fmt: skip
        for fields in wrong:
            with pytest.raises(Refused):
                Library.from_json(json.dumps(table | fields))
        assert Library.from_json(json.dumps(table)).to_json() == copied.read_text()

    def test_one_whose_answers_are_others(self, copied):
        table = json.loads(copied.read_text())
        for number, field in ((0, "loss"), (1, "sketch")):
            checks = json.loads(copied.read_text())["checks"]
            value = checks[number][field]
            checks[number][field] = 1.01 * value if field == "loss" else [-one for one in value]
            with pytest.raises(Unfit, match="of its length off"):
                loaded(edited(copied, checks=checks), step_of("mlp"))
            edited(copied, checks=table["checks"])
        assert loaded(copied, step_of("mlp"))

    def test_one_that_was_replaced_or_has_other_sizes_or_is_no_library(self, copied):
        with pytest.raises(Unfit, match="replaced meanwhile"):
            compiled.load(copied, "00" * 32, step_of("mlp").form, frozen=None, ranges={})
        with opened(copied) as (library, _), pytest.raises(Unfit, match="sizes are not those"):
            compiled.load(copied, library.sha256, step_of("cnn").form, frozen=None, ranges={})
        path = copied.parent / "libtrainer.so"
        path.write_bytes(b"\x7fELF, or so it says")
        edited(copied, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        with pytest.raises(Unfit, match="cannot be loaded"):
            loaded(copied, step_of("mlp"))

    def test_without_onnx_runtime_and_without_a_library_nothing_trains(self, copied, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert choose([copied.parent], step_of("mlp").sha256, {}).description
        with pytest.raises(Refused, match=r"the plan names training step abab.*neither ONNX Runtime nor a library") as caught:
            choose([copied.parent], "ab" * 32, {})
        assert str(copied.parent) not in str(caught.value), "the coordinator is told this line"


def test_checks_tell_gradients_apart(libraries):
    with opened(libraries("mlp")) as (library, _):
        inputs = checked_inputs(library)
    assert len(inputs.parameters) == library.parameters
    assert {check.clip > 0 for check in library.checks} == {False, True}
    check, step = library.checks[0], step_of("mlp")
    gradient, loss = Accumulate(step)(inputs.parameters, inputs.x, inputs.labels, np.arange(5))
    assert difference(check, loss, gradient) < 1e-5
    half, own = Accumulate(step)(inputs.parameters, inputs.x, inputs.labels, np.arange(4))
    assert difference(check, own, half) > 0.05
    assert difference(check, loss, gradient * np.nan) == math.inf
    assert difference(check, math.nan, gradient) == math.inf
    rng = np.random.default_rng(0)
    ratios = [np.linalg.norm(sketch(v)) / np.linalg.norm(v) for v in rng.standard_normal((50, 1000)).astype(np.float32)]
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.1)


def test_places():
    place = Place((2, 3), 1.0, 10, (100, 7))
    assert positions(place).tolist() == [10, 17, 24, 110, 117, 124]
    assert (place.size, place.last) == (6, 124)


def test_an_agent_that_chooses_a_library_loads_nothing_heavy(libraries):
    lines = (
        "import sys", "from pathlib import Path", "import fedcore_device.rounds", "from fedcore_device.native import choose",
        f"found = choose([Path({str(libraries('mlp').parent)!r})], {step_of('mlp').sha256!r}, {{}})",
        "heavy = ('numpy', 'onnxruntime', 'torch', 'fedcore.native')",
        "print(bool(found.description), [one for one in heavy if one in sys.modules])",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "True []"


def test_the_command_says_how_to_install_it(request, tmp_path):
    keep_compiler_cache(request.config.cache.mkdir("compiled"))
    command = ["native", "build", "mlp", "--input-shape", "1,8,8", "--classes", "4", "--float", "--target", TARGET]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), "--batch", "7"])
    assert done.exit_code == 0, done.output
    assert (
        f"install -D -m 644 -t /usr/lib/fedcore/native/mlp {tmp_path}/out/libtrainer.so {tmp_path}/out/trainer.json" in done.output
    )
    library = Library.from_json((tmp_path / "out" / "trainer.json").read_text())
    for unit in ("", "example"):
        assert portable_step(network("mlp"), SHAPES["mlp"], batch=7, unit=unit).sha256 in library.steps
        assert portable_step(network("mlp"), SHAPES["mlp"], batch=10, unit=unit).sha256 in library.steps
    done = CliRunner().invoke(app, [*command[:-1], "cortex-m4", "--out", str(tmp_path / "small")])
    assert "fedcore-device cannot use it: no device's agent runs on m4" in done.output
    assert not (tmp_path / "small" / "trainer.json").exists()

"""The folder of a fleet that one machine serves: keys, store, blobs, signed training steps, and the gateway beside the coordinator.

fleet/      keys of signer, coordinator, TLS authority and gateway, and fleet.trust (`gateway.deployment`)
publisher/  publisher.key, which signs training steps; it may be moved away, and what it signed be put into steps/
steps/      HASH.onnx, training steps and evaluation graphs, and HASH.sig beside each
store.sqlite, blobs/, gateway.json, gateway.log; serve.lock, which whoever serves holds
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedcore import durable
from fedcore.coordinator.assembly import Assembly
from fedcore.coordinator.rollouts import read_settings
from fedcore.errors import Refused, TryAgain
from fedcore.gateway.deployment import Fleet, make_fleet
from fedcore.gateway.enrolment import EnrolmentServer, LocalSigner
from fedcore.grids.device import Offering
from fedcore.models import layout_of
from fedcore.portable.signature import SIGNATURE, check_step_signature, sign_step
from fedcore.portable.step import PortableStep, portable_evaluation, portable_step
from fedcore.quantization.layers import calibrate
from fedcore.quantization.wire import encode_model
from fedcore.secagg.keys import new_directory, new_signing_key, read_signing_key
from fedcore.secagg.messages import TrustBundle

__all__ = ["FleetFolder", "ServedGateway", "least_uploads", "offering"]

_PUBLISHER = "publisher"
_EVALUATED = 32  # examples that a device evaluates at once
_READY = 30.0  # seconds that a gateway has to begin
# A gateway whose coordinator was killed would keep the port that the next one needs: it dies with it (PR_SET_PDEATHSIG, SIGKILL).
_PROGRAM = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
_BOUND = [sys.executable, "-c", _PROGRAM] if sys.platform == "linux" else [sys.executable]
_PAUSE = 1.0  # seconds before a gateway that ended is started again


@dataclass(frozen=True)
class FleetFolder:
    """The folder at ``directory``."""

    directory: Path

    @classmethod
    def open(cls, directory: Path, name: str, hosts: Sequence[str] = ()) -> FleetFolder:
        """The folder, made with new keys for a deployment of this ``name`` where there is none. ``hosts``: see `tls`.

        Raises:
            Refused: it cannot be made.
        """
        if not (directory / "fleet").exists():
            with new_directory(directory) as fresh:
                (fresh / _PUBLISHER).mkdir(mode=0o700)
                publisher = new_signing_key(fresh / _PUBLISHER, _PUBLISHER)
                make_fleet(fresh / "fleet", name, hosts=hosts, publisher_keys=[publisher.public])
                (fresh / "steps").mkdir()
        return cls(directory.absolute())

    @classmethod
    def existing(cls, directory: Path) -> FleetFolder:
        """The folder.

        Raises:
            Refused: there is none.
        """
        if not (directory / "fleet").exists():
            raise Refused(f"{directory} is no fleet's folder; fedcore serve makes one")
        return cls(directory.absolute())

    @property
    def fleet(self) -> Fleet:
        """Its keys."""
        return Fleet(self.directory / "fleet")

    @property
    def blobs(self) -> Path:
        """What plans name."""
        return self.directory / "blobs"

    @property
    def store(self) -> str:
        """Path or URL of the gateways' store, as it was served last.

        Raises:
            Refused: gateway.json, which says so, is damaged.
        """
        return str(read_settings(self.directory / "gateway.json").get("store") or self.directory / "store.sqlite")

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Keep others from serving the fleet: they would have its commands look into another store.

        Raises:
            TryAgain: somebody serves it already.
        """
        with (self.directory / "serve.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TryAgain(f"another fedcore serve works on {self.directory}, and a fleet has one at a time") from None
            yield

    def signer(self) -> LocalSigner:
        """The enrolment signer."""
        return self.fleet.signer()

    def pin_committee(self, bundle: TrustBundle) -> None:
        """Have devices pin a committee of secure aggregation from their enrolment on.

        Raises:
            Refused: its trust bundle is of another fleet, or devices are enrolled that pin something else.
        """
        trust, signer = self.fleet.trust(), self.fleet.signer()
        try:
            enrolled = len(signer.devices())
        finally:
            signer.close()
        if trust.committee == bundle.encode():
            return
        if (bundle.population, bundle.enrolment_key) != (trust.deployment, trust.enrolment_key):
            raise Refused(
                f"secagg.trust: the trust bundle must be made with --population {trust.deployment} and --enrol-ca "
                f"{self.fleet.directory / 'signer' / 'signing.pub'}, for the devices of this fleet"
            )
        if enrolled:
            raise Refused(f"{enrolled} devices of {self.directory} pin another committee, or none; a new one takes a new fleet")
        durable.write(self.fleet.trust_file, dataclasses.replace(trust, committee=bundle.encode()).encode())

    def signature(self, step: PortableStep[Any]) -> bytes:
        """The publisher's signature over a step or an evaluation: from steps/, or of the publisher's key where it lies here.

        Raises:
            Refused: neither; the step lies in steps/ then, to be judged and signed elsewhere.
        """
        file = self.directory / "steps" / f"{step.sha256}.onnx"
        trusted = self.fleet.trust().publisher_keys
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(step.data)
        signature = file.with_suffix(".sig")
        if not signature.exists():
            key = self.directory / _PUBLISHER / f"{_PUBLISHER}.key"
            if not key.exists():
                raise Refused(f"{file} is not signed: put the publisher's {signature.name} beside it (fedcore device sign-step)")
            signature.write_bytes(sign_step(read_signing_key(key), step.data))
        found = signature.read_bytes()[:SIGNATURE]
        check_step_signature(step.data, found, trusted)
        return found


def offering(assembly: Assembly, folder: FleetFolder) -> Offering:
    """What plans of a scenario name beside the model: the training step, the evaluation graph where devices evaluate, both
    signatures, and the frozen parameters.

    A model whose activations are rounded from a later round on has two of each; "early-step" is the one before.

    Raises:
        Refused: the model has a layer without a form for devices, or a step is not signed.
    """
    config, model = assembly.config, copy.deepcopy(assembly.model).eval()
    shape = assembly.data.dataset.train.shape
    unit, loss = "example" if assembly.protection.example else "", config.training.loss

    def export(prefix: str = "") -> dict[str, bytes]:
        cache = folder.directory / "steps" / "checked"
        graphs: dict[str, PortableStep[Any]] = {
            "step": portable_step(model, shape, batch=config.training.batch_size, unit=unit, loss=loss, cache=cache)
        }
        if config.evaluation.federated_every:
            graphs["evaluation"] = portable_evaluation(model, shape, batch=_EVALUATED, loss=loss, cache=cache)
        found = {f"{prefix}{name}": graph.data for name, graph in graphs.items()}
        return found | {f"{prefix}{name}-signature": folder.signature(graph) for name, graph in graphs.items()}

    blobs: dict[str, bytes] = {}
    if config.quantization.enabled:
        if config.quantization.calibrate_round > 1:
            blobs |= export("early-")
        examples = assembly.data.dataset.train.take(assembly.data.calibration)
        calibrate(model, torch.from_numpy(examples.x).split(256))
    blobs |= export()
    frozen = layout_of(model, trainable=False)
    if frozen.size:
        values = frozen.join({name: p.detach().numpy() for name, p in model.named_parameters() if not p.requires_grad})
        blobs["frozen"] = encode_model(frozen.wire_tensors(values))
    return Offering(blobs, config.wire.update, ("accumulate-1", f"{config.wire.update}-update"), loss)


class ServedGateway:
    """The enrolment signer, and a gateway as a process of its own that is started again when it dies; a context manager.

    Devices read releases from ``repository``, if there is one, and ask for theirs every ``release_every`` seconds.

    With ``metrics`` (HOST:PORT) the gateway tells Prometheus how it is, and the run in the directory ``run``.

    Raises:
        Refused: the address cannot be listened at, or takes TLS.
        TryAgain: the gateway does not begin.
    """

    def __init__(
        self, folder: FleetFolder, store: str, listen: str, *, hold: float = 30.0, least: float = 5.0, metrics: str = "",
        run: Path | None = None, repository: str = "", release_every: float = 1800.0,
    ) -> None:  # fmt: skip
        self._folder, self._listen = folder, listen
        self._sockets = Path(tempfile.mkdtemp(prefix="fedcore-"))  # a socket's path must be short
        self._signer = folder.signer()
        self._enrolments = EnrolmentServer(self._signer, f"unix:{self._sockets}/signer")
        self._settings = {
            "store": store or folder.store, "blobs": str(folder.blobs), "trust": str(folder.fleet.trust_file),
            "time_key": str(folder.fleet.time_key), "tls": str(folder.fleet.gateway), "signer": self._enrolments.address,
            "hold": hold, "repository": repository, "release_every": release_every,
            "pace": {"least": least}, "metrics": metrics, "run": str(run.absolute()) if run else "",
        }  # fmt: skip
        self._ending, self._stack = threading.Event(), contextlib.ExitStack()
        self.address = ""

    def __enter__(self) -> ServedGateway:
        self._enrolments.start()
        try:
            self._stack.enter_context(self._folder.served())
            self._begin()
        except BaseException:
            self._close()
            raise
        self._listen = self.address  # a port that was free once is kept
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._process.terminate()
        self._watching.join(15)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        self._enrolments.stop()
        self._signer.close()
        shutil.rmtree(self._sockets, ignore_errors=True)
        self._stack.close()

    def _begin(self) -> None:
        file, log = self._folder.directory / "gateway.json", self._folder.directory / "gateway.log"
        fresh = file.with_suffix(".new")  # other commands read the store's place in the other one: of a gateway that did begin
        durable.write(fresh, (json.dumps(self._settings | {"listen": self._listen}, indent=2) + "\n").encode())
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
                [*_BOUND, "-m", "fedcore.gateway.process", str(fresh)], stdout=subprocess.PIPE, stderr=errors,
                stdin=subprocess.DEVNULL, text=True, start_new_session=True, env=os.environ | {"GRPC_VERBOSITY": "NONE"},
            )  # fmt: skip
        late = threading.Timer(_READY, self._process.kill)
        late.start()
        with self._process.stdout or open(os.devnull) as said:  # noqa: PTH123 - never None with a pipe
            line = said.readline()
        late.cancel()
        if not line.startswith("gateway listens on "):
            self._process.wait()
            reason = (log.read_text(errors="replace").splitlines() or ["no word"])[-1]
            raise TryAgain(f"the gateway did not begin: {reason}")
        try:
            fresh.replace(file)
            durable.sync(file.parent)
        except OSError:
            self._process.kill()
            raise
        self.address = line.split()[-1]

    def _watch(self) -> None:
        """Start the gateway again whenever it ends."""
        while not self._ending.is_set():
            self._process.wait()
            while not self._ending.wait(_PAUSE):
                try:
                    self._begin()
                except (TryAgain, OSError):  # a full disk does not last for ever either
                    continue
                break


def least_uploads(goal: int) -> int:
    """Uploads that end a round well at its deadline, where nobody says otherwise: three quarters of the goal."""
    return max(1, math.ceil(0.75 * goal))

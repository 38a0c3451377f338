"""A repository in memory that speaks the real format and can lie in every way; and files that fail where a test wants them to.

The simulator is written against python-tuf alone, so that a mistake of `fedcore.registry.repository` cannot hide in it.
"""

import contextlib
import copy
import datetime
import errno
import hashlib
import os

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fedcore.registry.disk import Disk
from fedcore.registry.fetch import Reply

NOW = datetime.datetime(2031, 5, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
TOP = ("root", "targets", "snapshot", "timestamp")


class Crash(BaseException):
    """A process that dies: nothing may catch it."""


class CrashingFiles:
    """Files that die at one write: before it, or after it is done."""

    def __init__(self, files, at=None, after=False):
        self.files, self.at, self.after, self.writes = files, at, after, 0

    def read(self, name):
        return self.files.read(name)

    def names(self):
        return self.files.names()

    def held(self):
        return contextlib.nullcontext()

    def write(self, name, data):
        mine, self.writes = self.writes == self.at, self.writes + 1
        if mine and not self.after:
            raise Crash
        self.files.write(name, data)
        if mine:
            raise Crash


class FaultyDisk(Disk):
    """Dies at its n-th operation, before or after it; or has no space from then on. What was not synced is lost, or is not."""

    def __init__(self, at, how, lose=""):
        self.at, self.how, self.lose, self.count = at, how, lose, -1
        self.loose, self.renamed = set(), []

    def _step(self, do, path=None, data=None):
        self.count += 1
        if self.how == "full":
            if self.count >= self.at and data is not None:
                path.write_bytes(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        elif self.count == self.at:
            if self.how == "torn" and data is not None:
                path.write_bytes(data[: len(data) // 2])
            elif self.how == "after":
                do()
            self._die()
        do()

    def _die(self):
        if self.lose == "names":  # renames that no sync of the directory followed
            for old, new, before in reversed(self.renamed):
                new.rename(old)
                if before is not None:
                    new.write_bytes(before)
        if self.lose == "content":  # files that were not synced, wherever they were renamed to
            for path in self.loose:
                path.write_bytes(b"")
        raise Crash

    def write(self, path, data):
        self._step(lambda: (super(FaultyDisk, self).write(path, data), self.loose.add(path)), path, data)

    def sync(self, path):
        def do():
            super(FaultyDisk, self).sync(path)
            self.loose.discard(path)
            self.renamed = [one for one in self.renamed if one[1].parent != path]

        self._step(do)

    def rename(self, old, new):
        def do():
            self.renamed.append((old, new, new.read_bytes() if new.exists() else None))
            if old in self.loose:
                self.loose = self.loose - {old} | {new}
            super(FaultyDisk, self).rename(old, new)

        self._step(do)

    def remove(self, path):
        self._step(lambda: super(FaultyDisk, self).remove(path))


class FakeClock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


class Simulator:
    """Metadata as objects to be spoiled, `publish` to sign them, `files` to be spoiled after that; it is a fetcher too."""

    def __init__(self, now=NOW):
        self.now = now
        self.keys = {role: [CryptoSigner.generate_ed25519()] for role in (*TOP, "releases")}
        self.keys["root"] += [CryptoSigner.generate_ed25519() for _ in range(2)]
        self.files, self.asked, self.spoil, self.ranges = {}, [], {}, True
        self.root = Root(expires=now + 365 * DAY)
        for role in TOP:
            for key in self.keys[role]:
                self.root.add_key(key.public_key, role)
        self.root.roles["root"].threshold = 2
        role = DelegatedRole("releases", [], 1, True, paths=["releases/*/*/*/*"])
        self.targets = Targets(expires=now + 365 * DAY, delegations=Delegations({}, {"releases": role}))
        self.targets.add_key(self.keys["releases"][0].public_key, "releases")
        self.releases = Targets(expires=now + 90 * DAY)
        self.snapshot, self.timestamp = Snapshot(expires=now + 7 * DAY), Timestamp(expires=now + DAY)
        for one in (self.root, self.targets, self.releases, self.snapshot, self.timestamp):
            one.version = 0
        self.publish_root()
        self.publish()

    def sign(self, signed, role, keys=None):
        metadata = Metadata(signed)
        for key in keys or self.keys[role]:
            metadata.sign(key, append=True)
        return metadata.to_bytes()

    def publish_root(self, keys=None):
        self.root.version += 1
        self.files[f"metadata/{self.root.version}.root.json"] = self.sign(self.root, "root", keys)

    def publish(self, roles=("targets", "releases")):
        for role, signed in (("releases", self.releases), ("targets", self.targets)):
            if role in roles:
                signed.version += 1
                data = self.sign(signed, role)
                self.files[f"metadata/{signed.version}.{role}.json"] = data
                self.snapshot.meta[f"{role}.json"] = MetaFile.from_data(signed.version, data, ["sha256"])
        self.snapshot.version += 1
        data = self.sign(self.snapshot, "snapshot")
        self.files[f"metadata/{self.snapshot.version}.snapshot.json"] = data
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, data, ["sha256"])
        self.publish_timestamp()

    def publish_timestamp(self, issued=None):
        self.timestamp.version += 1
        self.timestamp.unrecognized_fields["x-fedcore-issued"] = (issued or self.now).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.files["metadata/timestamp.json"] = self.sign(self.timestamp, "timestamp")

    def add(self, path, data, role="releases", **custom):
        digest = hashlib.sha256(data).hexdigest()
        getattr(self, role).targets[path] = TargetFile(len(data), {"sha256": digest}, path, {"custom": custom})
        folder, _, name = path.rpartition("/")
        self.files[f"targets/{folder}/{digest}.{name}"] = data

    def add_artefact(self, version, data, tier="entry", runtime="onnx", model="digits", role="releases"):
        path = f"releases/{model}/{version}/{tier}/{runtime}-model.onnx"
        custom = {"kind": "artefact", "model": model, "version": version, "tier": tier, "runtime": runtime, "form": "file"}
        self.add(path, data, role, **custom)

    def copy(self):
        """Another that shares keys and nothing else."""
        keys, self.keys = self.keys, {}
        twin = copy.deepcopy(self)
        self.keys, twin.keys = keys, dict(keys)
        return twin

    @contextlib.contextmanager
    def open(self, name, offset, seconds):
        assert seconds > 0
        self.asked.append((name, offset))
        data = self.files.get(name)
        if data is None:
            yield None
            return
        start = offset if self.ranges else 0
        pieces = (
            self.spoil[name](data[start:])
            if name in self.spoil
            else [data[start:][i : i + 7000] for i in range(0, len(data), 7000)]
        )
        yield Reply(start, iter(pieces))

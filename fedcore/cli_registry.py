"""``fedcore registry``: the signed repository from which devices take releases and training steps."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedcore.terminal import clear_errors

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Keep the signed repository that devices read.")

Place = Annotated[str, typer.Argument(help="The repository: a directory, or a URL of fsspec.", metavar="REPOSITORY")]
Keys = Annotated[list[Path], typer.Option("--keys", help="A directory of private keys; may be repeated.", metavar="DIR")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(
    place: Place,
    offline: Annotated[Path, typer.Option(help="A new directory for the keys of root and targets.", metavar="DIR")],
    online: Annotated[Path, typer.Option(help="A new directory for the keys of snapshot and timestamp.", metavar="DIR")],
    roots: Annotated[int, typer.Option(help="How many root keys there are.")] = 3,
    threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 2,
    publishes: Annotated[
        bool, typer.Option("--publish-by-itself", help="Keep the key of releases online, for a coordinator with [release].")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make keys and an empty repository. Move the offline keys off this machine, each root key to another place.

    Devices pin REPOSITORY/metadata/1.root.json when they enrol. A call that was cut off is finished by the same one.
    """
    with clear_errors():
        from fedcore.registry.beginning import begin
        from fedcore.registry.files import open_files

        keys = begin(open_files(place), offline, online, roots, threshold, _now(), publishes=publishes)
        found = {role: [key.keyid for key in held.keys] for role, held in keys.items()}
        if as_json:
            print(json.dumps({"keys": found, "root": "metadata/1.root.json"}))
            return
        for role, keyids in found.items():
            for keyid in keyids:
                print(f"{role:10} {keyid}")
        print(f"{threshold} of {roots} root keys sign; {offline} belongs off this machine")
        print("devices pin metadata/1.root.json; sign anew at least daily: fedcore registry renew")


@app.command()
def renew(place: Place, keys: Keys, as_json: Json = False) -> None:
    """Sign snapshot and timestamp anew, and every other role that ends soon and whose keys are given. Run it at least daily."""
    with clear_errors():
        from fedcore.registry.files import open_files
        from fedcore.registry.keys import load_signers
        from fedcore.registry.repository import renew as sign

        roles = sign(open_files(place), load_signers(keys), _now())
        print(json.dumps({"signed": roles}) if as_json else f"signed anew: {', '.join(roles)}")


@app.command(name="rotate-keys")
def rotate_keys(
    place: Place,
    role: Annotated[str, typer.Option(help="root, targets, releases, snapshot or timestamp.")],
    keys: Keys,
    out: Annotated[
        Path, typer.Option(help="A directory for the new key; a new one, or that of a rotation to finish.", metavar="DIR")
    ],
    replace: Annotated[
        str | None, typer.Option(help="Start of the id of the key to replace; the role's only key if not given.", metavar="KEYID")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a new key in the place of one that is old, lost or stolen. It needs enough root keys; the replaced key it does not."""
    with clear_errors():
        from fedcore.registry.files import open_files
        from fedcore.registry.keys import load_signers, new_key
        from fedcore.registry.repository import full_keyid, load, rotate

        files = open_files(place)
        old = full_keyid(load(files), role, replace)
        fresh = new_key(out, role)
        rotate(files, role, old, fresh, load_signers([*keys, out]), _now())
        print(json.dumps({"role": role, "old": old, "new": fresh.keyid}) if as_json else f"{role}: {fresh.keyid} for {old}")


@app.command(name="sign-step")
def sign_step(
    place: Place,
    step: Annotated[Path, typer.Argument(help="A portable training step that you have judged.", metavar="FILE")],
    keys: Keys,
    as_json: Json = False,
) -> None:
    """Publish a training step or evaluation graph, signed by the offline targets key, if it is one that devices would accept.

    That it computes what its author says is for you to vouch for: the form, the operators and the sizes are what is checked.
    """
    with clear_errors():
        from fedcore.portable.judge import judge_file
        from fedcore.registry.catalogue import step as target
        from fedcore.registry.files import open_files
        from fedcore.registry.keys import load_signers
        from fedcore.registry.repository import publish

        item = target(step.stem, judge_file(step).data)  # HASH.onnx would be five letters too long for a name
        publish(open_files(place), [item], load_signers(keys), _now())
        print(json.dumps({"target": item.path, "bytes": len(item.data)}) if as_json else item.path)


@app.command()
def verify(place: Place, as_json: Json = False) -> None:
    """Check a repository from its files alone, for auditors: hashes, signatures, versions, ends, files that nothing names.

    One line for each finding; exit code 1 if one is a problem, not if all are warnings.
    """
    with clear_errors():
        from fedcore.registry.audit import audit
        from fedcore.registry.files import open_files

        findings = audit(open_files(place), _now())
        for one in findings:
            print(json.dumps(asdict(one)) if as_json else f"{one.kind}: {one.text}")
        if any(one.kind == "problem" for one in findings):
            raise typer.Exit(1)
        if not as_json and not findings:
            print("sound")


def _now() -> datetime:
    return datetime.now(UTC)

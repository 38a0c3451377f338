"""``fedcore native``: the compiled trainer for app developers, and where a model's training time goes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedcore.errors import Refused
from fedcore.terminal import clear_errors, new_console

if TYPE_CHECKING:
    from torch import nn

__all__ = ["native"]

native = typer.Typer(no_args_is_help=True, add_completion=False, help="The native trainer: build it for a device, explain it.")

Model = Annotated[str, typer.Argument(help="A scenario (.toml), a model of the zoo, or module:function.", metavar="MODEL")]
Shape = Annotated[
    str,
    typer.Option(help="One example: 1,28,28 or 6,64 or 20. A scenario's data say it; the zoo's have a usual one.", metavar="N,.."),
]
Classes = Annotated[int, typer.Option(help="Classes of a model that is no scenario's.", min=1)]
Loss = Annotated[str, typer.Option(help="cross_entropy or squared. A scenario says it; else cross_entropy.")]
Float = Annotated[bool, typer.Option("--float", help="Without fake quantization.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@native.command()
def build(
    model: Model,
    target: Annotated[str, typer.Option(help="x86_64, aarch64-linux, aarch64-android or cortex-m4.")],
    out: Annotated[Path, typer.Option(help="Where trainer.c, trainer.h and the library or object go.", metavar="DIR")],
    input_shape: Shape = "",
    classes: Classes = 10,
    plain: Float = False,
    loss: Loss = "",
    batch: Annotated[list[int] | None, typer.Option(help="A batch size to train with; common ones always work.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Build the trainer of a model for a device: a library (an object for a microcontroller), its header and its memory plan, and
    the description by which a device's agent finds out what it is for."""
    with clear_errors():
        from fedcore.native.deliver import deliver

        module, shape, own, kind = _model(model, input_shape, classes, loss, plain=plain)
        found = deliver(module, shape, target, out, [*own, *(batch or ())], kind)
        if as_json:
            print(json.dumps(asdict(found)))
            return
        size = f"{found.code_bytes} bytes of code, {found.parameters} parameters ({found.parameter_bytes} bytes)"
        print(f"{found.file}: {size}, for examples of {'x'.join(map(str, shape))}")
        together = f"{found.examples_together} example{'s' if found.examples_together > 1 else ''} at a time"
        print(f"memory of a training step: {found.peak_bytes} bytes, {found.workspace_bytes} of them workspace, {together}")
        if found.description:
            files, name = f"{found.file} {found.description}", Path(model).stem.replace(":", "-")
            print("on a device that runs fedcore-device, as root; it then trains with the library where plans name this model:")
            print(f"  install -D -m 644 -t /usr/lib/fedcore/native/{name} {files}")
        else:
            print(f"fedcore-device cannot use it: {found.no_description}")


@native.command()
def explain(
    model: Model, input_shape: Shape = "", classes: Classes = 10, plain: Float = False, loss: Loss = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Say what is made of a model's layers, and where the time of a training step goes on this processor.

    The share of the peak counts the operations of a plain implementation; what pooling and ReLU leave out can take it above 100 %.
    """
    with clear_errors():
        from fedcore.native.explain import explain as measure

        module, shape, _, kind = _model(model, input_shape, classes, loss, plain=plain)
        found = measure(module, shape, loss=kind)
        if as_json:
            shown = asdict(found)
            for share in shown["shares"]:
                share["peak_share"] = None if math.isnan(share["peak_share"]) else share["peak_share"]
            print(json.dumps({**shown, "seconds": found.seconds}))
            return
        table = Table(box=None)
        for name in ("layers", "channels", "operations", "time", "share of time", "share of peak"):
            table.add_column(name, justify="left" if name == "layers" else "right")
        for share in found.shares:
            peak = "" if math.isnan(share.peak_share) else f"{share.peak_share:.0%}"
            table.add_row(
                share.layers, str(share.channels), f"{share.flops:,}", f"{1e6 * share.seconds:.2f} us",
                f"{share.seconds / found.seconds:.0%}", peak,
            )  # fmt: skip
        table.add_row("copies, loss, steps, call", "", "", f"{1e6 * found.rest:.2f} us", f"{found.rest / found.seconds:.0%}", "")
        console = new_console()
        console.print(table)
        console.print(
            f"{1e6 * found.seconds:.1f} us an example on {found.processor}, one thread; a matrix product reaches {found.peak:.0f} "
            "GFLOP/s", highlight=False, soft_wrap=True,
        )  # fmt: skip


def _model(
    name: str, shape: str, classes: int, loss: str, *, plain: bool
) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...], str]:  # fmt: skip
    """The module, the shape of one example, the batch sizes that a scenario names, and the loss: ``loss``, if it is given."""
    from fedcore.config import LOSSES, ModelConfig, load_config
    from fedcore.config.sections import MODELS
    from fedcore.models import build_model

    if loss and loss not in LOSSES:
        raise Refused(f"--loss {loss!r}: must be one of {', '.join(LOSSES)}")
    if name.endswith(".toml"):
        from fedcore.coordinator.assembly import assemble

        settings = ["engine.name=loop", *(["quantization.enabled=false"] if plain else [])]
        assembly = assemble(load_config(Path(name), settings))
        training = assembly.config.training
        return assembly.model, assembly.data.dataset.train.shape, (training.batch_size,), loss or training.loss
    if not shape and name in MODELS:
        shape = "6,64" if name == "imu_cnn" else "1,28,28"
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise Refused(f"--input-shape {shape!r}: one to three numbers of at least 1 are needed, as 1,28,28")
    here = Path.cwd()
    model = build_model(ModelConfig(name), quantized=not plain, input_shape=sizes, classes=classes, seed=0, folder=here)
    return model, sizes, (), loss or LOSSES[0]

"""The ServerApp: the coordinator that also runs simulations, over the SuperNodes of a SuperLink."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedcore.coordinator.assembly import Assembly
from fedcore.coordinator.directory import next_directory
from fedcore.coordinator.run import FederatedRun
from fedcore.coordinator.secure import trusted_committee
from fedcore.coordinator.strategy import accepts_mean
from fedcore.display import follow
from fedcore.grids.secure import SecureGrid
from fedcore.grids.superlink import SuperLinkGrid
from fedcore_flower.scenario import load_scenario

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario and leave the directory that ``fedcore simulate`` would."""
    config, settings = load_scenario(context), context.run_config
    out = str(settings["out"])
    directory = Path(out) if out else next_directory(Path("runs"), config.run.name)

    def connect(assembly: Assembly) -> SuperLinkGrid | SecureGrid:
        committee = trusted_committee(assembly.config, assembly.secured) if assembly.secured else None
        clients, mean = len(assembly.data.clients), accepts_mean(assembly.strategy)
        nodes = SuperLinkGrid(grid, clients, assembly.layout, mean=mean, wait=float(settings["wait"]))
        return assembly.secured.wrap(nodes, assembly.layout, committee, config.run.name) if assembly.secured else nodes

    with FederatedRun(config, directory, connect, resume=bool(settings["resume"])) as run:
        follow(run, Console(width=200), as_json=False)
        result = run.finish()
    print(f"accuracy {result['accuracy']:.4f}, {directory.resolve() / 'report.html'}")

"""fedcore as a Flower app: its ServerApp and ClientApp, for a SuperLink and SuperNodes."""

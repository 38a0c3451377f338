"""`fedcore chaos proxy` as a process, between a device and a gateway that is none."""

import json
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fedcore.coordinator.fleet import FleetFolder
from fedcore.gateway.client import channel_to, failure_of
from fedcore.gateway.refusals import GatewayRefusal

COMMAND = [sys.executable, "-c", "from fedcore.cli import main; main()", "chaos", "proxy", "--listen", "127.0.0.1:0", "--json"]


class Proxy:
    """The command; what it says, and how it ends."""

    def __init__(self, *options):
        self.process = subprocess.Popen([*COMMAND, *map(str, options)], stdout=subprocess.PIPE, text=True)
        self.said = json.loads(self.process.stdout.readline())

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        last = json.loads(self.process.stdout.readlines()[-1])
        self.process.stdout.close()
        return self.process.wait(60), last


def test_bytes_are_harmed_as_a_seed_says_and_counted():
    received = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def sink():
            for _ in range(3):
                there, _ = server.accept()
                with there:
                    received.append(b"".join(iter(lambda there=there: there.recv(4096), b"")))

        thread = threading.Thread(target=sink)
        thread.start()
        proxy = Proxy("--to", f"127.0.0.1:{server.getsockname()[1]}", "--fault", "corrupt=1", "--seed", "7")
        assert proxy.said["event"] == "listening"
        assert proxy.said["seed"] == 7
        host, port = proxy.said["address"].split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port))) as device:
                device.sendall(b"hello gateway")
                device.shutdown(socket.SHUT_WR)
                assert device.recv(10) == b""
        thread.join(60)
    code, last = proxy.end()
    assert code == 0
    assert last["event"] == "faults"
    assert (last["corrupt"], last["connections"]) == (3, 3)
    assert all(len(one) == 13 and one != b"hello gateway" for one in received)


def test_messages_are_harmed_in_the_gateways_name(tmp_path):
    fleet = FleetFolder.open(tmp_path / "fleet", "watches")
    proxy = Proxy("--to", "127.0.0.1:1", "--fleet", fleet.directory, "--fault", "drop=1", "--seed", "1")
    import grpc

    channel = channel_to(proxy.said["address"], fleet.fleet.trust())
    for _ in range(4):
        with pytest.raises(grpc.RpcError) as lost:
            list(channel.unary_stream("/fedcore.gateway.v1.Gateway/CheckIn")(b"", timeout=60))
        assert not isinstance(failure_of(lost.value, "x"), GatewayRefusal)
    channel.close()
    assert proxy.end() == (0, {"event": "faults", "drop": 4})

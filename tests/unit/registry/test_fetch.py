"""Downloads over real sockets: ranges, absences, and servers that stop, drip or lie."""

import contextlib
import hashlib
import http.server
import itertools
import socketserver
import ssl
import threading
import time

import pytest

from fedcore.errors import Refused, TryAgain
from fedcore.registry.fetch import Deadline, DirectoryFetcher, HttpFetcher, fetch_bytes, fetch_file
from fedcore.secagg.keys import new_tls_certificate

DATA = bytes(range(256)) * 3000
DIGEST = hashlib.sha256(DATA).digest()


@contextlib.contextmanager
def serving(answer):
    """A server whose every connection is ``answer(request line and headers, write)``."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            lines = [line.decode().strip() for line in iter(self.rfile.readline, b"\r\n")]
            with contextlib.suppress(OSError):
                answer(lines, self.wfile.write)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield HttpFetcher(f"http://127.0.0.1:{server.server_address[1]}/some/where/")
        server.shutdown()


def ranged(lines, write):
    at = next((int(line.split("=")[1].rstrip("-")) for line in lines if line.lower().startswith("range:")), 0)
    head = (
        f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {at}-{len(DATA) - 1}/{len(DATA)}\r\n"
        if at
        else "HTTP/1.1 200 OK\r\n"
    )
    write(f"{head}Content-Length: {len(DATA) - at}\r\n\r\n".encode() + DATA[at:])


def test_an_ordinary_file_server_and_a_directory_give_the_same(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "ä%.bin").write_bytes(DATA)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for fetcher in (HttpFetcher(f"http://127.0.0.1:{server.server_port}"), DirectoryFetcher(tmp_path)):
            assert fetch_bytes(fetcher, "a b/ä%.bin", len(DATA), Deadline(20)) == DATA
            assert fetch_bytes(fetcher, "a b/none", 9, Deadline(20)) is None
            with pytest.raises(Refused, match="more than"):
                fetch_bytes(fetcher, "a b/ä%.bin", len(DATA) - 1, Deadline(20))
        server.shutdown()


def test_a_download_is_continued_where_it_broke(tmp_path):
    seen = []

    def breaking(lines, write):
        seen.append([line for line in lines if line.lower().startswith("range")])
        if len(seen) == 1:
            write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(DATA)}\r\n\r\n".encode() + DATA[:100_000])
        else:
            ranged(lines, write)

    with serving(breaking) as fetcher:
        with pytest.raises(TryAgain):
            fetch_file(fetcher, "x", tmp_path / "x", len(DATA), DIGEST, Deadline(20))
        assert (tmp_path / "x").stat().st_size == 100_000
        fetch_file(fetcher, "x", tmp_path / "x", len(DATA), DIGEST, Deadline(20))
    assert (tmp_path / "x").read_bytes() == DATA
    assert seen == [[], ["Range: bytes=100000-"]]


@pytest.mark.parametrize("where", ["headers", "body", "silence"])
def test_a_server_that_drips_is_cut_off(where):
    """Each byte comes well within any timeout of a single read."""
    over = threading.Event()

    def dripping(_, write):
        parts = {"headers": itertools.cycle([b"X"]), "body": itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n"], itertools.cycle([b"x"]))}
        for part in parts.get(where, ()):
            write(part)
            if over.wait(0.02):
                return
        over.wait(30)

    with serving(dripping) as fetcher, pytest.raises(TryAgain):
        fetch_bytes(fetcher, "x", 1 << 30, Deadline(0.4))
    over.set()


def test_an_endless_body_is_cut_off_at_the_limit():
    def endless(_, write):
        write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            write(b"x" * 65536)

    with serving(endless) as fetcher, pytest.raises(Refused, match="more than the 1000000 bytes"):
        fetch_bytes(fetcher, "x", 1_000_000, Deadline(20))


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"HTTP/1.1 500 No\r\n\r\n", TryAgain),
        (b"HTTP/1.1 301 Elsewhere\r\nLocation: http://evil/\r\n\r\n", TryAgain),
        (b"SSH-2.0\r\n\r\n", TryAgain),
        (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 7-9/10\r\nContent-Length: 3\r\n\r\nabc", Refused),
        (b"HTTP/1.1 206 OK\r\nContent-Range: items x\r\n\r\n", Refused),
        (b"HTTP/1.1 206 OK\r\n\r\n", Refused),
    ],
)
def test_answers_that_are_no_answer(head, error):
    with serving(lambda _, write: write(head)) as fetcher, pytest.raises(error):
        fetch_bytes(fetcher, "x", 100, Deadline(20))


def test_nobody_answers_and_wrong_addresses():
    with pytest.raises(TryAgain), HttpFetcher("http://127.0.0.1:9").open("x", 0, 5.0):
        pass
    for url in ("ftp://x/", "http:///x", "https://user@x/", "http://x/?a=b"):
        with pytest.raises(Refused, match="http"):
            HttpFetcher(url)


def test_https_with_a_pinned_certificate_and_not_with_another(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        new_tls_certificate(tmp_path / name, name, 2)
    (tmp_path / "x").write_bytes(DATA)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # the client that refuses us

    with Server(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "ours" / "tls.pem", tmp_path / "ours" / "tls.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for name in ("ours", "theirs"):
            trusted = ssl.create_default_context(cafile=str(tmp_path / name / "tls.pem"))
            trusted.check_hostname = False  # pinned, whatever its name
            fetcher = HttpFetcher(f"https://127.0.0.1:{server.server_port}", trusted)
            if name == "ours":
                assert fetch_bytes(fetcher, "x", len(DATA), Deadline(20)) == DATA
            else:
                with pytest.raises(TryAgain, match="SSLCertVerificationError"):
                    fetch_bytes(fetcher, "x", len(DATA), Deadline(20))
        server.shutdown()


def test_a_full_disk_is_said_to_be_one(tmp_path):
    """Not that the server did not answer."""
    with serving(ranged) as fetcher, pytest.raises(TryAgain, match="cannot be written"):
        fetch_file(fetcher, "x", tmp_path / "no" / "such" / "folder", len(DATA), DIGEST, Deadline(20))


def test_a_deadline_that_passed():
    deadline = Deadline(0.0, time.monotonic)
    with pytest.raises(TryAgain, match="0 s"):
        deadline.left()

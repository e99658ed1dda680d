"""Measures how long notifications of the CoAP endpoint take to a hundred observers, with and without silent ones among them.

The endpoint runs in a process of its own and announces a change every few milliseconds; the observers acknowledge.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import subprocess
import sys
import time

from benchmarks import percentiles

SERVER = """
from gevent import monkey; monkey.patch_all()
import sys, time, gevent
from gateway.coap.endpoint import CoapResponse, Code, Endpoint, Limits
rounds, interval, observers = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
def handler(request):
    return CoapResponse(code=Code.CONTENT, payload=b"%.6f" % time.time(), observable=True)
endpoint = Endpoint(("127.0.0.1", 0), handler=handler, limits=Limits(requests_per_second=1e6, request_burst=10**6))
endpoint.start()
print(endpoint.address[1], flush=True)
with gevent.Timeout(20):
    while endpoint.stats.observers < observers:
        gevent.sleep(0.05)
gevent.sleep(1)  # their addresses are proved meanwhile
for _ in range(rounds):
    endpoint.notify(("state",))
    gevent.sleep(interval)
gevent.sleep(1)
print(endpoint.stats, file=sys.stderr)
"""
STATE_BYTES = 17  # of a time in seconds and microseconds
# GET /state with Observe 0, token "ob".
REGISTRATION = b"\x42\x01\x00\x01ob\x60\x55state"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observers", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument(
        "--silent", type=int, default=1, help="how many of them never acknowledge (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=200, help="changes (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between them (default: %(default)s)")
    options = parser.parse_args()
    print(f"change -> notification received, ms; {options.observers} observers, {options.rounds} changes")
    print(f"{'silent':<8}{'received':>10}{percentiles.HEADER}")
    for silent in (0, options.silent, 0, options.silent):
        found = measure(options.observers, silent=silent, rounds=options.rounds, interval=options.interval)
        print(f"{silent:<8}{len(found):>10}{percentiles.cells(found)}")
    return 0


def measure(observers: int, *, silent: int, rounds: int, interval: float) -> list[float]:
    """Milliseconds from the moment a state was read to its arrival, of all observers that are not silent."""
    command = [sys.executable, "-c", SERVER, str(rounds), str(interval), str(observers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        selector = selectors.DefaultSelector()
        for number in range(observers):
            peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            peer.connect(("127.0.0.1", port))
            peer.send(REGISTRATION)
            selector.register(peer, selectors.EVENT_READ, number < silent)
        found = receive(selector, until=time.monotonic() + rounds * interval + 25, server=server)
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        server.terminate()
    return found


def receive(selector: selectors.BaseSelector, *, until: float, server: subprocess.Popen[str]) -> list[float]:
    found: list[float] = []
    while server.poll() is None and time.monotonic() < until:
        for key, _ in selector.select(0.2):
            datagram, now = key.fileobj.recv(2048), time.time()  # type: ignore[union-attr]
            kind, code = datagram[0] >> 4 & 3, datagram[1]
            # A silent one is where it says, for it answers pings; it only acknowledges nothing.
            if kind == 0 and (code == 0 or not key.data):
                key.fileobj.send(bytes([0x70 if code == 0 else 0x60, 0]) + datagram[2:4])  # type: ignore[union-attr]
            if kind == 0 and code and not key.data:
                found.append((now - float(datagram[-STATE_BYTES:])) * 1000)
    return found


if __name__ == "__main__":
    sys.exit(main())

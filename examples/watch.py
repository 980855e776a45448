"""Tells every process when another one has ended, whatever it is doing itself at the time.

A collective operation notices a dead peer only when it is called (and on GPUs only after its timeout). A process that
encodes its share for ten minutes, or writes a cache while the others wait, would notice that late. So each process
keeps a connection to the main one, on which nothing travels until one of them ends: it says how, or the system closes
the connection for it. No clock is involved, so a process may be slow for as long as it likes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

DONE = "done"
SETTLE = 1.0  # seconds in which a process may end by itself (Ctrl-C reaches all of them) before its watch ends it
GRACE = 2.0  # seconds from message to exit, in which a launcher sees the process that failed first as the first
CONNECT = 60.0  # seconds for the connections to be made


class Watch:
    """One on every process, made at the same time. Ends the process when another one fails or vanishes.

    Args:
        store: a ``torch.distributed`` store that all processes share.
        rank, world: of this process; how many there are.
        master: name or address of the machine of the main process, as in MASTER_ADDR.

    Raises:
        ConnectionError: a process cannot be reached.
    """

    def __init__(self, store: Any, *, rank: int, world: int, master: str) -> None:
        self.rank = rank
        self._leaving = threading.Event()
        self._peers = _accept(store, world, master) if rank == 0 else _connect(store, rank, master)
        for peer in self._peers:
            _keep_alive(peer)
        threading.Thread(target=self._listen, daemon=True, name="watch").start()

    def leave(self, words: str) -> None:
        """Says how this process ends, :data:`DONE` or the reason, to those who would otherwise think it had died."""
        self._leaving.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):  # it has ended too
                peer.sendall(words.encode()[:4096])
                peer.shutdown(socket.SHUT_WR)  # unlike close: also if a worker process holds a copy of the socket

    def _listen(self) -> None:
        said = dict.fromkeys(self._peers, b"")
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer: Any = key.fileobj
                    try:
                        data = peer.recv(4096)
                    except OSError:  # keep-alive found nobody
                        data = b""
                    said[peer] += data
                    if not data:
                        selector.unregister(peer)
                        words = said[peer].decode(errors="replace")
                        if words != DONE:
                            return self._follow(words or _vanished(self._peers[peer]))

    def _follow(self, reason: str) -> None:
        if self._leaving.wait(SETTLE):
            return
        self.leave(reason)
        print(f"rank {self.rank}: ends, because {reason}", file=sys.stderr, flush=True)
        time.sleep(GRACE)
        os._exit(1)  # not sys.exit, which would end this thread only; the main one may be held up in a collective


def _vanished(rank: int) -> str:
    return f"rank {rank} is gone without a word: it died or was killed, or its machine cannot be reached"


def _accept(store: Any, world: int, master: str) -> dict[socket.socket, int]:
    """The connections of all others to the main process, and their ranks."""
    # all interfaces, as it is not known which the others can reach; whoever does not know the token is sent away
    token = secrets.token_hex(16)
    with socket.create_server(("", 0)) as server:
        server.settimeout(CONNECT)
        store.set("watch", f"{_own_address(master)} {server.getsockname()[1]} {token}")
        peers: dict[socket.socket, int] = {}
        while len(peers) < world - 1:
            try:
                peer = server.accept()[0]
            except TimeoutError:
                missing = sorted(set(range(1, world)) - set(peers.values()))
                raise ConnectionError(f"no connection from rank {missing} within {CONNECT:.0f} s") from None
            peer.settimeout(CONNECT)
            with contextlib.suppress(OSError), peer.makefile("r", encoding="ascii", errors="replace") as file:
                said = file.readline(80).split()
                if len(said) == 2 and secrets.compare_digest(said[0].encode(), token.encode()):
                    peers[peer] = int(said[1])
            if peer in peers:
                peer.settimeout(None)
            else:
                peer.close()
    return peers


def _connect(store: Any, rank: int, master: str) -> dict[socket.socket, int]:
    """The connection to the main process."""
    address, port, token = store.get("watch").decode().split()
    errors = []
    for host in (address, master):  # where a machine's own name means 127.0.1.1 to itself, only the second is right
        try:
            peer = socket.create_connection((host, int(port)), timeout=CONNECT / 4)
            peer.sendall(f"{token} {rank}\n".encode())
        except OSError as error:
            errors.append(f"{host}:{port}: {error}")
        else:
            peer.settimeout(None)
            return {peer: 0}
    raise ConnectionError(f"rank {rank} cannot reach rank 0 ({'; '.join(errors)})")


def _own_address(master: str) -> str:
    """The address of the interface through which this machine reaches ``master``; connecting UDP sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))
        return probe.getsockname()[0]


def _keep_alive(peer: socket.socket) -> None:
    """So that a machine without power or network is noticed too, after about 20 s."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # names differ between systems; without them its defaults hold
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

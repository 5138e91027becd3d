"""Engines as processes of their own.

Lives here: how one is spawned, killed and waited for. Must not be here: when (supervisor.py), what it does (engine.py).
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping

from aneuron.remote.control import Channel, Fd, Handler, SocketChannel
from aneuron.remote.division import Share
from aneuron.remote.meeting import Meeting
from aneuron.remote.starting import command

SERVER = "aneuron.remote.server:Server"  # what serves in an engine


class Processes:
    """Starts engines as processes of their own.

    server: what serves in them, "module:attribute". meeting: what they tidy up when this process has died.
    """

    def __init__(self, server: str = SERVER, meeting: Meeting | None = None) -> None:
        self._server = server
        self._tidies = ("", "") if meeting is None else (meeting.folder, meeting.name)

    def spawn(
        self, index: int, share: Share, handlers: Mapping[str, Handler], on_lost: Callable[[Exception], None]
    ) -> "Process":
        """Start one. On the loop's thread, with which Linux ends it."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                kind = "uvloop" if type(loop).__module__.startswith("uvloop") else "asyncio"
                process = subprocess.Popen(
                    command(
                        "aneuron.remote.engine", f"aneuron engine {index}", theirs.fileno(), str(os.getpid()),
                        self._server, kind, *self._tidies,
                    ),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env=_environment(share),
                )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        return Process(process, SocketChannel(ours, loop, handlers, on_lost), index)


def _environment(share: Share) -> dict[str, str]:
    given = {**os.environ, **share.environ}
    return {name: value for name, value in given.items() if value is not None}


class Process:
    """An engine in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: Channel, index: int) -> None:
        loop = asyncio.get_running_loop()
        self.pid: int | None = process.pid
        self.channel = channel
        self.ended: asyncio.Future[str] = loop.create_future()
        self._process = process
        # It is waited for whatever becomes of the loop: a process that has ended stays as a zombie until then.
        threading.Thread(target=self._reap, args=(loop,), name=f"aneuron-engine-{index}", daemon=True).start()

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        how = how_it_ended(self._process.wait())
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._say, how)

    def _say(self, how: str) -> None:
        if not self.ended.done():
            self.ended.set_result(how)

    def connect(self) -> tuple[socket.socket, Fd]:
        """The two ends of a link to it: a client's, and what it is to be sent."""
        ours, theirs = socket.socketpair()
        return ours, Fd(theirs.detach())

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()  # nothing happens if it was waited for


def how_it_ended(status: int) -> str:
    """An exit status in words.

    >>> how_it_ended(-9), how_it_ended(3)
    ('was killed by SIGKILL', 'has ended with status 3')
    """
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
        return f"was killed by signal {-status}"
    return f"has ended with status {status}"

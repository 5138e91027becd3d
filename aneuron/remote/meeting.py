"""Where processes of one user that say the same name meet: a directory of theirs, a lock, a socket for each name.

Lives here: who may come in, who is first, what is left by processes that are gone. Must not be here: what is said there
(keeper.py), engines.
"""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from typing import Any

if sys.platform != "win32":  # where engines are refused before anybody comes here
    import fcntl

logger = logging.getLogger("aneuron")

BACKLOG = 1024
LONG = 5.0  # seconds for the lock, after which the log says so


class Meeting:
    """The place of one name. Keeps the directory open until `close()`.

    Raises `PermissionError` if the directory is not this user's alone.
    """

    def __init__(self, name: str, folder: str | None = None) -> None:
        self.folder = _folder() if folder is None else folder
        self.name = hashlib.sha256(name.encode()).hexdigest()[:32] + ".sock"  # whatever the name consists of
        self._fd = _opened(self.folder)

    @classmethod
    def at(cls, folder: str, name: str) -> "Meeting":
        """The same, by where it is."""
        meeting = cls("", folder)
        meeting.name = name
        return meeting

    def close(self) -> None:
        """Forget the directory."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def _path(self) -> str:
        """Of the socket; short, for the kernel takes 107 bytes."""
        folder = f"/proc/self/fd/{self._fd}" if sys.platform == "linux" else self.folder
        return f"{folder}/{self.name}"

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Nobody else is inside meanwhile. To be held for milliseconds, without awaiting anything."""
        waited = 0.0
        while not self._lock(fcntl.LOCK_NB):
            await asyncio.sleep(0.01)
            waited += 0.01
            if waited < LONG <= waited + 0.01:
                logger.warning("another process has locked %s for %.0f s; is it stopped?", self.folder, LONG)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def locked_now(self) -> Iterator[None]:
        """The same, for a thread that may wait."""
        self._lock(0)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _lock(self, flags: int) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | flags)
        except BlockingIOError:
            return False
        return True

    # Under the lock:

    def join(self) -> socket.socket | None:
        """A connection to who keeps the name; None if nobody does, what is left of one who did is removed then."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(LONG)
            sock.connect(self._path)
            check_peer(sock)
        except OSError as error:
            sock.close()
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise
            self.remove()
            return None
        except BaseException:
            sock.close()
            raise
        return sock

    def open(self) -> socket.socket:
        """The socket of who keeps the name from now on; whoever joins waits in its queue."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(self._path)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    def remove(self) -> None:
        """Remove the socket."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self._fd)


def tidy(folder: str, name: str) -> None:
    """Remove the socket of a keeper that has died, if nobody has its place. May wait."""
    with contextlib.suppress(OSError):
        meeting = Meeting.at(folder, name)
        try:
            while True:
                with meeting.locked_now():
                    sock = meeting.join()
                if sock is None or _greets(sock):
                    return
        finally:
            meeting.close()


def _greets(sock: socket.socket) -> bool:
    """Whether a keeper is there: of one that is dying, the socket may be open for a moment."""
    with sock:
        sock.settimeout(None)
        try:
            return bool(sock.recv(1))
        except OSError:
            return False


# The directory.


def _folder() -> str:
    """Where sockets of this user lie: in the directory that the system has for that, else among temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK) and os.stat(runtime).st_uid == os.geteuid():
        return os.path.join(os.path.abspath(runtime), "aneuron")
    return os.path.join(os.path.abspath(tempfile.gettempdir()), f"aneuron-{os.geteuid()}")


def _opened(folder: str) -> int:
    """The directory, made if it is not there. Raises `PermissionError` unless nobody else can enter it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise PermissionError(f"{folder} {_RULE}; it is a link, or no directory: remove it") from None
    found = os.fstat(fd)
    what = ""
    if found.st_uid != os.geteuid():
        what = f"it belongs to user {found.st_uid}: say another place by XDG_RUNTIME_DIR or TMPDIR"
    elif stat.S_IMODE(found.st_mode) & 0o077:
        what = f"its mode is {stat.S_IMODE(found.st_mode):04o}: chmod 700 it"
    if what:
        os.close(fd)
        raise PermissionError(f"{folder} {_RULE}; {what}")
    return fd


_RULE = f"must be a directory that only user {os.geteuid() if hasattr(os, 'geteuid') else '?'} can enter"


# The other side.


def check_peer(sock: socket.socket) -> None:
    """Raise `PermissionError` if the other side's process is another user's."""
    if sys.platform == "linux":
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid = struct.unpack("3i", data)[1]
    else:  # macOS, BSD: struct xucred
        local: Any = getattr(socket, "LOCAL_PEERCRED", 1)
        uid = struct.unpack_from("2I", sock.getsockopt(0, local, 76))[1]
    if uid != os.geteuid():
        raise PermissionError(f"the other side is a process of user {uid}, and this one is of user {os.geteuid()}")

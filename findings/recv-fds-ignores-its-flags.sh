#!/usr/bin/env bash
# `socket.recv_fds(sock, size, n, flags)` does not heed `flags`: what it receives is inherited by child processes.
# Library: Python's standard library, 3.11 to 3.13.
# Guess: with MSG_CMSG_CLOEXEC the received descriptors are closed on exec; with MSG_PEEK nothing is taken.
# Happens: `flags` is not passed on to recvmsg (and is a name that its result overwrites). The descriptors are the only
#   ones that Python makes inheritable without being asked, and a peek takes the message.
# Who meets it: servers that hand connections or shared memory to workers, and start other programs: a socket stays open
#   after its worker has closed it, and the other side waits for an end that does not come. Call `recvmsg` itself.
# Seen: recv_fds: inheritable; recvmsg: not; after a peek by recv_fds nothing is left
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

cat >"$dir/check.py" <<'PY'
import os
import socket
import struct

one, other = socket.socketpair()
socket.send_fds(one, [b"x"], [0])
_, (fd,), _, _ = socket.recv_fds(other, 10, 1, socket.MSG_CMSG_CLOEXEC)
socket.send_fds(one, [b"x"], [0])
_, [(_, _, raw)], _, _ = other.recvmsg(10, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
inheritable = os.get_inheritable(fd), os.get_inheritable(struct.unpack("i", raw)[0])
one.send(b"peeked at")
other.setblocking(False)
socket.recv_fds(other, 10, 1, socket.MSG_PEEK)
try:
    left = other.recv(10)
except BlockingIOError:
    left = b""
print("inheritable: recv_fds", inheritable[0], "recvmsg", inheritable[1], "left after a peek", left)
assert inheritable == (True, False)
assert left == b""
PY
python3 "$dir/check.py"

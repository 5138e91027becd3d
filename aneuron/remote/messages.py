"""What the bodies of frames begin with: numbers that client and engine both know.

Lives here: their layout. Must not be here: frames (frames.py), tensors (packing.py), what is done about them.
"""

import struct

CALL = struct.Struct("<Ifd")
"""Of a CALL: key of the model, timeout in seconds, and what is left of it (infinite: none). The packed terms follow
where the frame's flags say so, and then the packed inputs."""

RESULT = struct.Struct("<Q")
"""Of a RESULT: generation of the model. A TIMING follows where the frame's flags say so, then the packed output."""

TIMING = struct.Struct("<dddIIII")
"""How a call was run: queued, device, total in seconds; core, rows, padded rows, the reason's place in REASONS."""

REPORT = struct.Struct("<IIdI4x")
"""Of an engine: rows of other clients, cores in service, seconds of a core for a row (0: not known), rows that wait."""

BATCH = struct.Struct("<IIIII4x")
"""Of a BEGIN or END of an execution: number, core, rows, padded rows, the reason's place. The ids of calls and their
rows follow a BEGIN, pairs of <QI>; an END has the pickled exception, if there was one."""

REASONS = ("full", "core_idle", "delay", "signature", "drain", "rerun")

SHARED = 1  # flags of CALL and RESULT: the data lies in shared memory, and the packed value says where
TIMED = 2  # it is to be said how the call was run; it is said
WITH_TERMS = 4
PIECE = 8  # rows of a larger call: what of its output has rows is marked
OBSERVED = 16  # somebody is to be told of its executions

REFUSED = 1  # flags of an ERROR: the call was never accepted;
LEAVING = 2  # by an engine that is about to be replaced
UNLESS_BEGUN = 1  # flag of a CANCEL: if all of it executes already, its result is waited for

BEGUN = 1 << 16
"""Bytes of the board that an engine marks calls on that have begun to execute: it is left when the engine has died.
The place of a call is its id modulo this."""

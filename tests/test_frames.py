"""What goes between processes, as bytes: frames, and a stream of them in any pieces."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aneuron.remote import frames
from aneuron.remote.frames import HAS_FD, HEADER, LARGEST, Kind, Parser, ProtocolError, encode


def joined(*each):
    return bytearray().join(each)


def parsed(stream, sizes=()):
    """The frames of a stream that comes in pieces of these sizes, then in one."""
    parser, found = Parser(), []
    for size in (*sizes, len(stream)):
        piece, stream = stream[:size], stream[size:]
        found += parser.feed(bytearray(piece))
    return [(kind, flags, id, bytes(body)) for kind, flags, id, body, _ in found]


FRAMES = st.lists(
    st.tuples(st.sampled_from(Kind), st.integers(0, HAS_FD - 1), st.integers(0, 2**64 - 1), st.binary(max_size=100))
)


@given(FRAMES, st.lists(st.integers(0, 50)))
def test_frames_come_out_as_they_went_in_whatever_the_pieces(sent, sizes):
    stream = joined(*[each for kind, flags, id, body in sent for each in encode(kind, id, body, flags=flags)])
    assert parsed(stream, sizes) == sent
    assert not len(stream) % 8


def test_a_body_of_several_buffers_is_one():
    body = [b"a", bytearray(b"bcd"), memoryview(b"efghij")]
    assert parsed(joined(*encode(Kind.CALL, 7, *body))) == [(Kind.CALL, 0, 7, b"abcdefghij")]


def test_a_frame_of_many_pieces_is_joined_once(monkeypatch):
    parser, body = Parser(), bytes(range(256)) * 4096
    stream = joined(*encode(Kind.CALL, 1, body))
    for at in range(0, len(stream) - 1000, 1000):
        assert parser.feed(stream[at : at + 1000]) == []
    (frame,) = parser.feed(stream[at + 1000 :])
    assert frame.body == body


def test_bodies_are_writable_aligned_and_keep_what_they_lie_in():
    stream = joined(*[each for size in range(40) for each in encode(Kind.CALL, size, bytes(size))])
    for cut in range(0, len(stream), 8):
        parser = Parser()
        found = parser.feed(stream[:cut]) + parser.feed(stream[cut:])
        for _, _, id, body, _ in found:
            assert len(body) == id
            assert not body.readonly
            chunk = body.obj
            assert not memory_offset(chunk, body) % 8


def memory_offset(chunk, body):
    import ctypes

    begin = ctypes.addressof((ctypes.c_char * len(chunk)).from_buffer(chunk))
    return ctypes.addressof((ctypes.c_char * len(body)).from_buffer(body)) - begin if len(body) else 0


GARBAGE = [
    (16 + 4, Kind.CALL, 0, 0),  # no multiple of 8
    (8, Kind.CALL, 0, 0),
    (0, Kind.CALL, 0, 0),
    (LARGEST + 8, Kind.CALL, 0, 0),
    (2**32 - 8, Kind.CALL, 0, 0),
    (16, 0, 0, 0),
    (16, max(Kind) + 1, 0, 0),
    (16, 255, 0, 0),
    (24, Kind.CALL, 0, 8),
    (16, Kind.CALL, 0, 3),  # more padding than body
    (16, Kind.SEGMENT, HAS_FD, 0),  # no descriptor came
]


@pytest.mark.parametrize(("length", "kind", "flags", "padding"), GARBAGE)
def test_garbage_is_refused(length, kind, flags, padding):
    with pytest.raises(ProtocolError):
        Parser().feed(bytearray(HEADER.pack(length, kind, flags, padding, 0)))


@given(st.binary(min_size=16, max_size=200))
def test_anything_is_frames_or_refused(stream):
    try:
        found = Parser().feed(bytearray(stream))
    except ProtocolError:
        return
    assert sum(len(body) for _, _, _, body, _ in found) <= len(stream)


def test_no_memory_is_taken_for_what_is_only_said_to_come():
    parser = Parser()
    assert parser.feed(bytearray(HEADER.pack(LARGEST, Kind.CALL, 0, 0, 0))) == []
    assert parser.feed(bytearray(1000)) == []


def test_a_frame_too_large_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setattr(frames, "LARGEST", 64)
    assert encode(Kind.CALL, 1, bytes(48))
    with pytest.raises(ValueError, match="a frame of 65 bytes; 64 are the most"):
        encode(Kind.CALL, 1, bytes(49))


def test_descriptors_go_to_their_frames_in_order():
    parser = Parser()
    parser.fds.extend((71, 72))
    stream = joined(
        *encode(Kind.SEGMENT, 1, flags=HAS_FD), *encode(Kind.CALL, 2), *encode(Kind.SEGMENT, 3, flags=HAS_FD)
    )
    assert [(frame.id, frame.fd) for frame in parser.feed(stream)] == [(1, 71), (2, -1), (3, 72)]


def test_the_header_is_what_is_said():
    assert HEADER.size == 16
    assert joined(*encode(Kind.RESULT, 9, b"abc", flags=2)) == struct.pack("<IBBHQ", 24, 5, 2, 5, 9) + b"abc" + bytes(5)

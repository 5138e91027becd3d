cdef class Wire:
    cdef object _loop, _on_frames, _large, _link, _receiver, _packer, _unpacker, _sender
    cdef object _threads, _closed

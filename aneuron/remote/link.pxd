cdef class _Link:
    cdef object __weakref__
    cdef public object _loop, _on_frames, _on_lost, _parser, _broken
    cdef public list _fresh
    cdef public object _out
    cdef public Py_ssize_t _size
    cdef public bint _flushing, _paused, _closed
    cpdef flush(self)
    cpdef _flush_due(self)
    cpdef _join(self)
    cpdef _push(self, data, fd=*)
    cpdef _write(self)
    cpdef _feed(self, chunk)


cdef class SocketLink(_Link):
    cdef public object _sock, _space, _view
    cdef public bint _waiting
    cpdef flush(self)
    cpdef _write(self)
    cpdef _read(self)


cdef class MemoryLink(_Link):
    cdef public object _there
    cdef public bint _handing
    cpdef _write(self)

cdef class _Reply:
    cdef public object call, client, run, served
    cdef public long flags, generation, number


cdef class _Client:
    cdef public object board, wire
    cdef public dict calls
    cdef public long rows
    cdef object _server, _loop, _said
    cdef list _answers
    cdef bint _reporting, _paused, _gone

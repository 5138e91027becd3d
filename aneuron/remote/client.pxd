cdef class RemoteRun:
    cdef object __weakref__
    cdef public object dispatcher, loop, thread, clock, context, key, sizes, counters, scheduler, admission, recovery
    cdef public object futures, phase, why_closed
    cdef public object _homeless, _suspects
    cdef object _dim, _settings, _said, _leaving
    cdef list _outcomes
    cdef long _turn

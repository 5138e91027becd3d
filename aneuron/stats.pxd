cdef class Tally:
    cdef tuple _bounds, _sorted
    cdef list _pending
    cpdef add(self, double value)
    cpdef add_all(self, list values)


cdef class Recent:
    cdef object _ring, _seen
    cdef public double at
    cpdef add(self, double value, double at)
    cpdef bint is_stale(self, double now)
    cpdef _sort(self)


cdef class ServiceTimes:
    cdef public tuple _line
    cdef public long _learnt, _drawn
    cdef public dict shapes
    cdef public tuple last
    cpdef executed(self, tuple shape, double seconds, double now)
    cpdef learn(self, tuple shape, double seconds, double now)
    cpdef double service(self, tuple shape, double now)


cdef class CoreCounters:
    cdef public object core_id, global_id, state, owner
    cdef public ServiceTimes times
    cdef public long errors
    cdef tuple _executed
    cpdef executed(self, long rows, long padded, double seconds)


cdef class Counters:
    cdef public long accepted, completed, failed, cancelled, refused
    cdef public dict closed_because, cores
    cdef public Tally batch_rows, queue_seconds, device_seconds, total_seconds, loop_lag_seconds
    cdef public object _drained
    cpdef drained(self, long rows, double now)
    cpdef relaxed(self)

cdef class Tally:
    cdef tuple _bounds
    cdef list _counts
    cdef double _sum
    cpdef add(self, double value)
    cpdef add_all(self, list values)


cdef class Recent:
    cdef object _ring, _seen
    cdef public double at
    cpdef add(self, double value, double at)
    cpdef bint is_stale(self, double now)
    cpdef _sort(self)


cdef class ServiceTimes:
    cdef public dict shapes
    cdef public tuple last
    cpdef executed(self, tuple shape, double seconds, double now)
    cpdef learn(self, tuple shape, double seconds, double now)
    cpdef double service(self, tuple shape, double now)

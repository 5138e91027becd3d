cdef class Cover:
    cdef readonly list sizes
    cdef readonly long limit
    cdef dict _samples, _times, _last, _cost, _patience
    cdef double _spent
    cdef double _most
    cdef set _due, _covering
    cdef readonly list _table  # tests look at it
    cpdef long pick(self, long rows, bint at_once=*)
    cpdef long fit(self, long rows)

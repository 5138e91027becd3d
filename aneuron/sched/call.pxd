cdef class Call:
    cdef public double admitted, deadline
    cdef public long bound, bucket, rows, sequence, version
    cdef public bint settled
    cdef public object cut, future, leaves, limit, origin, pads, parts, signature, since, structure, template, terms, timer, trace

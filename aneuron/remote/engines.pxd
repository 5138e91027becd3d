cdef class Flight:
    cdef public object run, call, died, engine
    cdef public long start, stop, number


cdef class Engine:
    cdef public object index, wire, incarnation, connecting, told, standing, suspect, board, statistics, pool, observed
    cdef public dict flights
    cdef public bint draining
    cdef public long rows, others, waiting

from aneuron.sched.shares cimport Shares
from aneuron.sched.slots cimport Slots


cdef class Bound:
    cdef public object queue
    cdef public list in_flight, staged, given_up
    cdef public double since


cdef class Board:
    cdef public object lock
    cdef public Shares shares
    cdef public Slots slots
    cdef public list lanes
    cdef public bint stopped
    cpdef bind(self, double now)
    cpdef begin(self, long lane, execution)
    cpdef bint end(self, long lane, execution, double now)
    cpdef next(self, long lane, double now)

cimport cython

from aneuron.engine.execution cimport Execution
from aneuron.sched.filling cimport Batch
from aneuron.sched.shares cimport Decision, Shares
from aneuron.sched.slots cimport Slots


cdef class Bound:
    cdef public object queue
    cdef public list in_flight, staged, given_up
    cdef public double since, busy_until


cdef class Board:
    cdef public object lock
    cdef public Shares shares
    cdef public Slots slots
    cdef public list lanes
    cdef public bint stopped
    @cython.locals(decision=Decision)
    cpdef Decision bind(self, double now)
    @cython.locals(bound=Bound)
    cpdef begin(self, long lane, Execution execution, bint waits)
    @cython.locals(bound=Bound)
    cpdef bint end(self, long lane, Execution execution, double now) except -1
    @cython.locals(seconds=double)
    cpdef _charge(self, Bound bound, Execution execution, double ended)
    @cython.locals(bound=Bound, batch=Batch)
    cpdef next(self, long lane, double now)

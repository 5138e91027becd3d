cimport cython

from aneuron.engine.execution cimport Execution
from aneuron.engine.lane cimport Lane
from aneuron.engine.modes cimport Aside


cdef class Submission:
    cdef public object on_loop, output, error
    cdef public Execution execution
    cdef object _host, _first
    cpdef done(self, output, error)
    cpdef bint drop(self) except -1


cdef class OnLoop:
    cdef public bint inline
    cdef Lane _lane
    cdef object _workers, _host, _context, _clock
    cdef Aside _aside
    cpdef wake(self)
    @cython.locals(execution=Execution, understood=cython.bint)
    cpdef completed(self, Submission submission)
    @cython.locals(after=Execution, over=cython.bint)
    cpdef _ended(self, Execution execution)
    @cython.locals(execution=Execution, until=double)
    cpdef _go_on(self, Execution ended)
    cpdef bint _begin(self, Execution execution) except -1
    cpdef bint _hand_over(self, Execution execution) except -1

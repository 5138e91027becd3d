cimport cython

from aneuron.engine.board cimport Board, Bound
from aneuron.engine.execution cimport Execution


cdef class Lane:
    cdef public long index
    cdef public object core_id, workers, turn, on_loop
    cdef public bint gone
    cdef public double ended
    cdef Board _board
    cdef object _host, _clock, _preparing
    cdef long _slots
    cdef bint _staging, _concurrent
    @cython.locals(board=Board, execution=Execution, now=double, waited_for=cython.bint, full=cython.bint, asks=cython.bint)
    cpdef Execution take(self, Execution ended)
    cpdef bint copied(self, long size, double preparing, double now) except -1

from aneuron.engine.board cimport Board
from aneuron.engine.execution cimport Execution


cdef class Lane:
    cdef public long index
    cdef public object core_id, workers, turn
    cdef public bint gone
    cdef Board _board
    cdef object _host, _clock, _preparing
    cdef long _slots
    cdef bint _staging, _concurrent
    cpdef Execution take(self, Execution ended)
    cpdef bint copied(self, long size, double preparing, double now) except -1

cimport cython

from aneuron.sched.filling cimport Batch


cdef class Slots:
    cdef public object due
    cdef public bint staging, timed
    cdef public list slots, ends, bound, _lead
    cdef public dict idle
    cpdef release(self, long lane, double now, Batch batch=*)
    cpdef bint has_slot(self, long lane) except -1
    cpdef occupy(self, long lane, Batch batch, double now)
    @cython.locals(bound=dict)
    cpdef unbind(self, long lane, Batch batch)
    cpdef bint is_too_early(self, long lane, double now) except -1

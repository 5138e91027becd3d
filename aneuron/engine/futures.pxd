cimport cython

from aneuron.sched.call cimport Call
from aneuron.stats cimport Counters


cdef class Futures:
    cdef public set calls
    cdef object _loop, _clock, _discard, _guard, _drained
    cdef Counters _counters
    cpdef accept(self, Call call, double now)
    @cython.locals(call=Call, seconds=list)
    cpdef end(self, outcomes, bint failed=*, now=*)
    cpdef withdraw(self, Call call)
    cpdef _forget(self, Call call)

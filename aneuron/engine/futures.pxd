from aneuron.sched.call cimport Call


cdef class Futures:
    cdef public set calls
    cdef object _loop, _clock, _counters, _discard, _guard, _drained
    cpdef accept(self, Call call, double now)
    cpdef end(self, outcomes, bint failed=*, now=*)
    cpdef withdraw(self, Call call)
    cpdef _forget(self, Call call)

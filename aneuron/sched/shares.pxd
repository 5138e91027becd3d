cimport cython

from aneuron.sched.filling cimport Batch
from aneuron.sched.scheduler cimport Scheduler
from aneuron.sched.slots cimport Slots


cdef class Decision:
    cdef public object batches, due, late


cdef class Account:
    cdef public object model
    cdef public double weight, tag, busy
    cdef public long turn


cdef class Share:
    cdef public Account account
    cdef public Scheduler scheduler
    cdef public bint waits


cdef class Shares:
    cdef public Slots slots
    cdef public list shares
    cdef double _time
    cdef long _turns
    @cython.locals(share=Share)
    cpdef Decision bind(self, double now)
    @cython.locals(share=Share, batch=Batch)
    cpdef Batch pull(self, long lane, double now)
    @cython.locals(share=Share)
    cpdef took(self, Batch batch, double seconds)
    @cython.locals(share=Share)
    cpdef bint tells(self) except -1
    @cython.locals(share=Share)
    cpdef bint has_work(self) except -1
    cpdef bint wants_calls(self) except -1
    @cython.locals(share=Share)
    cpdef _flush(self)
    @cython.locals(account=Account, other=Share)
    cpdef _charge(self, Share share, Batch batch, passed)

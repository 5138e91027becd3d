cimport cython

from aneuron.engine.board cimport Board
from aneuron.engine.dispatcher cimport Dispatcher
from aneuron.engine.futures cimport Futures
from aneuron.sched.call cimport Call
from aneuron.sched.scheduler cimport Scheduler
from aneuron.stats cimport Counters, Recent


cdef class Admission:
    cdef public object phase, why_closed
    cdef public bint down, traced
    cdef Dispatcher _dispatcher
    cdef Board _board
    cdef Scheduler _scheduler
    cdef Futures _futures
    cdef Counters _counters
    cdef Recent _late_by
    cdef object _clock, _recovery
    cdef bint _watched
    cpdef admit(self, Call call, timeout=*)
    cpdef _check_open(self)
    cpdef ended(self, double late_by, double expected, double now)

cimport cython

from aneuron.engine.admission cimport Admission
from aneuron.engine.dispatcher cimport Dispatcher
from aneuron.engine.execution cimport Execution
from aneuron.engine.futures cimport Futures
from aneuron.engine.loading cimport Loaded
from aneuron.sched.call cimport Call
from aneuron.sched.filling cimport Batch
from aneuron.sched.scheduler cimport Scheduler
from aneuron.stats cimport Counters


cdef class Settling:
    cdef Dispatcher _dispatcher
    cdef Scheduler _scheduler
    cdef object _sizes, _recovery
    cdef bint _several
    cdef Counters _counters
    cdef Futures _futures
    cdef Admission _admission
    @cython.locals(batch=Batch)
    cpdef settle(self, Execution execution, double now)
    @cython.locals(counters=Counters, batch=Batch, call=Call, rows=long, padded=long, started=double, ended=double, service=double)
    cpdef _count(self, Execution execution, Loaded loaded, double now)
    cpdef relax(self)

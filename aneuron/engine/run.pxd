cimport cython

from aneuron.engine.board cimport Board
from aneuron.engine.dispatcher cimport Dispatcher
from aneuron.engine.execution cimport Common, Execution
from aneuron.engine.futures cimport Futures
from aneuron.engine.loading cimport Loaded
from aneuron.sched.call cimport Call
from aneuron.sched.filling cimport Batch
from aneuron.sched.scheduler cimport Scheduler
from aneuron.stats cimport Counters, Recent


cdef class Run:
    cdef public Dispatcher dispatcher
    cdef public object loop, thread, clock, phase, why_closed, sizes, context, closed, recovery
    cdef public double weight
    cdef public Counters counters
    cdef public Scheduler scheduler
    cdef public Board _board
    cdef public Common _common
    cdef public Futures futures
    cdef public object _load
    cdef public dict _times
    cdef public bint _down, _traced, _watched, _beside
    cdef public str _end
    cdef public Recent _late_by
    cdef public list loaded
    cdef public set _open
    cpdef admit(self, Call call, timeout=*)
    @cython.locals(made=Execution)
    cpdef Execution execution(self, Batch batch, long lane)
    @cython.locals(batch=Batch)
    cpdef settle(self, Execution execution, double now)
    @cython.locals(counters=Counters, batch=Batch, call=Call, rows=long, padded=long, started=double, ended=double, service=double)
    cpdef _count(self, Execution execution, Loaded loaded, double now)
    cpdef relax(self)

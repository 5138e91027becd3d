cimport cython

from aneuron.engine.admission cimport Admission
from aneuron.engine.board cimport Board
from aneuron.engine.dispatcher cimport Dispatcher
from aneuron.engine.execution cimport Common, Execution
from aneuron.engine.futures cimport Futures
from aneuron.sched.filling cimport Batch
from aneuron.sched.scheduler cimport Scheduler
from aneuron.stats cimport Counters


cdef class Run:
    cdef public Dispatcher dispatcher
    cdef public object loop, thread, clock, sizes, context, recovery, cores, settling
    cdef public double weight
    cdef public Counters counters
    cdef public Scheduler scheduler
    cdef public Board _board
    cdef public Common _common
    cdef public Futures futures
    cdef public object _load
    cdef public dict _times
    cdef public Admission admission
    cdef public bint _beside
    cdef public list loaded
    @cython.locals(made=Execution)
    cpdef Execution execution(self, Batch batch, long lane)

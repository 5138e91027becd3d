cimport cython

from aneuron.engine.board cimport Board
from aneuron.engine.execution cimport Execution
from aneuron.sched.shares cimport Decision


cdef class Dispatcher:
    cdef object __weakref__
    cdef public object changed, answer, loop, thread, backend, traits, core_ids, context, num_workers, clock
    cdef public Board board
    cdef public list runs, lanes
    cdef public long slots, coming
    cdef public bint forked, stopped, held, handing, _scheduled, _posted, _completing
    cdef public object _timer, _done, _completed, _own_context
    cpdef call_came(self)
    cpdef dispatch_soon(self)
    @cython.locals(decision=Decision, now=double)
    cpdef dispatch(self)
    cpdef completed(self, submission)
    cpdef post(self, Execution execution)
    @cython.locals(execution=Execution, now=double, runs=list)
    cpdef hand_out(self)
    cpdef took(self, Execution execution, double now)
    cpdef execution(self, batch, lane)

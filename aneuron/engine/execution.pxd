cimport cython

from aneuron.engine.loading cimport Loaded
from aneuron.sched.call cimport Call
from aneuron.sched.filling cimport Batch


cdef class Common:
    cdef public object backend, begins, unpad, evidence, sizes, guard, post, context, trials
    cdef public long dim, least


cdef class Execution:
    cdef public Batch batch
    cdef public Loaded loaded
    cdef public Common common
    cdef public object chunks, size, prepared, output, lane, watch, error, fault, finished, submission
    cdef public long rows, copied
    cdef public bint begun, over, failed, abandoned, may_be_stolen
    cdef public double started, ended, posted, since, preparing
    cdef object _cut, _inputs, _template
    @cython.locals(begin=double)
    cpdef prepare(self, clock)
    @cython.locals(call=Call)
    cpdef bint begin(self, clock) except -1
    cpdef execute(self, clock)
    @cython.locals(common=Common, size=long)
    cpdef finish(self, clock)
    @cython.locals(size=long, dim=long)
    cpdef _collate(self)
    cpdef _run(self, args, kwargs, clock)
    cpdef submit(self, submission)
    cpdef bint take_result(self, output, error, clock) except -1
    cpdef let_go(self, clock)
    cpdef _end(self, clock)
    @cython.locals(common=Common, call=Call)
    cpdef bint _is_plain(self) except -1

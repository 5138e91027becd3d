from aneuron.sched.filling cimport Batch


cdef class Execution:
    cdef public Batch batch
    cdef public object chunks, size, loaded, common, prepared, output, lane, watch, error, fault, finished
    cdef public long rows, copied
    cdef public bint begun, over, failed, abandoned, may_be_stolen
    cdef public double started, ended, posted, since, preparing
    cdef object _cut, _inputs, _template

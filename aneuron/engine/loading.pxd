from aneuron.stats cimport CoreCounters, ServiceTimes


cdef class Loaded:
    cdef public long index
    cdef public object core_id, run, workers
    cdef public CoreCounters counters
    cdef public ServiceTimes times
    cdef public bint out, closed, loading, hung, warming, concurrent, submits
    cdef public dict kinds, _cores
    cdef public tuple outputs
    cdef object _backend, _clock
    cpdef core(self, size, long bucket)

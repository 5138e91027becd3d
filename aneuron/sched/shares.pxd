from aneuron.sched.filling cimport Batch
from aneuron.sched.scheduler cimport Scheduler
from aneuron.sched.slots cimport Slots


cdef class Share:
    cdef public Scheduler scheduler
    cdef public double weight, tag, busy
    cdef public bint waits


cdef class Shares:
    cdef public Slots slots
    cdef public list shares
    cdef double _time
    cpdef bind(self, double now)
    cpdef Batch pull(self, long lane, double now)
    cpdef took(self, Batch batch, double seconds)
    cpdef _flush(self)
    cpdef _charge(self, Share share, Batch batch)

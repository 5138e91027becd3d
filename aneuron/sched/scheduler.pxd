from aneuron.sched.fair_queue cimport FairQueue
from aneuron.sched.filling cimport Batch
from aneuron.sched.flows cimport Flow, Kind
from aneuron.sched.slots cimport Slots


cdef class Scheduler:
    cdef public object rules, run
    cdef public bint draining
    cdef public Slots slots
    cdef public set out
    cdef public object arrivals, due
    cdef public list late
    cdef public double slack
    cdef public object _estimate
    cdef public FairQueue _queue
    cdef public object _delay, _sizes, _room, outside, _again
    cdef public list _buckets
    cdef public long _preferred
    cpdef flush(self)
    cpdef admit(self, calls)
    cpdef tuple bind(self, double now)
    cpdef tuple bind_at_once(self, double now)
    cpdef Batch pull(self, long lane, double now)
    cpdef Batch _form(self, long lane, bint busy, double now)
    cpdef Batch _take(self, Flow head, Kind kind, long lane, bint busy, double now)
    cpdef long _shape(self, long bucket, long rows)
    cpdef long _limit(self, long bucket)
    cpdef str _reason(self, Kind kind)


cpdef long rounded(long rows)

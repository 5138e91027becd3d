cimport cython

from aneuron.sched.call cimport Call
from aneuron.sched.fair_queue cimport FairQueue
from aneuron.sched.filling cimport Batch, Filling
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
    cdef public object _cost, _grouping, unit
    cdef public long _preferred
    cpdef bint has_work(self) except -1
    cpdef flush(self)
    cpdef admit(self, calls)
    @cython.locals(slots=Slots, batch=Batch)
    cpdef tuple bind(self, double now, bint contended=*)
    @cython.locals(first=Call, call=Call, rows=long, size=long, batch=Batch)
    cpdef tuple bind_at_once(self, double now)
    @cython.locals(slots=Slots, bound=long, batch=Batch)
    cpdef Batch pull(self, long lane, double now, bint contended=*)
    @cython.locals(head=Flow, kind=Kind, other=Flow, batch=Batch, call=Call)
    cpdef Batch _form(self, long lane, bint busy, double now, bint contended)
    @cython.locals(
        filling=Filling, size=long, shape=long, rows=long, waiting=long, bucket=long, shorter=Kind, flow=Flow,
        expected=double, group=list
    )
    cpdef Batch _take(self, Flow head, Kind kind, long lane, bint busy, double now)
    cpdef long _limit(self, long bucket)
    cpdef str _reason(self, Kind kind)


cpdef long rounded(long rows)

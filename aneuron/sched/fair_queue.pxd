from aneuron.sched.call cimport Call
from aneuron.sched.flows cimport Flow, Kind, Level


cdef class FairQueue:
    cdef public long rows, fresh, live
    cdef public tuple loads
    cdef public dict kinds
    cdef public dict _levels
    cdef public list _urgent
    cdef public set _dirty
    cdef public long _sequence, _flows, _sweep_at
    cpdef push(self, calls, limit)
    cpdef Flow _flow(self, Call call, limit)
    cpdef long _standing(self, Call call, Kind kind)
    cpdef _come(self, Flow flow, long calls, long rows, long fresh)
    cpdef _load(self, Flow flow, long rows, long calls)
    cpdef _list(self, Flow flow)
    cpdef taken(self, Flow flow, long rows, long fresh, long finished)
    cpdef charge(self, Flow flow, double rows)
    cpdef _left(self, Flow flow, long rows, long fresh, long finished)
    cpdef cut(self, Flow flow)
    cpdef started(self, Flow flow, Call call, double now)
    cpdef Flow head(self)
    cpdef bint has_full(self)
    cpdef Level level(self)

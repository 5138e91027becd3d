cimport cython

from aneuron.sched.call cimport Call
from aneuron.sched.flows cimport Flow, Kind, Level, Line, Load, Stake, Tenant


cdef class FairQueue:
    cdef public long rows, work, fresh, live
    cdef public object _unit
    cdef public tuple loads
    cdef public dict kinds
    cdef public dict _levels
    cdef public list _urgent
    cdef public set _dirty
    cdef public long _sequence, _flows, _sweep_at
    @cython.locals(call=Call, flow=Flow, most=long, count=long, rows=long)
    cpdef push(self, calls, limit)
    @cython.locals(kind=Kind, flow=Flow)
    cpdef Flow _flow(self, Call call, limit)
    cpdef long _standing(self, Call call, Kind kind)
    @cython.locals(stake=Stake, twin=Flow, line=Line, tenant=Tenant, work=long)
    cpdef _come(self, Flow flow, long calls, long rows, long fresh)
    @cython.locals(load=Load)
    cpdef _load(self, Flow flow, long work, long calls)
    @cython.locals(line=Line, tenant=Tenant)
    cpdef _list(self, Flow flow)
    cpdef taken(self, Flow flow, long rows, long fresh, long finished)
    @cython.locals(tag=double)
    cpdef charge(self, Flow flow, double rows)
    @cython.locals(stake=Stake, twin=Flow, work=long)
    cpdef _left(self, Flow flow, long rows, long fresh, long finished)
    cpdef cut(self, Flow flow)
    @cython.locals(level=Level, limit=long, left=long, kind=Kind, large=Flow)
    cpdef started(self, Flow flow, Call call, double now)
    @cython.locals(level=Level)
    cpdef Flow head(self)
    @cython.locals(head=Flow)
    cpdef bint has_full(self) except -1
    @cython.locals(level=Level)
    cpdef Level level(self)

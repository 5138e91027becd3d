cimport cython

from aneuron.sched.call cimport Call


cdef class Tenant:
    cdef public double tag
    cdef public long live
    cdef public bint listed
    cdef public list heap
    @cython.locals(flow=Flow, call=Call)
    cpdef Flow first(self)


cdef class Line:
    cdef public bint second
    cdef public long present, live
    cdef public list heap
    cdef public dict tenants
    cdef public double time
    cdef public object begun
    @cython.locals(flow=Flow, call=Call, tenant=Tenant, due=Flow)
    cpdef Flow first(self)


cdef class Level:
    cdef public double priority
    cdef public tuple lines
    cdef public long starts
    cdef public object key
    @cython.locals(line=Line, other=Line)
    cpdef Line turn(self)


cdef class Stake:
    cdef public Load load
    cdef public long work


cdef class Load:
    cdef public bint yields
    cdef public long work, large, turns, tenants
    cdef public dict stakes


cdef class Flow:
    cdef public object calls
    cdef public long live, standing
    cdef public bint special, listed, filed
    cdef public Kind kind
    cdef public Level level
    cdef public Line line
    cdef public Tenant tenant
    cdef public Stake stake
    cdef public list heap
    cdef public tuple twins
    @cython.locals(call=Call)
    cpdef Call first(self)


cdef class Kind:
    cdef public object signature
    cdef public long bucket, limit, rows, unit
    cdef public bint anywhere
    cdef public dict flows
    cdef public Flow usual
    cdef dict _heaps
    cdef list _priorities


@cython.locals(flow=Flow, call=Call)
cpdef Flow first(list heap)

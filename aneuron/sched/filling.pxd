cimport cython

from aneuron.sched.call cimport Call
from aneuron.sched.fair_queue cimport FairQueue
from aneuron.sched.flows cimport Flow, Kind


cdef class Batch:
    cdef public list chunks
    cdef public long rows, bucket
    cdef public str reason
    cdef public object size
    cdef public double expected, due
    cdef public object retry, scheduler


cdef class Filling:
    cdef public FairQueue _queue
    cdef public list chunks, shares, late
    cdef public object end, horizon
    cdef public bint full, one_piece
    cdef public long limit, room
    cdef public double pace
    cpdef take(self, Flow head, Kind kind)
    cpdef bint _is_late(self, Call call) except -1
    @cython.locals(flow=Flow, call=Call, room=long, had=long, fresh=long, finished=long, start=long, stop=long, tag=double)
    cpdef _take_rows(self, list heap, Flow leader)

cimport cython

from aneuron.engine.run cimport Run
from aneuron.sched.call cimport Call


cdef class Calls:
    cdef public object observer
    cdef object _life, _settings, _dim, _buckets, _example, _lengths, _known, _checked
    cdef bint _warned_of_list

cdef class Modes:
    cdef object _autocast, _cache, _dtype
    cdef long _depth
    cpdef note(self)
    cpdef restore(self)


cdef class Aside:
    cdef Modes _modes
    cdef object _stack
    cdef bint _grad
    cpdef begin(self)
    cpdef end(self)

cimport cython


cdef class Parser:
    cdef public object fds
    cdef list _pieces
    cdef Py_ssize_t _have, _need
    @cython.locals(frames=list, at="Py_ssize_t", end="Py_ssize_t", length="Py_ssize_t", kind="long", flags="long",
                   padding="long", fd="long")
    cpdef list feed(self, chunk)

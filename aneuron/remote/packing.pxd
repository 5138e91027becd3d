cdef class Packed:
    cdef object _template
    cdef bytes _codes, _body
    cdef readonly object leaves
    cdef readonly Py_ssize_t nbytes
    cpdef list inline(self)
    cpdef list placed(self, block)
    cpdef write(self, block)


cdef class Packer:
    cdef object _send, _what, _dropped, _passed
    cdef public object _templates, _objects
    cdef object _numbers
    cpdef Packed pack(self, value)


cdef class Unpacker:
    cdef object _memory
    cdef readonly dict _templates, _objects
    cpdef on_template(self, frame)
    cpdef open(self, body)

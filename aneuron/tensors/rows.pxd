cimport cython

from aneuron.sched.call cimport Call


@cython.locals(call=Call)
cpdef gather(chunks)

@cython.locals(call=Call)
cpdef check_unmodified(chunks, inputs, template)

@cython.locals(call=Call)
cpdef _spread(output, chunks, guard, cut=*)

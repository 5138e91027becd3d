# cython: language_level=3, wraparound=False, cdivision=True
"""Rows copied natively: small ones, without giving the interpreter's lock up.

Lives here: copying.py's functions for what is plain: dense tensors of the host, of torch's own class and of ordinary
numbers, whose rows lie one after the other. For anything else each of them answers None (or False), and has done
nothing. Must not be here: any other way to copy, what is copied where (rows.py).

Tensors are read and made by the functions in C that torch offers by DLPack (`__dlpack_c_exchange_api__`, in torch 2.10
and later): neither torch nor NumPy is compiled against, and one build serves all versions. Each tensor made here has its
memory behind a header of its own; torch frees it, in whatever thread, with the tensor's storage.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memmove, memset

import torch

from aneuron.sched.call cimport Call


cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>

    /* DLPack 1, as its header lays it out: https://dmlc.github.io/dlpack/latest/c_api.html */
    typedef struct { uint32_t major, minor; } DLPackVersion;
    typedef struct { int32_t device_type, device_id; } DLDevice;
    typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;
    typedef struct {
        void *data;
        DLDevice device;
        int32_t ndim;
        DLDataType dtype;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } DLTensor;
    typedef struct DLManagedTensorVersioned {
        DLPackVersion version;
        void *manager_ctx;
        void (*deleter)(struct DLManagedTensorVersioned *self);
        uint64_t flags;
        DLTensor dl_tensor;
    } DLManagedTensorVersioned;
    typedef struct {
        DLPackVersion version;
        void *prev_api;
        void *managed_tensor_allocator;
        void *managed_tensor_from_py_object_no_sync;
        int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out);
        int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out);
        void *current_work_stream;
    } DLPackExchangeAPI;

    static void aneuron_free(DLManagedTensorVersioned *self) { free(self); }
    """
    ctypedef struct DLPackVersion:
        uint32_t major, minor
    ctypedef struct DLDevice:
        int32_t device_type, device_id
    ctypedef struct DLDataType:
        uint8_t code, bits
        uint16_t lanes
    ctypedef struct DLTensor:
        void *data
        DLDevice device
        int32_t ndim
        DLDataType dtype
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset
    ctypedef struct DLManagedTensorVersioned:
        DLPackVersion version
        void *manager_ctx
        void (*deleter)(DLManagedTensorVersioned *) noexcept nogil
        uint64_t flags
        DLTensor dl_tensor
    ctypedef struct DLPackExchangeAPI:
        DLPackVersion version
        int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *, void **) except -1
        int (*dltensor_from_py_object_no_sync)(void *, DLTensor *) except -1
    void aneuron_free(DLManagedTensorVersioned *) noexcept nogil


cdef enum:
    HOST = 1  # kDLCPU
    ALIGNMENT = 64  # bytes: that of torch's own tensors
    # Kinds of numbers.
    FLOAT = 2  # and before it signed and unsigned integers
    BFLOAT = 4  # and then complex, bool, and the kinds of eight bits
    FLOAT8_LAST = 14


cdef object Tensor = torch.Tensor
cdef object _metadata = torch._C._get_tensor_metadata  # of a conjugate or negative view; empty for others
cdef DLPackExchangeAPI *api = <DLPackExchangeAPI *>PyCapsule_GetPointer(
    torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api"
)
if api.version.major != 1 or api.dltensor_from_py_object_no_sync == NULL:
    raise ImportError(f"torch speaks DLPack {api.version.major}.{api.version.minor}, not 1")

# More bytes than these are copied by torch, which lets others have the interpreter meanwhile: 10 to 25 us, for which an
# execution has it anyway. From here on torch is no slower, beside busy threads either.
cdef int64_t most = 1 << 18


cdef struct Plain:
    DLTensor like
    char *data
    int64_t row  # bytes


cdef bint look(object leaf, Plain *plain) noexcept:
    """Whether a tensor is plain, and where its rows are."""
    cdef DLTensor *seen = &plain.like
    cdef int64_t size
    cdef int axis
    cdef uint8_t code
    if type(leaf) is not Tensor:
        return False
    try:
        api.dltensor_from_py_object_no_sync(<PyObject *>leaf, seen)
        if _metadata(leaf):  # its numbers lie there with another sign; to ask `is_neg` would give up the lock
            return False
    except BaseException:  # it has no memory, or numbers that DLPack does not know
        return False
    code = seen.dtype.code
    if (
        seen.device.device_type != HOST
        or seen.data == NULL
        or not seen.ndim
        or seen.dtype.lanes != 1
        or seen.dtype.bits & 7
        or not (code <= FLOAT or BFLOAT <= code <= FLOAT8_LAST)
    ):
        return False
    size = seen.dtype.bits >> 3
    plain.row = size
    cdef int64_t expected = 1
    for axis in range(seen.ndim - 1, -1, -1):
        if seen.shape[axis] != 1 and seen.strides != NULL and seen.strides[axis] != expected:
            return False
        expected *= seen.shape[axis]
        if axis:
            plain.row *= seen.shape[axis]
    if not expected:
        return False
    plain.data = <char *>seen.data + seen.byte_offset
    return True


cdef inline bint alike(DLTensor *one, DLTensor *other, int at) noexcept:
    """Whether two tensors differ in the number of their rows at most, and along the dimension `at`."""
    cdef int axis
    if one.ndim != other.ndim or one.dtype.code != other.dtype.code or one.dtype.bits != other.dtype.bits:
        return False
    for axis in range(1, one.ndim):
        if axis != at and one.shape[axis] != other.shape[axis]:
            return False
    return True


cdef DLManagedTensorVersioned *allocate(Plain *plain, int64_t rows, int at=0, int64_t length=0) except NULL:
    """Memory for so many rows, with a header that describes them; of this length along `at`, unless that is 0."""
    cdef int32_t ndim = plain.like.ndim
    cdef size_t header = sizeof(DLManagedTensorVersioned) + 2 * ndim * sizeof(int64_t)
    cdef int64_t row = plain.row // plain.like.shape[at] * length if at else plain.row
    cdef DLManagedTensorVersioned *made = <DLManagedTensorVersioned *>malloc(header + ALIGNMENT + rows * row)
    if made == NULL:
        raise MemoryError(f"no memory for {rows} rows of {row} bytes")
    made.version.major, made.version.minor = 1, 0
    made.manager_ctx, made.deleter, made.flags = NULL, aneuron_free, 0
    cdef DLTensor *tensor = &made.dl_tensor
    tensor.data = <void *>((<uintptr_t>made + header + ALIGNMENT - 1) & ~<uintptr_t>(ALIGNMENT - 1))
    tensor.device, tensor.ndim, tensor.dtype, tensor.byte_offset = plain.like.device, ndim, plain.like.dtype, 0
    tensor.shape = <int64_t *>(made + 1)
    tensor.strides = tensor.shape + ndim
    cdef int64_t stride = 1
    cdef int axis
    for axis in range(ndim - 1, -1, -1):
        tensor.shape[axis] = (length if axis == at else plain.like.shape[axis]) if axis else rows
        tensor.strides[axis] = stride
        stride *= tensor.shape[axis]
    return made


cdef struct Lines:
    # What lies together in a row, from the dimension with the length on.
    int64_t number  # in a row
    int64_t inner  # bytes for each step along it


cdef inline Lines lines(Plain *plain, int at) noexcept:
    cdef Lines found
    cdef int axis
    found.number = 1
    for axis in range(1, at):
        found.number *= plain.like.shape[axis]
    found.inner = plain.row // found.number // (plain.like.shape[at] if at else 1)
    return found


cdef void copy_lines(
    char *target, char *source, int64_t number, int64_t wanted, int64_t had, char *pad, int64_t item
) noexcept nogil:
    """Copy so many lines from where they have `had` bytes to where they have `wanted`, padded or cut."""
    cdef int64_t line, byte
    if wanted == had:
        memcpy(target, source, number * had)
        return
    for line in range(number):
        memcpy(target, source, min(wanted, had))
        byte = had
        while byte < wanted:
            memcpy(target + byte, pad, item)
            byte += item
        target += wanted
        source += had


cdef object as_tensor(DLManagedTensorVersioned *made):
    """A tensor of what was allocated, which it owns from now on."""
    cdef void *tensor = NULL
    api.managed_tensor_to_py_object_no_sync(made, &tensor)
    cdef object owned = <object>tensor
    Py_DECREF(owned)
    return owned


def join(chunks, inputs, Py_ssize_t index, int64_t size, int at=0, int64_t length=0, pad=None):
    """The chunks' rows of the input `index`, one after the other; the last one is repeated up to `size` rows.

    With `at` they are padded along that dimension to this length, with the number that `pad` is a tensor of.
    """
    cdef Plain leaf, padding
    cdef Lines row
    cdef DLManagedTensorVersioned *made = NULL
    cdef char *end = NULL
    cdef int64_t start, stop, wide = 0, rows = 0
    cdef Py_ssize_t place
    cdef tuple chunk
    padding.data, padding.row = NULL, 1
    row.number, row.inner = 1, 0
    if at and not look(pad, &padding):
        return None
    for place in range(len(chunks)):
        chunk = chunks[place]
        start, stop = chunk[1], chunk[2]
        if (
            not look(inputs[place][index], &leaf)
            or not 0 <= start < stop <= leaf.like.shape[0]
            or (made != NULL and not alike(&made.dl_tensor, &leaf.like, at))
            or (at and (at >= leaf.like.ndim or leaf.like.shape[at] > length))
        ):
            break
        if made == NULL:
            row = lines(&leaf, at)
            wide = row.number * row.inner * length if at else leaf.row
            if size * wide > most or (at and padding.like.dtype.bits != leaf.like.dtype.bits):
                return None
            made = allocate(&leaf, size, at, length)
            end = <char *>made.dl_tensor.data
        rows += stop - start
        if rows > size:
            break
        copy_lines(
            end,
            leaf.data + start * leaf.row,
            (stop - start) * row.number,
            row.inner * length if at else leaf.row // row.number,
            leaf.row // row.number,
            padding.data,
            padding.row,
        )
        end += (stop - start) * wide
    else:
        if made == NULL:
            return None
        for rows in range(rows, size):
            memcpy(end, end - wide, wide)
            end += wide
        return as_tensor(made)
    if made != NULL:
        aneuron_free(made)
    return None


def split(leaf, chunks, int64_t size, int at=0):
    """The rows of each chunk in storage of their own; None for a chunk that is a part of its call only.

    With `at` they are cut along that dimension to the length of their call.
    """
    cdef Plain whole
    cdef Lines row
    cdef DLManagedTensorVersioned *made
    cdef int64_t start = 0, length = 0, rows, had
    cdef tuple chunk
    if not look(leaf, &whole) or whole.like.shape[0] != size or size * whole.row > most or at >= whole.like.ndim:
        return None
    row = lines(&whole, at)
    had = whole.row // row.number
    cdef list copies = []
    cdef Call call
    for chunk in chunks:
        call = chunk[0]
        rows = <int64_t>chunk[2] - <int64_t>chunk[1]
        if rows < 1 or start + rows > size:
            return None
        if rows == call.rows:
            if at:
                length = call.pads.length if call.bucket else 0
                if not 0 < length <= whole.like.shape[at]:
                    return None
            made = allocate(&whole, rows, at, length)
            copy_lines(
                <char *>made.dl_tensor.data,
                whole.data + start * whole.row,
                rows * row.number,
                row.inner * length if at else had,
                had,
                NULL,
                1,
            )
            copies.append(as_tensor(made))
        else:
            copies.append(None)
        start += rows
    return copies


def deal(leaf, chunks, int64_t size):
    """The calls of chunks that are whole, each with its rows in storage of its own; None if the tensor is not plain."""
    cdef list copies = split(leaf, chunks, size)
    cdef Py_ssize_t place
    if copies is None:
        return None
    return [(chunks[place][0], copies[place]) for place in range(len(copies)) if copies[place] is not None]


def room(leaf, int64_t rows):
    """A tensor like another one with so many rows, not written yet."""
    cdef Plain like
    if not look(leaf, &like) or rows < 1 or rows * like.row > most:
        return None
    return as_tensor(allocate(&like, rows))


def place(whole, int64_t at, leaf, int64_t start, int64_t stop):
    """Copy rows `start` to `stop` of a tensor over those of another one from row `at` on. Whether that was done."""
    cdef Plain target, source
    cdef int64_t rows = stop - start
    if (
        not look(whole, &target)
        or not look(leaf, &source)
        or not alike(&target.like, &source.like, 0)
        or not 0 <= start < stop <= source.like.shape[0]
        or not 0 <= at <= target.like.shape[0] - rows
        or rows * source.row > most
    ):
        return False
    memmove(target.data + at * target.row, source.data + start * source.row, rows * source.row)
    return True


# A lone tensor on its way to another process, as remote/packing.py lays it out: little-endian numbers of eight bytes, the
# first of them the template, the last ones the shape; between them what it is, by the number of its dtype.
cdef enum:
    HEAD = 24  # bytes before the shape
cdef DLDataType[256] kinds  # by that number; of no bits for those that DLPack takes for others


def number(like, int code):
    """Call the dtype of a tensor so in packed ones; whether that can be done."""
    cdef Plain plain
    if not look(like, &plain) or as_tensor(allocate(&plain, 1)).dtype is not like.dtype:
        return False
    kinds[code] = plain.like.dtype
    return True


def packed(leaf, uint64_t template, int code, int64_t limit):
    """A plain tensor of the dtype of this number as bytes; None for others, and for those of more bytes than the limit."""
    cdef Plain whole
    cdef int ndim
    if not look(leaf, &whole) or whole.like.shape[0] * whole.row > limit:
        return None
    ndim = whole.like.ndim
    if ndim > 255:
        return None
    cdef int64_t size = whole.like.shape[0] * whole.row
    cdef bytes made = PyBytes_FromStringAndSize(NULL, HEAD + 8 * ndim + size)
    cdef char *to = PyBytes_AS_STRING(made)
    memset(to, 0, HEAD)
    (<uint64_t *>to)[0] = template
    (<uint32_t *>to)[2] = 1
    to[16] = <char>code
    to[17] = <char>ndim
    memcpy(to + HEAD, whole.like.shape, 8 * ndim)
    memcpy(to + HEAD + 8 * ndim, whole.data, size)
    return made


def unpacked(body):
    """The tensor of such bytes, in memory of its own; None for what this module does not make."""
    cdef Py_buffer view
    cdef Plain plain
    cdef DLManagedTensorVersioned *made = NULL
    cdef int ndim, axis
    PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
    cdef char *at = <char *>view.buf
    try:
        if view.len <= HEAD:
            return None
        ndim = <unsigned char>at[17]
        plain.like.dtype = kinds[<unsigned char>at[16]]
        if not plain.like.dtype.bits or not 0 < ndim <= (view.len - HEAD) // 8:
            return None
        plain.like.device.device_type, plain.like.device.device_id = HOST, 0
        plain.like.ndim, plain.like.shape = ndim, <int64_t *>(at + HEAD)
        plain.row = plain.like.dtype.bits >> 3
        for axis in range(1, ndim):
            if not 0 < plain.like.shape[axis] <= view.len:
                return None
            plain.row *= plain.like.shape[axis]
            if plain.row > view.len:
                return None
        if not 0 < plain.like.shape[0] <= view.len or plain.like.shape[0] * plain.row > view.len - HEAD - 8 * ndim:
            return None
        made = allocate(&plain, plain.like.shape[0])
        memcpy(made.dl_tensor.data, at + HEAD + 8 * ndim, plain.like.shape[0] * plain.row)
        return as_tensor(made)
    finally:
        PyBuffer_Release(&view)


def fits(leaf, int64_t size):
    """Whether something is a plain tensor of so many rows, -1 for any number."""
    cdef Plain whole
    return look(leaf, &whole) and (size < 0 or whole.like.shape[0] == size)


def unmodified(chunks, inputs):
    """Whether the tensors of all calls are as often written to as these have noted; False where it is not known."""
    cdef Py_ssize_t place
    cdef int64_t version
    cdef Call call
    for place in range(len(chunks)):
        call = chunks[place][0]
        version = call.version
        for leaf in inputs[place]:
            if type(leaf) is not Tensor:
                return False
            try:
                version -= leaf._version
            except RuntimeError:  # made under inference mode: nothing is counted
                return False
        if version:
            return False
    return True

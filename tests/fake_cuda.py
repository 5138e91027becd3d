"""A double of `torch.cuda` as far as the backend uses it, on a machine without a GPU.

A tensor on device i has the class `On[i]`, which its results inherit; one on two devices, or on a device and on the
host, is refused like by PyTorch. What PyTorch does later is done later here: a copy to the host that does not block
leaves rubbish until an event, or the stream, has been waited for; one from pinned memory looks then whether anybody has
written there meanwhile. An event that is asked says only the second time that it is over. Not doubled: contexts made by
anything else than what is listed in `touched`, time, the GIL.
"""

import contextlib
import threading
from collections import namedtuple

import doubles.compiled  # noqa: F401  # it keeps the real torch.jit.load, which is patched here
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

Kernel = namedtuple("Kernel", "device stream thread")
Copy = namedtuple("Copy", "way pinned stream nbytes")


class Device(torch.Tensor):
    index = -1

    @property
    def is_cuda(self):
        return True

    @property
    def device(self):
        return torch.device("cuda", self.index)


On = [type(f"On{index}", (Device,), {"index": index}) for index in range(4)]


class Stream:
    def __init__(self, fake, device):
        self.fake, self.device = fake, torch.device(device)
        self.pending = []
        fake.touched.add(self.device.index)

    def synchronize(self):
        self.fake.log.append("stream")
        self.end()

    def end(self):
        if self.fake.poison is not None:
            raise self.fake.poison
        with torch.inference_mode():  # as the device, which asks nobody whether it may write
            while self.pending:
                self.pending.pop(0)()


class Event:
    def __init__(self, fake, blocking):
        self.fake, self.blocking, self.stream = fake, blocking, None

    def record(self, stream):
        self.stream, self.seen, self.asked = stream, len(stream.pending), 0

    def synchronize(self):
        assert self.stream is not None, "waits for an event that was never recorded"
        assert self.seen == len(self.stream.pending), "the stream was given more since"
        self.fake.log.append("event" if self.blocking else "spin")
        self.stream.end()

    def query(self):
        assert self.stream is not None, "asks for an event that was never recorded"
        assert self.seen == len(self.stream.pending), "the stream was given more since"
        self.fake.log.append("query")
        self.asked += 1
        if self.fake.poison is None and (self.asked <= self.fake.lag or self.fake.hangs):
            return False
        self.stream.end()
        return True


class FakeCuda:
    """Stands in for `torch.cuda` until the test ends. `kernels` and `copies` are what was run on the devices."""

    def __init__(self, monkeypatch, devices):
        self.devices, self.forked, self.poison = devices, False, None
        self.lag, self.hangs = 1, False  # how often an event says that it is not over; whether it never is
        self.kernels, self.copies, self.log, self.loaded, self.touched = [], [], [], [], set()
        self._pinned, self._resident = {}, {}  # storages, by address
        self._local = threading.local()
        self._load = torch.jit.load
        self._defaults = {}
        double = {
            "device_count": lambda: self.devices,
            "_is_in_bad_fork": lambda: self.forked,
            "Stream": lambda device: Stream(self, device),
            "Event": lambda blocking=False: Event(self, blocking),
            "current_stream": self._current,
            "stream": self._on_stream,
            "device": self._on_device,
        }
        for name, value in double.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.jit, "load", self._load_script)

    # Where a thread is.

    def _device(self):
        return getattr(self._local, "device", 0)

    def _current(self, device=None):
        index = self._device() if device is None else torch.device(device).index
        own = getattr(self._local, "streams", {}).get(index)
        if own is None and index not in self._defaults:
            self._defaults[index] = Stream(self, f"cuda:{index}")
        return own or self._defaults[index]

    @contextlib.contextmanager
    def _on_device(self, device):
        before, self._local.device = self._device(), torch.device(device).index
        try:
            with self._watching():
                yield
        finally:
            self._local.device = before

    @contextlib.contextmanager
    def _on_stream(self, stream):
        streams = self._local.__dict__.setdefault("streams", {})
        device, before, index = self._device(), streams.get(stream.device.index), stream.device.index
        streams[index], self._local.device = stream, index
        try:
            with self._watching():
                yield
        finally:
            streams[index], self._local.device = before, device
            self.touched.add(device)  # setting a stream sets its device, which makes a context there

    @contextlib.contextmanager
    def _watching(self):
        if getattr(self._local, "watched", False):
            yield
            return
        self._local.watched = True
        try:
            with Watch(self):
                yield
        finally:
            self._local.watched = False

    # What is done there.

    def pin(self, tensor):
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._pinned

    def upload(self, tensor, device, non_blocking):
        stream = self._current(device)
        pinned = self.is_pinned(tensor)
        self.copies.append(Copy("in", pinned, stream, tensor.nbytes))
        self.touched.add(device.index)
        there = tensor.detach().clone()
        self._resident[there.data_ptr()] = (there, device.index)
        if pinned and non_blocking:
            before = tensor.clone()

            def unchanged():
                assert torch.equal(tensor, before), "pinned memory was written to while it was being copied"

            stream.pending.append(unchanged)
        return there.as_subclass(On[device.index])

    def download(self, there, host=None, non_blocking=False):
        plain = there.as_subclass(torch.Tensor)
        stream = self._current(there.device)
        if host is None:
            host = torch.empty_like(plain)
        self.copies.append(Copy("out", self.is_pinned(host), stream, plain.nbytes))
        if not non_blocking:
            stream.end()
            return host.copy_(plain)
        assert self.is_pinned(host), "a copy that does not block needs pinned memory"
        unresolved = plain.is_conj() or plain.is_neg()
        assert not unresolved, "PyTorch would resolve on the host what has not come yet"
        host.view(torch.uint8).fill_(0xAB)
        stream.pending.append(lambda: host.copy_(plain))
        return host

    def run(self, tensors):
        """Note a kernel; refuse tensors of several devices."""
        index = next(tensor.index for tensor in tensors if isinstance(tensor, Device))
        for tensor in tensors:
            _, there = self._resident.get(tensor.data_ptr(), (None, getattr(tensor, "index", -1)))
            if there != index and tensor.ndim:
                raise RuntimeError(f"Expected all tensors to be on the same device, cuda:{index} and {tensor.device}")
        self.kernels.append(Kernel(index, self._current(f"cuda:{index}"), threading.get_ident()))

    def _load_script(self, file, map_location):
        self.loaded.append(map_location)
        return Script(self._load(file, map_location="cpu"), map_location.index)


class Script(torch.nn.Module):
    """A ScriptModule on a device."""

    def __init__(self, real, index):
        super().__init__()
        self.real, self.index = real, index

    def forward(self, *args):
        assert all(type(x) is On[self.index] for x in args)
        with torch._C.DisableTorchFunction():
            return self.real(*[x.as_subclass(torch.Tensor) for x in args]).as_subclass(On[self.index])


NO_KERNEL = ("__get__", "__set__", "as_subclass", "_has_compatible_shallow_copy_type")


class Watch(TorchFunctionMode):
    """Sees every function of torch that its thread calls."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if name == "to" and isinstance(first, FakeTensor):
            return first  # what torch knows of a tensor that is not there
        if name == "to" and isinstance(args[1], str) and args[1].startswith("cuda"):
            args = (first, torch.device(args[1]), *args[2:])  # as torch's pass for exported programs says it
        if name == "to" and any(isinstance(x, torch.device) and x.type == "cuda" for x in args):
            device = next(x for x in args if isinstance(x, torch.device))
            blocks = not (kwargs.get("non_blocking") or any(x is True for x in args))
            return self.fake.upload(first, device, not blocks)
        if name == "pin_memory":
            return self.fake.pin(first.clone())
        if name == "empty" and kwargs.pop("pin_memory", False):
            return self.fake.pin(func(*args, **kwargs))
        if name == "cpu" and isinstance(first, Device):
            return self.fake.download(first)
        if name == "copy_" and isinstance(args[1], Device) and not isinstance(first, Device):
            return self.fake.download(args[1], first, kwargs.get("non_blocking", False))
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, Device) for x in tensors) and name not in NO_KERNEL:
            self.fake.run(tensors)
        return func(*args, **kwargs)

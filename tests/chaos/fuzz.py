"""Bytes for whatever parses bytes or strings, guided by coverage: `python tests/chaos/fuzz.py -max_total_time=60`.

Each target either gives an answer of its type or raises the one error that its contract names; anything else is found.
Needs atheris (`pip install atheris`). Options are libFuzzer's.
"""

import os
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["aneuron.backends"]):
    from aneuron.backends import parse_device_ids
    from aneuron.backends.neuron import cores, faults, placement

with atheris.instrument_imports(include=["aneuron.web.deadlines"]):
    from aneuron.web.deadlines import MalformedTimeout, deadline

from aneuron.errors import DeviceError

FOLDER = tempfile.mkdtemp(prefix="aneuron-fuzz")
MODEL, CONFIG = os.path.join(FOLDER, "model.pt"), os.path.join(FOLDER, "config.json")


def device_ids(data):
    try:
        (each,) = parse_device_ids([data.ConsumeUnicodeNoSurrogates(64)])
        assert each.number >= 0
    except DeviceError:
        pass


def visible_cores(data):
    try:
        found = cores.parse_cores(data.ConsumeUnicodeNoSurrogates(64))
        assert list(found) == sorted(set(found))
    except DeviceError:
        pass


def environment(data):
    names = [cores.VISIBLE, cores.NUMBER]
    environ = {name: data.ConsumeUnicodeNoSurrogates(24) for name in names if data.ConsumeBool()}
    try:
        cores.asked(environ)
        number = cores.global_id(data.ConsumeIntInRange(0, 64), environ)
        assert number is None or number >= 0
    except DeviceError:
        pass


def config(data):
    with open(CONFIG, "wb") as file:
        file.write(data.ConsumeBytes(data.remaining_bytes()))
    rows = placement.compiled_rows(MODEL)
    assert rows is None or rows >= 1


def script(data):
    with open(MODEL, "wb") as file:
        file.write(data.ConsumeBytes(data.remaining_bytes()))
    assert placement.is_neuron(MODEL) in (True, False)


def status(data):
    text = data.ConsumeUnicode(200)
    assert faults.status(text) is None or faults.status(text) >= 0
    faults.classify(RuntimeError(text))


def headers(data):
    names = ["x-request-timeout-ms", "grpc-timeout"]
    sent = {name: data.ConsumeUnicodeNoSurrogates(24) for name in names if data.ConsumeBool()}
    try:
        until = deadline(sent, 100.0, 5.0 if data.ConsumeBool() else None)
        assert until is None or 100.0 <= until < 1e12
    except MalformedTimeout:
        pass


# Each with an input to begin with.
TARGETS = [
    (device_ids, b"nc:12"),
    (visible_cores, b"0-3,4"),
    (environment, b"3-6 2"),
    (config, b'{"neuron": {"static_batch_size": 8, "dynamic_batch_size": false}}'),
    (script, b"PK\x03\x04\x14\x00 model/code/__torch__.py"),
    (headers, b"250 3S"),
    (status, b"Failed to execute the model status=1003 message=Numerical Error"),
]


def consume(raw):
    """The first byte says which target, the rest is for it."""
    if raw:
        TARGETS[raw[0] % len(TARGETS)][0](atheris.FuzzedDataProvider(raw[1:]))


if __name__ == "__main__":
    corpus = os.path.join(FOLDER, "corpus")
    os.mkdir(corpus)
    for number, (_, example) in enumerate(TARGETS):
        with open(os.path.join(corpus, str(number)), "wb") as file:
            # Texts are read with a first byte that says which characters they have: 1 is ASCII.
            file.write(bytes([number]) + (example if number in (3, 4) else b"\x01" + example))
    atheris.Setup([*sys.argv, "-len_control=0", corpus], consume)
    atheris.Fuzz()

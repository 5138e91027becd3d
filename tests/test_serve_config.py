"""What `aneuron serve` is asked for: files and command lines become settings, or an error that says what to do."""

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec")
pytest.importorskip("yaml")

import aneuron
from aneuron.cli import reading
from aneuron.serve import config
from aneuron.serve.config import ConfigError, ServerSettings, from_command_line, parse, settings_of
from aneuron.serve.loading import make

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "serve.md"
TOML = """
[server]
http = 0
max_timeout = 5
drain_timeout = "none"

[pools.cores]
backend = { name = "simulated", cores = 2, service_time = 0.001 }
num_workers = 3

[models.encoder]
model = "serve_nets:net"
pool = "cores"
weight = 2.0
example_inputs = "1x4"
batch_size = 8
max_pending = 100

[models.other]
model = "serve_nets:make"
example_inputs = { x = "1x4:float32" }
backend = "cpu"
outputs = { 0 = "rows" }
"""
YAML = """
server: {http: 0, max_timeout: 5, drain_timeout: null}
pools:
  cores:
    backend: {name: simulated, cores: 2, service_time: 0.001}
    num_workers: 3
models:
  encoder:
    {model: "serve_nets:net", pool: cores, weight: 2.0, example_inputs: 1x4, batch_size: 8, max_pending: 100}
  other:
    model: serve_nets:make
    example_inputs: {x: "1x4:float32"}
    backend: cpu
    outputs: {"0": rows}
"""
EXAMPLE = 'example_inputs="1x4"'
NETS = """
import contextlib
import torch
import aneuron

net = torch.nn.Linear(4, 2)  # in training mode: it is put into eval
served = aneuron.AsyncDataParallel(torch.neg, example_inputs=torch.ones(1, 2))
bounded = aneuron.AsyncDataParallel(torch.neg, max_pending=7, example_inputs=torch.ones(1, 2))
number = 3
example = torch.ones(1, 4)
backend = aneuron.SimulatedBackend(cores=1)

def guard():
    return contextlib.nullcontext()

def make():
    return torch.nn.Linear(4, 2)

def make_served():
    return aneuron.AsyncDataParallel(torch.neg)

def broken():
    raise OSError("the weights are gone")

def raises():
    raise OSError("no samples")

def ends():
    raise SystemExit(3)

def double(x):
    return x * 2
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "serve_nets.py").write_text(NETS)
    (tmp_path / "serve_ends.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("serve_nets", None)


def asked(*models, server=None, sets=()):
    return settings_of(from_command_line({}, models, server or {}, sets))


def made(*models, sets=()):
    return {each.name: each for each in make(asked(*models, sets=sets))}


# What is read.


def test_toml_and_yaml_say_the_same():
    settings = settings_of(parse(TOML, "a.toml"))
    assert settings == settings_of(parse(YAML, "a.yaml"))
    assert settings.server == ServerSettings(http=0, max_timeout=5, drain_timeout=None)
    encoder, other = make(settings)
    assert (encoder.name, encoder.model.weight, encoder.model.max_pending) == ("encoder", 2.0, 100)
    assert encoder.model.pool.num_workers == 3
    assert encoder.model.pool is not other.model.pool
    assert [spec.name for spec in encoder.model.signature.inputs] == ["input0"]
    assert [spec.name for spec in other.model.signature.inputs] == ["x"]


def test_settings_are_frozen():
    settings = asked("serve_nets:net")
    with pytest.raises(AttributeError):
        settings.server.http = 1
    with pytest.raises(AttributeError):
        settings.models[0].name = "x"


def test_every_argument_of_a_model_and_a_pool_can_be_said():
    model, pool = inspect.signature(aneuron.AsyncDataParallel).parameters, inspect.signature(aneuron.Pool).parameters
    assert set(config.POOL) == set(pool)
    assert set(config.MODEL) == (set(model) | set(pool)) - {"model"}


def test_arguments_that_are_objects_are_written():
    found = made(
        "serve_nets:net",
        sets=[
            "device_ids=[0]",
            "num_workers=2",
            'backend="serve_nets:backend"',
            'example_inputs="serve_nets:example"',
            'context="serve_nets:guard"',
            "buckets={dim=1, sizes=[4, 8], pad=0}",
            "max_pending={positions=64}",
            "max_delay=none",
            'outputs={0="rows"}',
            "exec_timeout=5.0",
            "min_cores=1",
            "check_rows=false",
            "dim=0",
            "set_dynamic_batching=true",
            "split_size=2",
            "weight=3",
        ],
    )["net"].model
    assert found.max_pending == aneuron.Work(positions=64)
    assert found.weight == 3.0
    assert found.split_size == 2


def test_engines_and_shares_are_of_the_models_own_pool():
    pool = made("serve_nets:double", sets=[EXAMPLE, "processes=2", "share=mine", "linger=1", "backend=cpu"])[
        "double"
    ].model.pool
    assert pool.processes == 2


def test_models_by_size():
    settings = settings_of(
        {"models": {"net": {"model": {"1": "serve_nets:double", "8": "serve_nets:double"}, "example_inputs": "1x4"}}}
    )
    assert "batch_size=8" in repr(make(settings)[0].model)


def test_a_declared_signature():
    signature = {
        "inputs": [{"name": "row", "dtype": "float32", "shape": [-1, 4]}],
        "outputs": [{"name": "text", "dtype": "bytes", "shape": [-1]}],
    }
    settings = settings_of({"models": {"net": {"model": "serve_nets:double", "signature": signature}}})
    declared = make(settings)[0].signature
    assert declared.inputs[0] == aneuron.TensorSpec("row", torch.float32, (-1, 4))
    assert declared.outputs[0].dtype is bytes


# Names.


def test_a_model_has_the_name_of_its_attribute_or_file_unless_another_is_given(tmp_path):
    (tmp_path / "rerank.pt2").write_bytes(b"")
    names = [model.name for model in asked("serve_nets:net", "mine=serve_nets:make", "rerank.pt2").models]
    assert names == ["net", "mine", "rerank"]


@pytest.mark.parametrize("models", [("serve_nets:net", "net=serve_nets:make"), ("a/net.pt2", "b/net.pt2")])
def test_two_models_of_one_name(models):
    with pytest.raises(ConfigError, match=r"would both be named 'net': name one by NAME=") as error:
        asked(*models)
    assert all(model.partition("=")[2] or model in str(error.value) for model in models)


def test_two_models_of_one_name_in_a_file_and_beside_it():
    with pytest.raises(ConfigError, match=r"'serve_nets:net' and 'other.pt2' would both be named 'encoder'"):
        from_command_line(parse(TOML, "a.toml"), ["encoder=other.pt2"], {}, [])
    for text, path in [
        ("[models.net]\nmodel='a:b'\n[models.net]\nmodel='a:c'", "a.toml"),
        ("models:\n  net: {model: a}\n  net: {model: b}", "a.yml"),
    ]:
        with pytest.raises(ConfigError, match=rf"{path} cannot be read: .*net"):
            parse(text, path)


def test_one_model_has_one_name():
    with pytest.raises(ConfigError, match=r"models.a and models.b are one and the same AsyncDataParallel"):
        made("a=serve_nets:served", "b=serve_nets:served")


# What does not fit: key, value, rule, and what to do.

BAD = [
    ({"servers": {}}, r"servers = \{\}: there is no such key; do you mean server\?"),
    ({"server": {"htp": 1}}, r"server.htp = 1: there is no such key; do you mean http\?"),
    ({"server": {"xyzzy": 1}}, r"server.xyzzy = 1: there is no such key; there is host, http"),
    ({"server": {"http": 70000}}, r"server.http = 70000: expected int <= 65535"),
    ({"server": {"http": "80"}}, r"server.http = '80': expected int"),
    ({"server": {"http": True}}, r"server.http = True: expected int"),
    ({"server": {"max_body": 0}}, r"server.max_body = 0: expected int >= 1"),
    ({"server": {"drain_delay": -1}}, r"server.drain_delay = -1: expected float >= 0"),
    ({"server": {"tls_cert": "a.pem"}}, r"server.tls_key is missing: TLS takes"),
    ({"server": 3}, r"server = 3: expected a table"),
    ({"models": []}, r"models = \[\]: expected a table"),
    ({}, r"no model is named: give a path or module:attribute"),
    ({"models": {"net": 3}}, r"models.net = 3: expected a table"),
    ({"models": {"a/b": {"model": "x"}}}, r"models.a/b: 'a/b' stands in addresses: expected letters"),
    ({"models": {"": {"model": "x"}}}, r"models.: '' stands in addresses"),
    ({"models": {"net": {}}}, r"models.net.model is missing: expected a path or module:attribute$"),
    ({"models": {"lin": {"model": "x"}, "lim": {"dim": 0}}}, r"models.lim.model is missing: .*; do you mean lin\?"),
    ({"models": {"lin": {"model": "x"}, "foo": {"dim": 0}}}, r"models.foo.model is missing: .*; there is lin$"),
    ({"server": {"http": 8000, "grpc": 8000}}, r"server.grpc = 8000: it is the port of HTTP, too"),
    ({"server": {"grpc": 8000}}, r"server.grpc = 8000: it is the port of HTTP, too"),
    ({"models": {"net": {"model": 3}}}, r"models.net.model = 3: expected"),
    ({"models": {"net": {"model": "x", "batchsize": 8}}}, r"net.batchsize = 8: there is no .* mean batch_size\?"),
    ({"models": {"net": {"model": "x", "batch_size": 0}}}, r"net.batch_size = 0: expected int >= 1"),
    ({"models": {"net": {"model": "x", "pool": "p"}}}, r"net.pool = 'p': there is no such pool; there is none"),
    (
        {"pools": {"p": {}}, "models": {"net": {"model": "x", "pool": "p", "processes": 2}}},
        r"net.processes = 2: it is the pool's; say it in pools.p",
    ),
    ({"pools": {"p": {}}, "models": {"net": {"model": "x"}}}, r"pools.p: no model has it"),
]


@pytest.mark.parametrize(("raw", "said"), BAD)
def test_what_cannot_be_meant_says_key_value_rule_and_remedy(raw, said):
    with pytest.raises(ConfigError, match=said):
        settings_of(raw)


MISSING = [
    ("nope.pt2", (), r"models.nope.model = 'nope.pt2': there is no such file \(/.*nope.pt2\), and"),
    ("nope:net", (), r"models.net.model = 'nope:net': 'nope' cannot be imported: ModuleNotFoundError"),
    ("serve_nets:nett", (), r"models.nett.model = 'serve_nets:nett': there is no 'nett' in 'serve_nets'"),
    ("serve_nets:number", (), r"models.number.model = 'serve_nets:number' is 3: expected a model"),
    ("serve_nets:broken", (), r"'serve_nets:broken' makes no model: OSError: the weights are gone"),
    ("serve_nets:net", ["backend=tpu"], r"models.net.backend = 'tpu': expected one of cpu, cuda, .*, simulated; or"),
    ("serve_nets:net", ['backend={name="tpu"}'], r"models.net.backend.name = 'tpu': expected one of cpu, cuda"),
    ("serve_nets:net", ['backend={name="cpu", core=2}'], r"models.net.backend.core = 2: .*mean cores\?"),
    ("serve_nets:net", ['backend={name="cpu", dtype="float7"}'], r"backend.dtype = 'float7': expected the name"),
    ("serve_nets:net", ["example_inputs=nope"], r"models.net.example_inputs = 'nope' is neither a file nor a shape"),
    ("serve_nets:net", ["example_inputs=serve_nets:raises"], r"= 'serve_nets:raises' makes no inputs: OSError: no"),
    ("serve_nets:net", ["example_inputs=serve_nets:ends"], r"example_inputs = 'serve_nets:ends' makes no .*SystemExit"),
    ("serve_nets:net", ['example_inputs="1x4:int7"'], r"inputs = '1x4:int7': torch makes no such tensor: .*Int7"),
    ("serve_nets:ends", (), r"models.ends.model = 'serve_nets:ends' makes no model: SystemExit: 3"),
    ("serve_ends:net", (), r"models.net.model = 'serve_ends:net': 'serve_ends' cannot be imported: SystemExit: 3"),
    ("serve_nets.py", (), r"models.serve_nets.model = 'serve_nets.py' is no model, .*: write serve_nets:ATTRIBUTE"),
    ("serve_nets:net", ["max_pending={positons=3}"], r"models.net.max_pending.positons = 3: .*mean positions\?"),
    ("serve_nets:net", ['signature={inputs=[{nam="x"}]}'], r"signature.inputs.nam = 'x': .* mean name\?"),
    ("serve_nets:net", ["buckets={dims=1}"], r"models.net.buckets.dims = 1: .*mean dim\?"),
    ("serve_nets:net", ["share=mine"], r"models.net: share='mine'"),
    ("serve_nets:net", ['outputs={y="row"}'], r"models.net: "),
    ("serve_nets:served", ["batch_size=8"], r"net|served.batch_size = 8: .* is an AsyncDataParallel, which has its"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "sets", "said"), MISSING)
def test_what_is_not_there_or_refused_says_whose_it_is(model, sets, said):
    with pytest.raises(ConfigError, match=said):
        made(model, sets=sets)


@pytest.mark.parametrize(("text", "said"), [
    ("batch_size", r"expected KEY=VALUE"),
    ("=8", r"expected KEY=VALUE"),
    ("models..x=8", r"expected KEY=VALUE"),
])  # fmt: skip
def test_malformed_sets(text, said):
    with pytest.raises(ConfigError, match=said):
        asked("serve_nets:net", sets=[text])


@pytest.mark.parametrize("text", ["[server", "http = = 3"])
def test_files_that_are_no_toml(text):
    with pytest.raises(ConfigError, match=r"a.toml cannot be read: .* \(at (line 1|end)"):
        parse(text, "a.toml")


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.getcwd []"])
def test_files_that_are_no_plain_yaml(text):
    with pytest.raises(ConfigError, match=r"a.yaml cannot be read"):
        parse(text, "a.yaml")


# By default.


def test_waiting_rows_and_bodies_are_bounded_and_nobody_comes_from_elsewhere():
    server = asked("serve_nets:net").server
    assert (server.host, server.allow_load, server.max_body) == ("127.0.0.1", False, 64 << 20)
    found = made("serve_nets:net", "serve_nets:served", "serve_nets:bounded", sets=['models.net.example_inputs="1x4"'])
    assert {name: each.model.max_pending for name, each in found.items()} == {
        "net": config.MAX_PENDING, "served": config.MAX_PENDING, "bounded": 7,
    }  # fmt: skip
    assert made("serve_nets:net", sets=[EXAMPLE, "max_pending=none"])["net"].model.max_pending is None


def test_the_command_line_goes_before_the_file():
    raw = from_command_line(
        parse(TOML, "a.toml"), [], {"http": 1234}, ["models.encoder.batch_size=16", "server.grpc=0"]
    )
    settings = settings_of(raw)
    assert (settings.server.http, settings.server.grpc) == (1234, 0)
    assert settings.models[0].arguments["batch_size"] == 16
    assert parse(TOML, "a.toml")["models"]["encoder"]["batch_size"] == 8


def test_the_documented_defaults_are_those():
    text = GUIDE.read_text()
    for each in fields(ServerSettings):
        assert f"`{each.name}`" in text


def test_the_documented_file_can_be_meant():
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    settings = settings_of(parse(text, "service.toml"))
    assert [model.name for model in settings.models] == ["encoder", "reranker"]


def test_keys_that_are_numbers_are_texts_in_yaml_too():
    said = parse("models: {net: {model: {1: a.pt, 8: b.pt}, outputs: {0: whole}}}", "a.yaml")
    assert said["models"]["net"] == {"model": {"1": "a.pt", "8": "b.pt"}, "outputs": {"0": "whole"}}


def test_models_by_size_are_put_into_eval(tmp_path, monkeypatch):
    (tmp_path / "sized_nets.py").write_text("import torch\ndef sizes():\n    return {1: torch.nn.Dropout()}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not reading.value("sized_nets:sizes").value[1].training

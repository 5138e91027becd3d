"""The rules of the Open Inference Protocol, one by one: what breaks one is refused, and says which."""

import gzip
import json
import random
import struct
import zlib

import pytest
import torch

pytest.importorskip("grpc")
import aneuron
from aneuron import Signature, TensorSpec
from aneuron.web.v2.datatypes import TABLE, datatype_of, in_bytes, reader
from aneuron.web.v2.errors import Refused, told
from aneuron.web.v2.http import Asked, check_max_body, compress, decompress, find, read_head, written
from aneuron.web.v2.messages import message
from aneuron.web.v2.models import Models, Served, _result
from aneuron.web.v2.requests import Remembered, Terms, Wanted, read_json, read_message, read_raw

ONE = Signature((TensorSpec("x", torch.float32, (-1, 2)),), (TensorSpec("y", torch.float32, (-1, 2)),))
TWO = Signature((TensorSpec("a", torch.int64, (-1,)), TensorSpec("b", str, (-1,))))


def request(data=(1.0, 2.0), **changes):
    one = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": list(data)}
    return {"inputs": [one | changes]}


def described(parameters, shape=(1, 2), **more):
    return {"inputs": [{"name": "x", "shape": list(shape), "datatype": "FP32", "parameters": parameters} | more]}


def read(body, binary=None, signature=ONE):
    return read_json(body if isinstance(body, bytes) else json.dumps(body).encode(), binary, signature)


def refusal(status, text, function, *args):
    with pytest.raises(Refused) as caught:
        function(*args)
    assert (caught.value.status, text in str(caught.value)) == (status, True), caught.value
    return caught.value


class TestRequestsInJson:
    def test_flat_and_nested_data_are_the_same(self):
        for data in ([1.0, 2.0], [[1.0, 2.0]], [[1], [2]]):
            assert read(request(data)).values[0].tolist() == [[1.0, 2.0]]

    def test_what_belongs_to_no_rule_is_left_alone(self):
        body = request() | {"id": "7", "more": 1, "parameters": {"mine": 2}, "model_name": "x"}
        assert read(body).id == "7"

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (b"{", "no JSON"),
            (b"[]", "not as the protocol has it"),
            ({}, "inputs"),
            ({"inputs": [{"name": "x"}]}, "shape"),
            ({"inputs": []}, "lacks 'x'"),
            (request(name="z"), "no input 'z'; it has 'x'"),
            (request(shape=[1, 3]), "takes [-1, 2]"),
            (request(shape=[2]), "takes [-1, 2]"),
            (request(shape=[-1, 2]), "takes [-1, 2]"),
            (request(shape=[1.0, 2]), "shape[0]"),
            (request(datatype="FP64"), "takes FP32"),
            (request(datatype="float"), "no datatype of the protocol"),
            (request([1.0]), "1 elements"),
            (request([1.0, [2.0]]), "FP32, and there is list"),
            (request([[1.0], 2.0]), "different depths"),
            (request([1.0, "2"]), "there is str"),
            (request([1.0, True]), "there is bool"),
            (request([1.0, None]), "there is NoneType"),
            (request([1.0, 1e300]), "too large for FP32"),
            (request(data=()), "0 elements"),
            (request([[1.0, 2.0, 3.0], [4.0]], shape=[2, 2]), "unequal lengths"),
            (request(data=(), shape=[2**63, 2]), "more than there can be"),
            (b'{"inputs": [{"name": "\xff"}]}', "no JSON"),
            (b'{"inputs": [], "id": "\\ud800"}', "no JSON"),
            pytest.param(b'{"inputs": [{"name": "x", "data": ' + b"[" * 100_000, "no JSON", id="deep"),
            (request() | {"parameters": {"timeout": 10**400}}, "microseconds"),
            (request() | {"parameters": {"timeout": "9" * 5000}}, "microseconds"),
            (request() | {"parameters": {"priority": -(10**400)}}, "a number without end"),
            ({"inputs": [request()["inputs"][0]] * 2}, "twice"),
            ({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32"}]}, "no data"),
            (request(parameters={"binary_data_size": 8}), "both data and"),
            (request() | {"outputs": [{"name": "z"}]}, "no output 'z'; it has 'y'"),
            (request() | {"outputs": [{"name": "y"}, {"name": "y"}]}, "twice"),
            (request() | {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "true or false"),
            (request() | {"parameters": {"binary_data_output": "yes"}}, "true or false"),
            (request() | {"parameters": {"timeout": -1}}, "microseconds"),
            (request() | {"parameters": {"timeout": "soon"}}, "microseconds"),
            (request() | {"parameters": {"priority": 1.5}}, "priority"),
            (request() | {"parameters": {"tenant": 3}}, "tenant"),
        ],
    )
    def test_what_breaks_a_rule(self, body, text):
        refusal(400, text, read, body)

    @pytest.mark.parametrize("parameters", [{"sequence_id": 3}, {"sequence_id": "a"}, {"sequence_start": True}])
    def test_sequences_are_unsupported(self, parameters):
        refusal(501, "unsupported", read, request() | {"parameters": parameters})

    def test_shared_memory_is_unsupported(self):
        region = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
        refusal(501, "shared memory", read, described(region))
        refusal(501, "shared memory", read, request() | {"outputs": [{"name": "y", "parameters": region}]})
        classes = {"name": "y", "parameters": {"classification": 2}}
        refusal(501, "classification", read, request() | {"outputs": [classes]})

    def test_no_number_is_rounded_to_another_kind(self):
        whole = Signature((TensorSpec("x", torch.int8, (-1, 2)),))
        refusal(400, "there is float", read, request([1.0, 2.5], datatype="INT8"), None, whole)
        refusal(400, "too large", read, request([1, 128], datatype="INT8"), None, whole)
        yes = Signature((TensorSpec("x", torch.bool, (-1, 2)),))
        refusal(400, "there is int", read, request([1, 0], datatype="BOOL"), None, yes)

    def test_numbers_that_json_lacks_come_and_go_as_clients_write_them(self):
        [x] = read(b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[NaN,-Infinity]}]}').values
        assert x.isnan().tolist() == [[True, False]]
        answer = written("net", read(request()), [_result("y", x, False)])
        assert b"NaN,-Infinity" in answer.body[0]

    def test_terms(self):
        parameters = {"timeout": "250000", "priority": 3, "tenant": "acme"}
        assert read(request() | {"parameters": parameters}).terms == Terms(0.25, -3.0, "acme")
        assert read(request() | {"parameters": {"timeout": 0, "priority": 0}}).terms == Terms()

    def test_texts(self):
        body = {"inputs": [
            {"name": "b", "shape": [2], "datatype": "BYTES", "data": ["x", "\u00fc"]},
            {"name": "a", "shape": [2], "datatype": "INT64", "data": [1, 2]},
        ]}  # fmt: skip
        a, b = read(body, None, TWO).values
        assert (a.tolist(), b) == ([1, 2], ["x", "\u00fc"])
        body["inputs"][0]["data"] = ["x", 1]
        refusal(400, "a string for each element", read, body, None, TWO)

    def test_no_rows(self):
        assert read(request([], shape=[0, 2])).empty
        body = {"inputs": [
            {"name": "b", "shape": [1], "datatype": "BYTES", "data": ["x"]},
            {"name": "a", "shape": [0], "datatype": "INT64", "data": []},
        ]}  # fmt: skip
        refusal(400, "unequal rows", read, body, None, TWO)


class TestBinaryRequests:
    def body(self, size):
        return described({"binary_data_size": size})

    def test_tensors_lie_in_the_body(self):
        data = bytearray(struct.pack("<2f", 1.0, 2.0))
        [x] = read(self.body(8), data).values
        assert x.tolist() == [[1.0, 2.0]]
        data[:4] = struct.pack("<f", 3.0)
        assert x.tolist() == [[3.0, 2.0]]

    def test_what_begins_where_no_element_may_is_copied(self):
        data = bytearray(b"?" + struct.pack("<2f", 1.0, 2.0))
        assert reader(1, 8, ONE.inputs[0], TABLE["FP32"], [1, 2])(data).tolist() == [[1.0, 2.0]]

    @pytest.mark.parametrize(
        ("size", "binary", "text"),
        [
            (8, None, "Inference-Header-Content-Length"),
            (8, bytearray(4), "4 are left"),
            (8, bytearray(9), "1 bytes of binary data belong to no input"),
            (4, bytearray(4), "has 4 bytes; FP32 of shape [1, 2] has 8"),
            (-8, bytearray(8), "number of bytes"),
            (8.0, bytearray(8), "number of bytes"),
            (True, bytearray(8), "number of bytes"),
        ],
    )
    def test_sizes(self, size, binary, text):
        refusal(400, text, read, self.body(size), binary)

    def test_nothing_needs_no_header(self):
        assert read(described({"binary_data_size": 0}, (0, 2), data=None)).empty

    @pytest.mark.parametrize("data", [b"\1\0\0", b"\5\0\0\0ab", b"\1\0\0\0a\1\0\0\0"])
    def test_bytes_that_end_too_early(self, data):
        refusal(400, "ends beyond", reader(0, len(data), TWO.inputs[1], TABLE["BYTES"], [1]), bytearray(data))

    def test_bytes_that_are_no_text(self):
        data = bytearray(b"\1\0\0\0\xff")
        refusal(400, "no UTF-8", reader(0, 5, TWO.inputs[1], TABLE["BYTES"], [1]), data)

    def test_other_bytes_than_0_and_1_are_true(self):
        spec = TensorSpec("x", torch.bool, (-1,))
        tensor = reader(0, 3, spec, TABLE["BOOL"], [3])(bytearray(b"\0\1\7"))
        assert tensor.tolist() == [False, True, True]
        assert bytes(in_bytes(tensor)) == b"\0\1\1"

    def test_raw_requests(self):
        assert read_raw(bytearray(struct.pack("<2f", 1.0, 2.0)), ONE).values[0].tolist() == [[1.0, 2.0]]
        longer = Signature((TensorSpec("x", torch.float32, (-1, -1, 2)),))
        assert read_raw(bytearray(24), longer).values[0].shape == (1, 3, 2)
        refusal(400, "has 4 bytes", read_raw, bytearray(4), ONE)
        refusal(400, "do not say", read_raw, bytearray(4), longer)
        refusal(400, "one input", read_raw, bytearray(4), TWO)
        text = Signature((TensorSpec("x", bytes, (-1,)),))
        assert read_raw(bytearray(b"abc"), text).values == [[b"abc"]]

    @pytest.mark.parametrize("datatype", [each for each in TABLE.values() if each.dtype is not None], ids=str)
    def test_there_and_back(self, datatype):
        tensor = torch.tensor([[0, 1], [1, 0]]).to(datatype.dtype)
        one = reader(0, datatype.size, TensorSpec("x", datatype.dtype, ()), datatype, [])
        assert one(bytearray(datatype.size)).shape == ()
        spec = TensorSpec("x", datatype.dtype, (-1, 2))
        assert datatype_of(spec) is datatype
        data = bytearray(in_bytes(tensor))
        assert torch.equal(reader(0, len(data), spec, datatype, [2, 2])(data), tensor)


class TestMessages:
    def made(self, **more):
        one = {"name": "x", "datatype": "FP32", "shape": [1, 2]}
        return message("ModelInferRequest")(model_name="net", inputs=[one | more.pop("input", {})], **more)

    def test_raw_and_typed(self):
        raw = struct.pack("<2f", 1.0, 2.0)
        for made in (self.made(raw_input_contents=[raw]), self.made(input={"contents": {"fp32_contents": [1.0, 2.0]}})):
            assert read_message(made, ONE).values[0].tolist() == [[1.0, 2.0]]

    def test_what_breaks_a_rule(self):
        raw, typed = struct.pack("<2f", 1.0, 2.0), {"contents": {"fp32_contents": [1.0, 2.0]}}
        refusal(400, "2 raw_input_contents", read_message, self.made(raw_input_contents=[raw, raw]), ONE)
        refusal(400, "only one of both", read_message, self.made(raw_input_contents=[raw], input=typed), ONE)
        refusal(400, "not int_contents", read_message, self.made(input={"contents": {"int_contents": [1, 2]}}), ONE)
        refusal(400, "0 elements", read_message, self.made(), ONE)
        half = Signature((TensorSpec("x", torch.float16, (-1, 2)),))
        refusal(400, "no typed contents", read_message, self.made(input=typed | {"datatype": "FP16"}), half)
        small = Signature((TensorSpec("x", torch.int8, (-1, 2)),))
        numbers = {"datatype": "INT8", "contents": {"int_contents": [1, 300]}}
        refusal(400, "too large", read_message, self.made(input=numbers), small)

    def test_parameters(self):
        parameter = message("InferParameter")
        made = self.made(raw_input_contents=[bytes(8)], parameters={"priority": parameter(uint64_param=2)})
        assert read_message(made, ONE).terms == Terms(priority=-2.0)
        region = {"shared_memory_region": parameter(string_param="r")}
        refusal(501, "shared memory", read_message, self.made(input={"parameters": region}), ONE)

    def test_numbers_of_fields_are_those_of_the_stubs(self):
        service = pytest.importorskip("tritonclient.grpc.service_pb2")
        config = pytest.importorskip("tritonclient.grpc.model_config_pb2")

        def same(ours, theirs):
            for field in ours.fields:
                other = theirs.fields_by_name[field.name]
                kinds = {field.type, other.type} - {field.TYPE_ENUM, field.TYPE_INT32}  # enums are numbers here
                assert field.number == other.number, (ours.full_name, field.name)
                assert len(kinds) <= 1, (ours.full_name, field.name)
                assert field.is_repeated == other.is_repeated
                if field.message_type is not None:
                    same(field.message_type, other.message_type)

        for name, theirs in service.DESCRIPTOR.message_types_by_name.items():
            if name.split("Memory")[0] not in ("SystemShared", "CudaShared") and "Settings" not in name:
                try:
                    ours = message(name).DESCRIPTOR
                except KeyError:
                    continue
                same(ours, theirs)
        same(message("ModelConfig").DESCRIPTOR, config.ModelConfig.DESCRIPTOR)


class TestHttp:
    @pytest.mark.parametrize(
        ("method", "path", "asked"),
        [
            ("GET", "/v2", Asked("server")),
            ("GET", "/v2/", Asked("server")),
            ("GET", "/v2/health/live", Asked("live")),
            ("HEAD", "/v2/health/ready", Asked("server ready")),
            ("GET", "/v2/models/net", Asked("metadata", "net")),
            ("GET", "/v2/models/net/versions/1", Asked("metadata", "net", "1")),
            ("GET", "/v2/models/net/versions/1/ready", Asked("ready", "net", "1")),
            ("POST", "/v2/models/net/infer", Asked("infer", "net")),
            ("POST", "/v2/models/net/versions/2/infer", Asked("infer", "net", "2")),
            ("GET", "/v2/models/stats", Asked("stats")),
            ("GET", "/v2/models/net/stats", Asked("stats", "net")),
            ("POST", "/v2/repository/index", Asked("index")),
            ("POST", "/v2/repository/models/net/load", Asked("load", "net")),
        ],
    )
    def test_paths(self, method, path, asked):
        assert find(method, path) == asked

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/v2/models", 404),
            ("GET", "/v2/health", 404),
            ("GET", "/v2/models/net/what", 404),
            ("GET", "/v2/models/net/infer/more", 404),
            ("GET", "/v2/models/net/infer", 405),
            ("POST", "/v2/models/net", 405),
            ("GET", "/v2/systemsharedmemory/status", 501),
            ("POST", "/v2/cudasharedmemory/region/r/register", 501),
            ("GET", "/v2/trace/setting", 501),
            ("GET", "/v2/models/net/trace/setting", 501),
            ("POST", "/v2/logging", 501),
        ],
    )
    def test_paths_that_lead_nowhere(self, method, path, status):
        refusal(status, "", find, method, path)

    def test_heads(self):
        def read(**headers):
            return read_head({name.replace("_", "-"): value for name, value in headers.items()}.get, 100)

        assert read(content_length="50", accept_encoding="gzip") == (50, None, "", "gzip")
        assert read(accept_encoding="gzip, deflate").accepts == ""
        for headers, status in (
            ({"content_length": "101"}, 413),
            ({"content_length": "-1"}, 400),
            ({"content_length": "5", "inference_header_content_length": "6"}, 400),
            ({"inference_header_content_length": "x"}, 400),
            ({"content_encoding": "br"}, 415),
        ):
            with pytest.raises(Refused) as caught:
                read(**headers)
            assert caught.value.status == status

    def test_compression(self):
        data = b"tensor" * 1000
        for coding in ("gzip", "deflate"):
            assert decompress(compress(data, coding), coding, len(data)) == data
            refusal(413, "decompressed", decompress, compress(data, coding), coding, len(data) - 1)
            refusal(400, "in the middle", decompress, compress(data, coding)[:-1], coding, len(data))
            refusal(400, f"not {coding}", decompress, data, coding, len(data))
        assert decompress(gzip.compress(b"a") + gzip.compress(b"b"), "gzip", 9) == b"ab"
        refusal(400, "more than 16 members", decompress, gzip.compress(b"") * 17, "gzip", 9)
        assert zlib.decompress(compress(data, "deflate")) == data

    def test_answers_mix_binary_and_json(self):
        inference = read(request() | {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]})
        assert inference.outputs == [Wanted("y", True)]
        results = [_result("y", torch.ones(1, 2), True), _result("t", ["\u00fc"], False)]
        answer = written("net", inference, results)
        headers = dict(answer.headers)
        head = int(headers["inference-header-content-length"])
        [body] = answer.body
        assert body[head:] == struct.pack("<2f", 1.0, 1.0)
        assert json.loads(body[:head])["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
            {"name": "t", "datatype": "BYTES", "shape": [1], "data": ["\u00fc"]},
        ]
        assert headers["content-type"] == "application/octet-stream"
        refusal(400, "no UTF-8", written, "net", inference, [_result("t", [b"\xff"], False)])


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (aneuron.ShapeError("x"), 400, "INVALID_ARGUMENT"),
            (aneuron.QueueFull("x"), 503, "RESOURCE_EXHAUSTED"),
            (aneuron.DeadlineExceeded("x"), 504, "DEADLINE_EXCEEDED"),
            (aneuron.Closed("x"), 503, "UNAVAILABLE"),
            (aneuron.OutputError("secret"), 500, "INTERNAL"),
            (ZeroDivisionError("secret"), 500, "INTERNAL"),
        ],
    )
    def test_ours_have_codes(self, error, status, code):
        said = told(error)
        assert (said.status, said.code) == (status, code)
        assert "secret" not in said.text

    def test_names_of_any_length_are_not_said_again(self):
        named = refusal(400, "no input", read, request(name="\u00e9" * 100_000))
        assert len(told(named).text) < 600

    def test_bodies_have_a_bound(self):
        with pytest.raises(ValueError, match="max_body=None"):
            check_max_body(None)

    def test_models_that_cannot_be_served(self):
        with pytest.raises(ValueError, match="example_inputs"):
            Served("net", aneuron.AsyncDataParallel(torch.nn.Identity().eval()))
        complex_one = torch.zeros(1, 2, dtype=torch.complex64)
        with pytest.raises(ValueError, match="no datatype"):
            Served("net", aneuron.AsyncDataParallel(torch.nn.Identity().eval(), example_inputs=complex_one))
        net = aneuron.AsyncDataParallel(torch.nn.Identity().eval())
        with pytest.raises(LookupError, match="no such model"):
            Models(Served, {"net": net}, {"other": ONE})


class TestDeclared:
    async def test_a_declaration_says_other_names(self):
        example = torch.zeros(1, 2)
        model = aneuron.AsyncDataParallel(torch.nn.ReLU().eval(), backend="cpu", example_inputs=example)
        served = Served("net", model, ONE)
        async with model:
            results = await served.infer(read(request([-1.0, 2.0])), model)
            assert [(each.name, each.value.tolist()) for each in results] == [("y", [[0.0, 2.0]])]
            assert served.metadata()["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]

    @pytest.mark.parametrize("started", [False, True])
    @pytest.mark.parametrize("example", [None, torch.zeros(1, 2)])
    @pytest.mark.parametrize("names", [("y", "z"), ("one", "two")])
    async def test_several_outputs(self, started, example, names):
        """By their own names, or by position; also where somebody has asked before the model was started."""
        said = {names[0]: "y", names[1]: "z"}
        declared = Signature(
            (TensorSpec("x", torch.float32, (-1, 2)),),
            tuple(TensorSpec(name, torch.float32, (-1, 2)) for name in said),
        )
        model = aneuron.AsyncDataParallel(lambda x: {"y": x, "z": -x}, backend="cpu", example_inputs=example)
        served = Served("net", model, declared)
        if started:
            await model.start()
        assert [each["name"] for each in served.metadata()["outputs"]] == list(said)
        for _ in range(2):
            results = await served.infer(read(request(), None, declared), model)
            assert {each.name: each.value.tolist() for each in results} == {names[0]: [[1, 2]], names[1]: [[-1, -2]]}
        await model.aclose()

    async def test_no_rows_of_any_length_are_not_guessed(self):
        model = aneuron.AsyncDataParallel(
            torch.nn.ReLU().eval(), backend="cpu", example_inputs=torch.ones(1, 4), device_ids=[0],
            buckets=aneuron.Buckets(dim=1, sizes=(4, 8)),
        )  # fmt: skip
        served = Served("net", model)
        async with model:
            body = {"name": "input0", "datatype": "FP32", "data": [], "shape": [0, 5]}
            inference = read({"inputs": [body]}, None, served.signature)
            with pytest.raises(Refused, match="has a length"):
                await served.infer(inference, model)

    async def test_without_an_example_inputs_go_by_position(self):
        model = aneuron.AsyncDataParallel(lambda a, b: {"n": a, "b": b}, backend="cpu")
        served = Served("net", model, TWO)
        body = {"inputs": [
            {"name": "b", "shape": [2], "datatype": "BYTES", "data": ["x", "y"]},
            {"name": "a", "shape": [2], "datatype": "INT64", "data": [1, 2]},
        ]}  # fmt: skip
        async with model:
            results = await served.infer(read(body, None, TWO), model)
        assert [(each.name, each.datatype.name) for each in results] == [("n", "INT64"), ("b", "BYTES")]

    def test_a_declaration_of_another_number_is_refused(self):
        example = torch.zeros(1, 2)
        model = aneuron.AsyncDataParallel(torch.nn.ReLU().eval(), example_inputs=example)
        with pytest.raises(aneuron.ShapeError, match="2 inputs are declared"):
            Served("net", model, TWO)


class TestWhatWasSaidBefore:
    """What is remembered changes nothing: neither who says it again, nor who says nearly the same."""

    @staticmethod
    def asked(chance):
        """Inputs in some order with their data, and what else a request says."""
        rows = chance.choice([0, 1, 2])
        data = {
            "a": struct.pack(f"<{rows}q", *[chance.randrange(100) for _ in range(rows)]),
            "b": in_bytes([chance.choice(["", "x", "yz"]) for _ in range(rows)]),
        }
        inputs = [
            {"name": name, "shape": [rows if name == "a" else chance.choice([rows, rows, 1])], "datatype": datatype}
            for name, datatype in chance.sample([("a", "INT64"), ("b", "BYTES")], 2)
        ]
        outputs = chance.choice([[], [{"name": "y"}]])
        more = chance.choice([{}, {}, {"timeout": chance.choice([1_000_000, 2_000_000])}])
        return inputs, data, outputs, more, chance.choice(["", "", "7"])

    @staticmethod
    def tried(function, *args):
        try:
            asked = function(*args)
        except Refused as error:
            return str(error)
        return asked._replace(values=[each if isinstance(each, list) else each.tolist() for each in asked.values])

    def test_json(self):
        chance, remembered, again = random.Random(1), Remembered(), 0
        for _ in range(2000):
            inputs, data, outputs, more, request_id = self.asked(chance)
            for each in inputs:
                each["parameters"] = {"binary_data_size": len(data[each["name"]])}
            binary = b"".join(bytes(data[each["name"]]) for each in inputs)
            head = {"inputs": inputs, "outputs": outputs, "parameters": more, "id": request_id}
            said = json.dumps(head).encode()
            again += (said, len(binary)) in remembered._seen
            known = self.tried(read_json, said, bytearray(binary), TWO, remembered)
            assert known == self.tried(read_json, said, bytearray(binary), TWO)
        assert again > 500

    def test_messages(self):
        chance, remembered = random.Random(2), Remembered()
        for _ in range(2000):
            inputs, data, outputs, more, request_id = self.asked(chance)
            parameters = {name: {"int64_param": value} for name, value in more.items()}
            raw = [bytes(data[each["name"]]) for each in inputs]

            def made(each=(inputs, outputs, parameters, request_id, raw)):
                inputs, outputs, parameters, request_id, raw = each
                return message("ModelInferRequest")(
                    inputs=inputs, outputs=outputs, parameters=parameters, id=request_id, raw_input_contents=raw
                )

            assert self.tried(read_message, made(), TWO, remembered) == self.tried(read_message, made(), TWO)

    def test_texts_of_other_lengths_are_other_texts(self):
        two = Signature((TensorSpec("a", str, (-1,)), TensorSpec("b", str, (-1,))))
        remembered = Remembered()
        for texts in (["x", "yz"], ["xy", "z"]):
            raw = [in_bytes([each]) for each in texts]
            inputs = [{"name": name, "datatype": "BYTES", "shape": [1]} for name in "ab"]
            asked = message("ModelInferRequest")(inputs=inputs, raw_input_contents=raw)
            assert read_message(asked, two, remembered).values == [[texts[0]], [texts[1]]]
        assert len(remembered._seen) == 2

    def test_there_is_an_end_to_it(self):
        remembered = Remembered()
        for number in range(1000):
            said = described({"binary_data_size": 8, "number": number})
            read_json(json.dumps(said).encode(), bytearray(8), ONE, remembered)
        assert len(remembered._seen) <= 128

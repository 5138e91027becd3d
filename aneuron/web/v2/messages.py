"""The protocol's gRPC messages, in a descriptor pool of their own.

Lives here: names, numbers and types of fields, the classes made of them. Must not be here: what they mean (grpc.py).

Several packages register their own stubs of the same names in protobuf's default pool, where the second to be imported
raises; these are in nobody's way. The numbers are those of https://github.com/kserve/open-inference-protocol
(specification/protocol/open_inference_grpc.proto) and of Triton's extensions of it,
https://github.com/triton-inference-server/common/tree/main/protobuf.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

# By message: its fields in the order of their numbers from 1 on, or with them; "*" before a type: repeated, "map": of
# strings to a message, "|" before a name: of the message's oneof. A capital begins the name of a message.
_SCHEMA = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready",
    "ModelReadyRequest": "string name, string version",
    "ModelReadyResponse": "bool ready",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "string name, string version, *string extensions",
    "ModelMetadataRequest": "string name, string version",
    "ModelMetadataResponse.TensorMetadata": "string name, string datatype, *int64 shape",
    "ModelMetadataResponse": "string name, *string versions, string platform, "
    "*ModelMetadataResponse.TensorMetadata inputs, *ModelMetadataResponse.TensorMetadata outputs",
    "InferParameter": "bool |bool_param, int64 |int64_param, string |string_param, double |double_param, "
    "uint64 |uint64_param",
    "InferTensorContents": "*bool bool_contents, *int32 int_contents, *int64 int64_contents, *uint32 uint_contents, "
    "*uint64 uint64_contents, *float fp32_contents, *double fp64_contents, *bytes bytes_contents",
    "ModelInferRequest.InferInputTensor": "string name, string datatype, *int64 shape, map:InferParameter parameters, "
    "InferTensorContents contents",
    "ModelInferRequest.InferRequestedOutputTensor": "string name, map:InferParameter parameters",
    "ModelInferRequest": "string model_name, string model_version, string id, map:InferParameter parameters, "
    "*ModelInferRequest.InferInputTensor inputs, *ModelInferRequest.InferRequestedOutputTensor outputs, "
    "*bytes raw_input_contents",
    "ModelInferResponse.InferOutputTensor": "string name, string datatype, *int64 shape, "
    "map:InferParameter parameters, InferTensorContents contents",
    "ModelInferResponse": "string model_name, string model_version, string id, map:InferParameter parameters, "
    "*ModelInferResponse.InferOutputTensor outputs, *bytes raw_output_contents",
    "ModelStreamInferResponse": "string error_message, ModelInferResponse infer_response",
    "ModelConfigRequest": "string name, string version",
    "ModelInput": "string name, int32 data_type, 4 *int64 dims",
    "ModelOutput": "string name, int32 data_type, *int64 dims",
    "ModelConfig": "string name, string platform, 4 int32 max_batch_size, *ModelInput input, *ModelOutput output, "
    "17 string backend",
    "ModelConfigResponse": "ModelConfig config",
    "ModelStatisticsRequest": "string name, string version",
    "StatisticDuration": "uint64 count, uint64 ns",
    "InferStatistics": "StatisticDuration success, StatisticDuration fail, StatisticDuration queue, "
    "StatisticDuration compute_input, StatisticDuration compute_infer, StatisticDuration compute_output, "
    "StatisticDuration cache_hit, StatisticDuration cache_miss",
    "ModelStatistics": "string name, string version, uint64 last_inference, uint64 inference_count, "
    "uint64 execution_count, InferStatistics inference_stats",
    "ModelStatisticsResponse": "*ModelStatistics model_stats",
    "RepositoryIndexRequest": "string repository_name, bool ready",
    "RepositoryIndexResponse.ModelIndex": "string name, string version, string state, string reason",
    "RepositoryIndexResponse": "*RepositoryIndexResponse.ModelIndex models",
    "RepositoryModelLoadRequest": "string repository_name, string model_name",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "string repository_name, string model_name",
    "RepositoryModelUnloadResponse": "",
}
_FIELD = descriptor_pb2.FieldDescriptorProto


def _described() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="aneuron/open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in _SCHEMA.items():
        outer, _, inner = name.rpartition(".")
        if outer and outer not in made:
            made[outer] = file.message_type.add(name=outer)
        if name not in made:
            made[name] = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        number = 0
        for each in filter(None, fields.split(", ")):
            words = each.split(" ")
            number = int(words.pop(0)) if words[0].isdigit() else number + 1
            _add(made[name], name, number, *words)
    return file


def _add(message: Any, owner: str, number: int, kind: str, name: str) -> None:
    """One field, and what it needs beside it."""
    one_of, name = name.startswith("|"), name.lstrip("|")
    field = message.field.add(name=name, number=number, label=_FIELD.LABEL_OPTIONAL)
    if one_of:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if kind.startswith("map:"):
        entry = "".join(word.capitalize() for word in name.split("_")) + "Entry"
        pair = message.nested_type.add(name=entry)
        pair.options.map_entry = True
        _add(pair, entry, 1, "string", "key")
        _add(pair, entry, 2, kind[4:], "value")
        kind = f"*{owner}.{entry}"
    if kind.startswith("*"):
        field.label, kind = _FIELD.LABEL_REPEATED, kind[1:]
    if kind[0].isupper():
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(_FIELD, f"TYPE_{kind.upper()}")


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_described())


def message(name: str) -> Any:
    """The class of a message, by its name in the protocol.

    >>> message("ModelReadyRequest")(name="net").SerializeToString()
    b'\\n\\x03net'
    """
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))

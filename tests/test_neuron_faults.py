"""Whom an error of the Neuron software is blamed on: the table of codes and texts."""

import pytest
import torch
from doubles import streams

from aneuron import Fault
from aneuron.backends.neuron import faults
from aneuron.backends.neuron.faults import Kind, Repeated, cause, classify, last_line

# What TorchScript puts before the text of a C++ failure.
FRAME = (
    "The following operation failed in the TorchScript interpreter.\n"
    "Traceback of TorchScript, serialized code (most recent call last):\n"
    '  File "code/__torch__/torch_neuronx/xla_impl/trace.py", line 9, in forward\n'
    "    return ops.neuron.forward_v2([x], self.model)\n"
    "           ~~~~~~~~~~~~~~~~~~~~~ <--- HERE\n"
    "RuntimeError: "
)


def raised(status, message="whatever"):
    return RuntimeError(f"{FRAME}Failed to execute the model status={status} message={message}")


KINDS = {
    Kind.INPUT: [2, 3, 10, 1002, 1003, 1006],
    Kind.SUSPECT: [1, 4, 8, 11, 15, 1100, 1204, 1206, 4711],
    Kind.RETRY: [7],
    Kind.CORE: [5, 6, 9, 101, 1004, 1005, 1200, 1201, 1202, 1203, 1205, 1299],
    Kind.FATAL: [13, 14],
}
FAULTS = {
    Kind.INPUT: Fault.INPUT,
    Kind.SUSPECT: Fault.INPUT,  # until it repeats, which the core sees
    Kind.RETRY: Fault.INPUT,
    Kind.CORE: Fault.CORE,
    Kind.FATAL: Fault.FATAL,
}
CODES = [(code, kind) for kind, codes in KINDS.items() for code in codes]


@pytest.mark.parametrize(("code", "kind"), CODES)
def test_a_status_code(code, kind):
    error = raised(code)
    assert cause(error).kind is kind
    assert classify(error) is FAULTS[kind]


@pytest.mark.parametrize(("code", "kind"), CODES)
@pytest.mark.parametrize("wrap", ["{}", "backend='neuron' raised:\nRuntimeError: {}\n\nSet TORCHDYNAMO_VERBOSE=1"])
def test_torchneuron_says_a_status_in_words(code, kind, wrap):
    said = str(streams.execution_error("aten::addmm", code))
    assert (code in streams.WORDS) == ("Unknown status" not in said)
    error = RuntimeError(wrap.format(said))
    assert cause(error).kind is kind
    assert classify(error) is FAULTS[kind]
    assert last_line(error).startswith("NRT EXECUTION FAILED: Async execution error: seq_id=7, ")


def test_torchneurons_compiler():
    said = (
        'Compilation error occurred on Neuron for operation=aten::x;\nerror message="COMPILATION FAILED: status=70"\n'
    )
    error = RuntimeError(said + "python stack trace=\n")
    assert cause(error).kind is Kind.INPUT
    assert "compiler refuses" in cause(error).advice
    assert last_line(error) == "COMPILATION FAILED: status=70"


def test_the_table_is_all_tested():
    assert set(faults.STATUS) <= {code for code, _ in CODES}


class NrtError(RuntimeError):
    """As nrtpy has it."""


@pytest.mark.parametrize(("code", "kind"), CODES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: RuntimeError("Caught RuntimeError on neuroncore 3.\nOriginal Traceback ...\n" + text),
        lambda text: torch.jit.Error(text),
        lambda text: RuntimeError(f"nrt_execute: {text.partition('the model ')[2]}, error message"),
        lambda text: NrtError(text),
    ],
    ids=["DataParallel", "torch.jit.Error", "TensorFlow", "nrtpy"],
)
def test_a_status_code_is_found_wherever_it_stands(code, kind, wrap):
    assert cause(wrap(str(raised(code)))).kind is kind


def test_a_status_code_is_found_in_what_caused_the_error():
    outer = ValueError("my own wrapper")
    outer.__cause__ = middle = RuntimeError("and another")
    middle.__cause__ = raised(101)
    assert classify(outer) is Fault.CORE
    middle.__cause__ = outer  # a circle ends
    assert classify(outer) is Fault.INPUT


def test_the_outermost_code_counts_and_of_several_in_a_text_the_last():
    outer = raised(1003)
    outer.__cause__ = raised(5)
    assert classify(outer) is Fault.INPUT
    assert classify(RuntimeError("status=1003 of before\nFailed to execute the model status=5")) is Fault.CORE
    assert classify(RuntimeError("status=5 message=Timeout Exceeded, cleaned up: status=0")) is Fault.CORE


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Failed to execute the model status=5 message=Timeout Exceeded", Kind.CORE),
        ("Failed to execute the model status=1003 message=Numerical Error", Kind.INPUT),
        ("Failed to execute the model status=1006 message=Execution Out-Of-Bounds Memory Access", Kind.INPUT),
        ("Could not load the model status=4 message=Allocation Failure", Kind.SUSPECT),
        ("Could not load the model status=2 message=Invalid", Kind.INPUT),
        ('nrt_load_collectives status=4 message="Allocation Failure"', Kind.SUSPECT),
        ('nrt_execute: status=1004, error message="Execution was completed with other errors"', Kind.CORE),
        ("The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged", Kind.FATAL),
        ("NRT:nrt_allocate_neuron_cores NeuronCore(s) not available - Requested:nc1-nc1 Available:0", Kind.FATAL),
        ("Incompatible runtime state: NRT_STATE_CHILD", Kind.FATAL),
        ("Cannot re-initialize Neuron runtime in forked subprocess. Use the spawn method", Kind.FATAL),
        ("Could not open the nd1", Kind.FATAL),
        ("Inconsistent batch sizes found on inputs. Got: [2, 3]", Kind.INPUT),
        ("Tensor input249 allocated on vnc 0 must be allocated on same vnc as model (1)", Kind.CORE),
        ("Mismatch detected between Runtime configuration and NEFF: status=2", Kind.INPUT),
        ("Unknown type name '__torch__.torch.classes.neuron.Model'", Kind.INPUT),
        ("NRT Error NRT_FAILURE(1): nrt_execute", Kind.SUSPECT),
        ("NRT Error NRT_TIMEOUT(5): nrt_execute", Kind.CORE),
        ("the unit returned NRT_EXEC_UNIT_UNRECOVERABLE", Kind.CORE),
        ("NRT_OOB in an indirect copy", Kind.INPUT),
        ("NRT_EXEC_HW_ERR_NC_UE", Kind.CORE),
        ("NRT_EXEC_SW_NQ_OVERFLOW", Kind.SUSPECT),
        ("NRT Execution error occurred on Neuron for operation=aten::mm", Kind.SUSPECT),
        ("NRT Execution error occurred on Neuron for operation=aten::mm status=1003", Kind.INPUT),
        ("too many DGE notifications", Kind.SUSPECT),
    ],
)
def test_the_texts_that_are_known(text, kind):
    assert cause(RuntimeError(FRAME + text)).kind is kind
    assert classify(RuntimeError(FRAME + text)) is FAULTS[kind]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("forward() is missing value for argument 'x'."),
        RuntimeError("forward() Expected a value of type 'Tensor' for argument 'x' but instead found type 'int'."),
        torch.jit.Error("the length must be even"),
        ValueError("of the model"),
        RuntimeError(),
        KeyboardInterrupt(),
        RuntimeError("exit status 5"),
        RuntimeError("the tokeniser ended with exit_status=13"),
        ValueError("cannot read 'status=5'"),  # the user's own, quoting an input
        ValueError("status=14"),
        KeyError("NRT_TIMEOUT(5)"),
        LookupError("no entry for 'NRT Execution error occurred on Neuron'"),
        TypeError("'Neuron Runtime could not be initialized' is no text"),
    ],
)
def test_anything_else_is_about_the_input(error):
    assert cause(error) is None
    assert classify(error) is Fault.INPUT


def test_an_error_that_cannot_be_read_is_about_the_input():
    class Unreadable(Exception):
        def __str__(self):
            raise ValueError("no")

    assert classify(Unreadable()) is Fault.INPUT
    assert last_line(Unreadable()) == "Unreadable"


def test_a_repeated_failure_is_the_cores():
    repeated = Repeated("twice")
    repeated.__cause__ = raised(1)
    assert classify(repeated) is Fault.CORE


def test_what_the_device_said_is_the_last_line():
    assert last_line(raised(5, "Timeout Exceeded")).endswith("status=5 message=Timeout Exceeded")
    assert last_line(RuntimeError("one line ")) == "one line"
    assert last_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("code", [2, 4, 5, 9, 10, 1006, 1201, 1202, 1203, 1204, 1205])
def test_what_has_a_remedy_says_it(code):
    assert faults.STATUS[code].advice

"""What ends a stage is one sentence where it can be mended, whoever said it."""

import errno

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError, explain_os_error, first_sentence
from ppo_vs_dpo.artifacts.guards import refusals


def raised(function):
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def from_transformers():
    from transformers import AutoConfig

    AutoConfig.for_model("no such architecture")


def from_peft():
    from peft import LoraConfig, get_peft_model
    from torch import nn

    get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["nowhere"]))


@pytest.mark.parametrize(("function", "library"), [(from_transformers, "transformers"), (from_peft, "peft")])
def test_a_library_s_refusal_is_one_sentence_that_names_it(function, library):
    said = refusals.explain(raised(function))
    assert said.startswith(f"{library} refuses: ")
    assert "\n" not in said


def test_our_own_mistakes_are_no_refusals():
    def mistake():
        [].pop()

    error = raised(mistake)
    assert refusals.explain(error) is None
    assert refusals.of_a_defect(error).startswith("IndexError: pop from empty list (test_refusals.py, line ")


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0",
        "[enforce fail at inline_container.cc:672] . unexpected pos 672576 vs 672464",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
        "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device",
    ],
)
def test_a_full_disk_is_said_however_it_arrives(message):
    assert "the disk is full" in refusals.explain(RuntimeError(message))
    outer = RuntimeError("saving failed")
    outer.__cause__ = OSError(errno.ENOSPC, "x", "weights")
    assert "the disk is full (weights)" in refusals.explain(outer)


@pytest.mark.parametrize(
    "number",
    [
        errno.EROFS,
        errno.EACCES,
        errno.ENAMETOOLONG,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ENOENT,
        errno.EIO,
        errno.EMFILE,
    ],
)
def test_an_operating_system_s_errors_are_sentences(number):
    said = explain_os_error(OSError(number, "why", "runs/x"))
    assert said.endswith(".") or said.endswith("...")
    assert "runs/x" in said or number == errno.EMFILE


def test_memory_that_is_full_is_a_sentence():
    outer = RuntimeError("in the backward pass")
    outer.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")
    for error in (outer, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        said = refusals.explain(error)
        assert said.startswith("memory is full: ")
        assert "ppo-vs-dpo plan" in said
        assert "\n" not in said


def test_a_user_s_error_is_its_own_words():
    assert refusals.explain(UserError("as it is")) == "as it is"


def test_an_error_without_a_word_is_said_by_its_name():
    assert first_sentence(ValueError()) == "ValueError"
    assert first_sentence(OSError("\n  a line\nanother")) == "a line"

"""The checkup of the training side: a real one, here."""

from __future__ import annotations

import pytest

from edge_sdk.agent.doctor.checkup import run_checkup
from edge_sdk.protocol.checkup import Accounting, Decoding, Kernel, Packing, StepFailed, Versions
from edge_sdk.training.checkup import not_limited

pytestmark = pytest.mark.alone


def test_everything_that_training_needs_is_tried() -> None:
    found = {type(line): line for line in run_checkup()}
    assert StepFailed not in found
    assert found.keys() >= {Accounting, Versions, Kernel, Packing, Decoding}


def test_the_limit_is_lifted_again() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert not_limited() == "" or "MiB" in not_limited()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before

"""SoftmaxCrossEntropyLoss and NegativeLogLikelihoodLoss, whole and with the batch shared out."""

from __future__ import annotations

import itertools

import numpy as np
import one_node
import pytest

import onnxmesh
from onnxmesh.runtime.plan import Collective

RNG = np.random.default_rng(1)
SCORES = RNG.standard_normal((4, 5, 3)).astype(np.float32)
TARGET = RNG.integers(0, 5, (4, 3))
WEIGHT = RNG.uniform(0.1, 2, 5).astype(np.float32)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("op", ["SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"])
def test_every_reduction_with_weights_and_ignored_classes(op: str, reduction: str) -> None:
    for weight, ignored in itertools.product((None, WEIGHT), (None, 2, 9)):
        target = TARGET if ignored != 9 else np.where(TARGET == 2, 9, TARGET)
        given = {} if ignored is None else {"ignore_index": ignored}
        inputs = [SCORES, target, *([] if weight is None else [weight])]
        one_node.check(op, inputs, reduction=reduction, **given)


def test_the_log_probabilities_are_an_output() -> None:
    one_node.check("SoftmaxCrossEntropyLoss", [SCORES, TARGET.astype(np.int32), WEIGHT], 2)


def test_the_batch_of_a_mean_is_shared_out_though_its_weights_differ() -> None:
    """Each rank sums up its losses and its weights: a mean of means would be wrong."""
    proto = one_node.model("NegativeLogLikelihoodLoss", [SCORES, TARGET, WEIGHT])
    plan = onnxmesh.compile(proto, dp=2)
    (program,) = plan.programs
    assert [i.attrs["reduce"] for i in program.instructions if isinstance(i, Collective)] == ["sum"]
    assert np.allclose(*(one_node.run(p, [SCORES, TARGET, WEIGHT]) for p in (plan, onnxmesh.compile(proto))))

"""The rules that are known to be missing, by why they are: what tests/rule_gaps.py finds is this and no more."""

from __future__ import annotations

from collections.abc import Mapping

LEFT_OUT: Mapping[str, Mapping[str, list[str]]] = {
    "Partial is better reduced before: the op makes no tensor smaller": {
        "AffineGrid": ["P -> P"],
        "AveragePool": ["P -> P"],
        "CumSum": ["P -> P"],
        "LinearAttention": ["R, P -> P, P", "R, R, P -> P, P"],
        "NegativeLogLikelihoodLoss": ["P -> P", "R, R, P -> P", "R, R, P -> P, P"],
        "GatherElements": ["P -> P"],
        "TensorScatter": ["P, P -> P"],
        "GridSample": ["P -> P"],
        "MaxUnpool": ["P -> P"],
        "Resize": ["P -> P"],
        "ReverseSequence": ["P -> P"],
        "RoiAlign": ["P -> P"],
        "Rotary": ["P -> P", "R, P, P -> P"],
        "ScatterElements": ["P, R, P -> P", "P, S(1), S(1) -> P"],
        "ScatterND": ["P, R, P -> P"],
        "Pad": ["P, P -> P"],
        "OneHot": ["R, R, P -> P"],
        "Fused": ["R, P -> P"],
        "AttentionFinish": ["P -> P"],
    },
    "right up to rounding only: nothing Partial goes through a Cast": {
        "Cast": ["P -> P"],
    },
    "scales and biases are constants, which are never Partial": {
        "GroupNormalization": ["R, P, P -> P"],
        "InstanceNormalization": ["R, P, P -> P"],
        "LayerNormalization": ["R, P, P -> P"],
        "RMSNormalization": ["R, P -> P"],
    },
    "the scores, most of the work, would be computed by every rank": {
        "Attention": ["R, R, P -> P", "R, R, S(3) -> S(3)"],
    },
    "the features of one head are never cut": {
        "AttentionFinish": ["S(3) -> S(3)"],
        "LinearAttention": ["S(4), S(3) -> P, S(2)"],
        "Rotary": ["S(3), S(2), S(2) -> S(3)", "S(3), S(3), S(3) -> S(3)"],
    },
    "not by a whole number: entries lie half way between two, and rounding decides": {
        "Resize": ["S(3) -> S(3)"],
    },
    "strided slices take features apart; their dim stays whole": {
        "Slice": ["S(0) -> S(0)", "S(0; halves) -> S(0; halves)"],
    },
    "`auto_pad` counts as padding, even where it comes to none": {
        "Conv": ["S(2) -> S(2)", "S(2; halves) -> S(2; halves)"],
    },
    "groups are cut whole; a cut within each would spare no more": {
        "ConvTranspose": ["S(1; halves), S(0; halves) -> P"],
    },
}


def known(op: str) -> list[str]:
    """The rules that an op is known to lack."""
    return sorted(gap for ops in LEFT_OUT.values() for gap in ops.get(op, []))


def reason(op: str, gap: str) -> str:
    """Why an op lacks a rule; empty where that is not known."""
    return next((why for why, ops in LEFT_OUT.items() if gap in ops.get(op, [])), "")

"""Attention as repositories that are no packages write it: modules written anew, with the operators in their order."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

from tests.coverage.case import Case

__all__ = ["CASES"]

_READ_ELSEWHERE = "the weights or the scores are stored, returned or read elsewhere"
_OTHER_FORM = "it is no softmax over keys of products of queries and keys, or its weights are normalized anew"
_BROKEN = "the module reads a number from a tensor, where Dynamo ends the graph"
_WARNED = "PyTorch's function warns of masks of two types, where Dynamo ends the graph and leaves the function to eager"

_KEPT = {
    "abinet": (1, _READ_ELSEWHERE),
    "adaptive_span": (1, _OTHER_FORM),
    "annotated_transformer": (1, _READ_ELSEWHERE),
    "anomaly_attention": (1, _READ_ELSEWHERE),
    "aot-top-k": (1, _READ_ELSEWHERE),
    "ast": (1, _OTHER_FORM),
    "axial-deeplab": (1, _READ_ELSEWHERE),
    "ccnet": (1, _OTHER_FORM),
    "ccnet-pam": (1, _OTHER_FORM),
    "chatglm_two_positions": (1, _BROKEN),
    "convit": (1, _OTHER_FORM),
    "cst": (1, _READ_ELSEWHERE),
    "demucs_frequencies": (1, _READ_ELSEWHERE),
    "dense_gat": (2, _OTHER_FORM),
    "dynamic-vit": (1, _OTHER_FORM),
    "edge_augmented": (1, _READ_ELSEWHERE),
    "edge_augmented_last": (1, _OTHER_FORM),
    "espnet_attention": (1, _READ_ELSEWHERE),
    "evit": (1, _READ_ELSEWHERE),
    "explained_vit": (1, _READ_ELSEWHERE),
    "groupvit": (1, _OTHER_FORM),
    "gtrxl_attention": (1, _BROKEN),
    "ip-adapter": (1, _READ_ELSEWHERE),
    "medical_axial_positions": (1, _READ_ELSEWHERE),
    "mingpt_time_mixing": (1, _OTHER_FORM),
    "nezha_relative": (1, _READ_ELSEWHERE),
    "ocr": (1, _OTHER_FORM),
    "openfold_points": (1, _READ_ELSEWHERE),
    "parseq-infinities": (1, _WARNED),
    "pct_offset": (1, _OTHER_FORM),
    "point_transformer_vector": (1, _OTHER_FORM),
    "radtts_aligner": (1, _OTHER_FORM),
    "rosettafold_tied": (1, _OTHER_FORM),
    "slot-attention": (2, _OTHER_FORM),
    "slot_attention": (2, _OTHER_FORM),
    "stosa_distances": (1, _READ_ELSEWHERE),
    "tacotron2_location": (1, _OTHER_FORM),
    "trajectory_transformer": (1, _READ_ELSEWHERE),
    "transformer_xl_same_length": (1, _BROKEN),
    "unimol_pairs": (2, _READ_ELSEWHERE),
    "videocrafter-temporal": (1, _READ_ELSEWHERE),
    "vits_window": (1, _READ_ELSEWHERE),
    "volo": (1, _OTHER_FORM),
    "zipformer_shared": (1, _READ_ELSEWHERE),
}
"""How many attentions of a module no rewrite can serve, and why."""

_ROOMS = sorted(module.name for module in pkgutil.iter_modules(__path__))


def _with_kept(case: Case) -> Case:
    kept, why = _KEPT.get(case.name, (0, ""))
    return dataclasses.replace(case, kept=kept, why_kept=why)


CASES: tuple[Case, ...] = tuple(
    _with_kept(case) for room in _ROOMS for case in importlib.import_module(f"{__name__}.{room}").CASES
)

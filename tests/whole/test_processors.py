"""Attention processors of diffusers that are rewritten in full: every site, nothing left over, and the same numbers."""

from __future__ import annotations

import pytest

from tests.coverage.measure import VALUE_LIMIT
from tests.processors.case import STRUCTURES, Use
from tests.processors.entries import PROCESSORS
from tests.processors.measure import measure_use
from tests.processors.state import definitions, state
from tests.processors.table import reasons

# The names that docs/processors.md has to have a row for, and those of their kind that diffusers has besides.
_NAMES = """
    AttnProcessor AttnProcessor2_0 AttnAddedKVProcessor AttnAddedKVProcessor2_0 AttnProcessorNPU FusedAttnProcessor2_0
    AllegroAttnProcessor2_0 AuraFlowAttnProcessor2_0 FusedAuraFlowAttnProcessor2_0 CogVideoXAttnProcessor2_0
    FusedCogVideoXAttnProcessor2_0 CrossFrameAttnProcessor CustomDiffusionAttnProcessor CustomDiffusionAttnProcessor2_0
    CustomDiffusionXFormersAttnProcessor FluxAttnProcessor2_0 FusedFluxAttnProcessor2_0 FluxSingleAttnProcessor2_0
    HunyuanAttnProcessor2_0 FusedHunyuanAttnProcessor2_0 PAGHunyuanAttnProcessor2_0 PAGCFGHunyuanAttnProcessor2_0
    PAGIdentitySelfAttnProcessor2_0 PAGCFGIdentitySelfAttnProcessor2_0 IPAdapterAttnProcessor IPAdapterAttnProcessor2_0
    IPAdapterXFormersAttnProcessor SD3IPAdapterJointAttnProcessor2_0 FluxIPAdapterJointAttnProcessor2_0
    JointAttnProcessor2_0 PAGJointAttnProcessor2_0 PAGCFGJointAttnProcessor2_0 FusedJointAttnProcessor2_0
    XFormersJointAttnProcessor LoRAAttnProcessor LoRAAttnProcessor2_0 LoRAAttnAddedKVProcessor LoRAXFormersAttnProcessor
    LuminaAttnProcessor2_0 MochiAttnProcessor2_0 MochiVaeAttnProcessor2_0 SanaLinearAttnProcessor2_0
    SanaMultiscaleAttnProcessor2_0 PAGCFGSanaLinearAttnProcessor2_0 PAGIdentitySanaLinearAttnProcessor2_0
    StableAudioAttnProcessor2_0 SlicedAttnProcessor SlicedAttnAddedKVProcessor XFormersAttnProcessor
    XFormersAttnAddedKVProcessor XLAFlashAttnProcessor2_0 XLAFluxFlashAttnProcessor2_0
    CrossFrameAttnProcessor2_0 FluxAttnProcessor2_0_NPU FusedFluxAttnProcessor2_0_NPU
"""
NAMES = _NAMES.split()

# One or two uses of each class that is rewritten in full; `python -m tests.processors` measures all of them.
REWRITTEN = {
    "AttnProcessor": ("cross, mask", "image, group norm", "one key"),
    "AttnProcessor2_0": ("cross, mask", "one key"),
    "SlicedAttnProcessor": ("slices of 8",),
    "CrossFrameAttnProcessor": ("3 frames of 2", "mask"),
    "CrossFrameAttnProcessor2_0": ("8 frames of 1",),
    "PAGIdentitySelfAttnProcessor2_0": ("mask",),
    "PAGCFGIdentitySelfAttnProcessor2_0": ("image, group norm",),
    "PAGHunyuanAttnProcessor2_0": ("rotated",),
    "PAGCFGHunyuanAttnProcessor2_0": ("rotated",),
    "AttnAddedKVProcessor": ("mask",),
    "AttnAddedKVProcessor2_0": ("mask",),
    "CustomDiffusionAttnProcessor": ("cross, mask",),
    "CustomDiffusionAttnProcessor2_0": ("cross",),
    "JointAttnProcessor2_0": ("rms norm",),
    "FusedJointAttnProcessor2_0": ("rms norm",),
    "AuraFlowAttnProcessor2_0": ("joint",),
    "FusedAuraFlowAttnProcessor2_0": ("joint",),
    "CogVideoXAttnProcessor2_0": ("rotated",),
    "FusedCogVideoXAttnProcessor2_0": ("rotated",),
    "FluxAttnProcessor2_0": ("joint",),
    "FusedFluxAttnProcessor2_0": ("joint",),
    "FluxSingleAttnProcessor2_0": ("single",),
    "FusedAttnProcessor2_0": ("cross, mask",),
    "IPAdapterAttnProcessor": ("two adapters", "regions"),
    "IPAdapterAttnProcessor2_0": ("regions",),
    "SD3IPAdapterJointAttnProcessor2_0": ("joint",),
    "FluxIPAdapterJointAttnProcessor2_0": ("two adapters",),
    "AllegroAttnProcessor2_0": ("self",),
    "HunyuanAttnProcessor2_0": ("self, mask",),
    "FusedHunyuanAttnProcessor2_0": ("self, mask",),
    "LuminaAttnProcessor2_0": ("self, grouped",),
    "StableAudioAttnProcessor2_0": ("grouped",),
    "MochiAttnProcessor2_0": ("ragged text",),
    "PAGJointAttnProcessor2_0": ("joint",),
    "PAGCFGJointAttnProcessor2_0": ("joint",),
    "MochiVaeAttnProcessor2_0": ("causal", "single frame"),
    "SanaLinearAttnProcessor2_0": ("long", "short"),
    "SanaMultiscaleAttnProcessor2_0": ("linear", "quadratic"),
    "PAGIdentitySanaLinearAttnProcessor2_0": ("self",),
    "PAGCFGSanaLinearAttnProcessor2_0": ("self",),
}


def use_of(name: str, use: str) -> Use:
    (found,) = (each for each in PROCESSORS[name].uses if each.name == use)
    return found


@pytest.mark.parametrize(("name", "use"), [(name, use) for name, uses in REWRITTEN.items() for use in uses])
def test_is_rewritten_in_full(name: str, use: str) -> None:
    row = measure_use(use_of(name, use), gradients=False)
    assert reasons({**row, "name": name}) == []
    assert row["found"] == row["rewritten"] + row["recognized"] == row["sites"]
    assert row["error"] <= VALUE_LIMIT


@pytest.mark.parametrize("name", ["AttnProcessor", "IPAdapterAttnProcessor"])
def test_is_rewritten_in_full_with_gradients(name: str) -> None:
    row = measure_use(use_of(name, REWRITTEN[name][0]), gradients=True)
    assert reasons({**row, "name": name}) == []
    assert row["with_gradients"]["rewritten"] == row["sites"]
    assert row["wrong_gradients"] == []


def test_every_name_has_its_row() -> None:
    assert sorted(NAMES) == sorted(PROCESSORS)
    assert {processor.structure for processor in PROCESSORS.values()} == set(STRUCTURES)


def test_every_name_is_in_diffusers() -> None:
    assert [name for name in NAMES if not definitions(name)] == []


def test_states() -> None:
    assert str(state("AttnProcessor")) == "class"
    assert str(state("LoRAAttnProcessor")) == "stub"
    assert str(state("FluxAttnProcessor2_0")) == "alias of FluxAttnProcessor, deprecated"
    assert str(state("CrossFrameAttnProcessor")) == "class, moved, deprecated"
    assert str(state("AnAttnProcessorThatWasNever")) == "removed"


def test_what_cannot_run_says_why() -> None:
    """Whether its library is there is not asked: without one its row says what is missing and what was done instead."""
    for name, processor in PROCESSORS.items():
        if processor.structure == "device":
            assert processor.needs, name
        if str(state(name, **processor.arguments)).startswith("stub"):
            assert processor.instead, name

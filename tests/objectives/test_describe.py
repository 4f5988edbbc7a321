"""How an objective describes itself to cards, results pages and reports."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from dmae_ds.config.objectives import ObjectiveConfig, plain_mae
from dmae_ds.config.shipped import shipped_objectives


def section(**keys):
    return TypeAdapter(ObjectiveConfig).validate_python(keys)


@pytest.mark.parametrize("name", shipped_objectives())
def test_the_summary_has_the_name_and_the_facts_have_every_setting(name):
    objective = section(name=name)
    assert objective.summary().startswith(name)
    assert (f"{objective.facts().get('mask_ratio')}" in objective.summary()) == hasattr(
        objective, "mask_ratio"
    )
    sections = {key for key, value in objective.model_dump().items() if isinstance(value, dict)}
    assert set(objective.model_dump()) - sections <= set(objective.facts())


def test_facts_of_sections_are_flat():
    facts = section(name="mae", decoder={"depth": 3}).facts()
    assert facts["decoder_depth"] == 3 and "decoder" not in facts
    facts = section(name="dino", distill={"alpha": 0.5}).facts()
    assert facts["alpha"] == 0.5 and facts["head"] == "mlp2"
    assert "alpha" not in section(name="dino").facts()


def test_feature_distillation_is_found_wherever_it_is_set():
    own = section(name="dmae", alpha=2.0)
    assert own.distillation.alpha == 2.0 and own.distillation_key == "objective"
    nested = section(name="mocov3", distill={"alpha": 3.0})
    assert nested.distillation.alpha == 3.0 and nested.distillation_key == "objective.distill"
    assert "distillation" in nested.summary() and "distillation" not in own.summary()
    assert section(name="mae").distillation is None and section(name="mocov3").distillation is None


def test_plain_mae_has_the_mask_and_decoder_of_the_other_objective():
    assert plain_mae(section(name="dmae", mask_ratio=0.9, norm_pix=True)) == section(
        name="mae", mask_ratio=0.9, norm_pix=True
    )
    assert plain_mae(section(name="dino")) == section(name="mae")

"""Values in a model.json that no model can have are refused by their key, before anything is built."""

import copy

import pytest

from llava_jax import errors
from llava_jax.models import presets

# A place in the description of the preset "tiny" -> [(value, what is said of it)]; "": the whole part.
WRONG = {
    ("llm", "eps"): [("x", "a value of type float"), (-1, "1e-20 to 0.1|between 1e-20"), (float("nan"), "eps")],
    ("llm", "rope_theta"): [("x", "a value of type float"), (0, "between 1 and"), (1e300, "between 1 and")],
    ("llm", "width"): [(48.0, "a value of type int"), (0, "width"), (True, "a value of type int")],
    ("llm", "heads"): [("4", "a value of type int"), (-4, "heads")],
    ("llm", "vocab"): [(-1, "between 1 and"), (10**12, "between 1 and")],
    ("llm", "layers"): [(10**12, "between 1 and 1000"), (0, "layers")],
    ("llm", "max_positions"): [(None, "a value of type int"), (-5, "max_positions")],
    ("llm", "head_width"): [(0, "between 1 and")],
    ("llm", "kv_heads"): [(3, "a multiple of kv_heads=3")],
    ("llm", "tie_embeddings"): [("no", "a value of type bool")],
    ("llm", "colour"): [("red", r"\['colour'\] are missing or unknown")],
    ("llm", ""): [(None, "an object with its sizes"), ([], "an object with its sizes")],
    ("vision", "mean"): [([1, 2], "want 3 numbers"), ("abc", "a value of type"), ([1, 2, "x"], "of type float")],
    ("vision", "std"): [([0, 0, 0], "between 1e-06 and")],
    ("vision", "image_size"): [(29, "a multiple of patch_size=14"), (0, "between 1 and")],
    ("vision", "patch_size"): [(0, "between 1 and")],
    ("vision", "act"): [("x", "quick_gelu or gelu")],
    ("vision", "select_layer"): [(99, "select_layer=99: want between"), (-99, "select_layer=-99: want between")],
    ("vision", "select_feature"): [("x", "patch or cls_patch")],
    ("vision", ""): [(5, "an object with its sizes"), ("clip", "an object with its sizes")],
    ("projector", ""): [(["x"], "a value of type str"), (7, "a value of type str")],
}  # fmt: skip


def cases():
    return [(*place, value, words) for place, found in WRONG.items() for value, words in found]


@pytest.mark.parametrize("part, key, value, words", cases())
def test_a_value_that_no_model_can_have_is_refused_by_its_key(part, key, value, words):
    model = copy.deepcopy(presets.config_to_json(presets.get("tiny")))
    if key:
        model[part][key] = value
    else:
        model[part] = value
    with pytest.raises(ValueError, match=words) as found:
        presets.config_from_json(model)
    assert errors.exit_code(found.value) == 64 and "\n" not in str(found.value)

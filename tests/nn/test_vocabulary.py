"""Labels as text and as numbers; how vocabularies differ is in test_effects.py."""

import numpy as np
import pytest
import torch

from openreml_nn.nn.vocabulary import difference, level_numbers, texts


def test_texts():
    assert texts([1, 2.0, 2.5, "a", np.float32(3.0)]) == ["1", "2", "2.5", "a", "3"]
    assert texts(torch.tensor([1.0, 4.0])) == texts(np.array([1, 4])) == ["1", "4"]


def test_numbers_of_levels():
    assert level_numbers(["0", "2", "3", "-1"], 3).tolist() == [0, 2, -1, -1]
    assert level_numbers([], 3).dtype == np.int64
    with pytest.raises(ValueError, match="no whole numbers, 'a', '-0', '01', and these 3 levels are numbers, from 0"):
        level_numbers(["1", "a", "-0", "01", "x"], 3)


def test_differences():
    assert difference(["a", "b"], ["b", "a"]) == "the order differs, first at level 0, 'a' there and 'b' here"
    assert difference(2, ["a"]) == "it has 2 levels without labels, here are 1 levels with labels"

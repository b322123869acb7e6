import pytest
import torch

from eggroll_rl.errors import ConfigError
from eggroll_rl.fitness import (
    FITNESS_SHAPING,
    best_fraction,
    centered_rank,
    make_fitness_shaping,
    none,
    pair_rank,
    standardize,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_centered_ranks_by_hand():
    assert centered_rank(tensor(30, -1, 10, 1e9)).tolist() == pytest.approx([1 / 6, -1 / 2, -1 / 6, 1 / 2])


def test_equal_fitness_shares_its_ranks():
    # Ranks 0, 1, 2, 3: the two tens share (1 + 2)/2.
    assert centered_rank(tensor(10, 10, -5, 20)).tolist() == pytest.approx([0.0, 0.0, -0.5, 0.5])


def test_z_scores_by_hand():
    # Mean 4, deviation sqrt((9 + 1 + 1 + 9)/4).
    assert standardize(tensor(1, 3, 5, 7)).tolist() == pytest.approx([x / 5**0.5 for x in (-3, -1, 1, 3)])


def test_none_keeps_large_returns():
    assert none(tensor(12_000, -3)).tolist() == [12_000, -3]


def test_best_fraction_by_hand():
    # The pairs (1, 9) and (8, 2) have the better best members; over (1, 9, 8, 2) the mean is 5.
    utilities = best_fraction(tensor(1, 9, 3, 4, 8, 2, 5, 5), fraction=0.5)
    deviation = ((16 + 16 + 9 + 9) / 4) ** 0.5
    expected = [-4, 4, 0, 0, 3, -3, 0, 0]
    assert utilities.tolist() == pytest.approx([2 * x / deviation for x in expected])


def test_pairs_are_ranked_by_the_distance_of_their_members():
    # Distances 4, 1, 4 and 9: ranks 2.5, 1, 2.5 and 4 of 4, half of it for the better member, minus half for the other.
    fitness = tensor(100, 104, 1, 0, -4, 0, 9, 0)
    assert pair_rank(fitness).tolist() == [-2.5 / 8, 2.5 / 8, 1 / 8, -1 / 8, -2.5 / 8, 2.5 / 8, 4 / 8, -4 / 8]


def test_a_fraction_of_one_is_the_z_score():
    fitness = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(best_fraction(fitness, 1.0), standardize(fitness))


@pytest.mark.parametrize("name", ["centered_rank", "pair_rank", "standardize", "best_fraction"])
def test_a_population_without_differences_gives_zero(name):
    assert FITNESS_SHAPING[name](tensor(7, 7, 7, 7)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", list(FITNESS_SHAPING))
def test_permuting_pairs_permutes_utilities(name):
    fitness = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = [3, 0, 5, 1, 4, 2]
    shaped = FITNESS_SHAPING[name](fitness.flatten()).view(6, 2)
    assert torch.allclose(FITNESS_SHAPING[name](fitness[order].flatten()).view(6, 2), shaped[order])


def test_unknown_shaping_is_refused_with_the_known_names():
    with pytest.raises(
        ConfigError, match="centered_rank, pair_rank, sign_of_pair, standardize, centered, none, best_fraction.*'ranks'"
    ):
        make_fitness_shaping("ranks")


def test_a_fraction_needs_its_shaping():
    with pytest.raises(ConfigError, match="best_fraction must be in"):
        make_fitness_shaping("best_fraction", 1.5)
    with pytest.raises(ConfigError, match="only used with"):
        make_fitness_shaping("none", 0.5)

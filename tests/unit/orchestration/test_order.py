from __future__ import annotations

import pytest

from lem.config.campaign_config import CampaignExecutionConfig
from lem.config.experiment import ExperimentConfig
from lem.orchestration.plan import CampaignExperiment, gaps_before, loads_engine, order_experiments

CONFIG = ExperimentConfig.from_dict({"model": "any"})


def experiment(word: str, engines: dict[str, str] | None = None) -> CampaignExperiment:
    """`A1` is configuration A in cycle 0; its engine is the one given, or its own."""
    name, cycle = word[0], int(word[1:]) - 1
    return CampaignExperiment(word, name, CONFIG, {}, "", name, (engines or {}).get(name, name), cycle, 0)


def experiments(text: str, engines: dict[str, str] | None = None) -> list[CampaignExperiment]:
    return [experiment(word, engines) for word in text.split()]


def order(names: str, structure: str, *, cycles: int = 2, seed: int = 42, engines: dict[str, str] | None = None) -> str:
    execution = CampaignExecutionConfig(cycles=cycles, structure=structure, seed=seed)
    ordered = order_experiments([experiment(f"{name}1", engines) for name in names], execution)
    assert [item.order_index for item in ordered] == list(range(len(ordered)))
    return " ".join(f"{item.config_hash}{item.cycle_index + 1}" for item in ordered)


def test_interleaved_runs_every_configuration_in_each_cycle() -> None:
    assert order("ABC", "interleaved") == "A1 B1 C1 A2 B2 C2"


def test_interleaved_lays_equal_engines_together() -> None:
    assert order("ABCD", "interleaved", cycles=1, engines={"A": "x", "C": "x", "D": "x"}) == "A1 C1 D1 B1"


def test_grouped_runs_all_cycles_of_a_configuration() -> None:
    assert order("AB", "grouped", cycles=3) == "A1 A2 A3 B1 B2 B3"


def test_shuffled_has_every_configuration_once_a_cycle_in_an_order_of_its_own() -> None:
    words = order("ABCDEFGH", "shuffled", cycles=3).split()
    cycles = [words[:8], words[8:16], words[16:]]
    for number, cycle in enumerate(cycles, start=1):
        assert sorted(cycle) == [f"{name}{number}" for name in "ABCDEFGH"]
    assert len({"".join(word[0] for word in cycle) for cycle in cycles}) == 3


def test_shuffled_keeps_equal_engines_together_and_shuffles_both_engines_and_their_configurations() -> None:
    engines = {"A": "x", "B": "y", "C": "x", "D": "y", "E": "x", "F": "y"}
    seen = set()
    for seed in range(40):
        names = [word[0] for word in order("ABCDEF", "shuffled", cycles=1, seed=seed, engines=engines).split()]
        keys = "".join(engines[name] for name in names)
        assert keys in ("xxxyyy", "yyyxxx")
        seen.add((keys, "".join(name for name in names if engines[name] == "x")))
    assert {keys for keys, _ in seen} == {"xxxyyy", "yyyxxx"}
    assert len({names for _, names in seen}) == 6


def test_shuffle_is_the_same_for_a_seed_everywhere() -> None:
    # Written down from CPython 3.11; every version and machine must agree, since the seed stands for the order.
    assert order("ABCDEF", "shuffled", cycles=1, seed=42) == "D1 A1 F1 C1 B1 E1"
    assert order("ABCDEF", "shuffled", seed=1) != order("ABCDEF", "shuffled", seed=2)


def test_another_cycle_leaves_the_order_of_the_others() -> None:
    assert order("ABCD", "shuffled", cycles=3).startswith(order("ABCD", "shuffled", cycles=2))


@pytest.mark.parametrize("structure", ["interleaved", "shuffled", "grouped"])
def test_nothing_to_order(structure: str) -> None:
    assert order("", structure) == ""


# Gaps


@pytest.mark.parametrize(
    ("structure", "planned", "gaps"),
    [
        ("interleaved", "A1 B1 A2 B2", "- configuration cycle configuration"),
        ("shuffled", "B1 A1 A2 B2", "- configuration cycle configuration"),
        ("grouped", "A1 A2 B1 B2", "- configuration cycle configuration"),
        # A resumed part: the first cycle ends with B, though B is not the last of the campaign's configurations.
        ("interleaved", "B1 A2 B2 C2", "- cycle configuration configuration"),
        ("interleaved", "C1 C2 C3", "- cycle cycle"),
        ("grouped", "A3 B1 B3 C2", "- cycle configuration cycle"),
        ("interleaved", "A1", "-"),
    ],
)
def test_gaps(structure: str, planned: str, gaps: str) -> None:
    assert [kind or "-" for kind in gaps_before(experiments(planned), structure)] == gaps.split()


def test_no_experiments_have_no_gaps_and_no_loads() -> None:
    assert gaps_before([], "interleaved") == []
    assert loads_engine([], reuse="cycle") == []


# Loads


@pytest.mark.parametrize(
    ("planned", "reuse", "is_cold", "loads"),
    [
        ("A1 B1 C1 A2 B2 C2", "cycle", False, "1 0 1 1 0 1"),
        ("A1 B1 C1 A2 B2 C2", "campaign", False, "1 0 1 1 0 1"),
        ("A1 B1 C1 A2 B2 C2", "none", False, "1 1 1 1 1 1"),
        ("A1 B1 C1 A2 B2 C2", "campaign", True, "1 1 1 1 1 1"),
        ("A1 A2 A3", "campaign", False, "1 0 0"),
        ("A1 A2 A3", "cycle", False, "1 1 1"),
        ("A1 C1 B1", "cycle", False, "1 1 1"),
        ("B2", "cycle", False, "1"),
    ],
)
def test_loads(planned: str, reuse: str, is_cold: bool, loads: str) -> None:
    found = loads_engine(experiments(planned, {"A": "x", "B": "x"}), reuse=reuse, is_cold=is_cold)
    assert "".join(str(int(item)) for item in found) == loads.replace(" ", "")

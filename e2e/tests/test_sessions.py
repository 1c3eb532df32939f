"""Agent sessions: deterministic, token-exact prefixes, and the published quantiles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blackwell_kernels.e2e import sessions as s

AGENT = s.SCENARIOS["agent"]
DEMO = s.SCENARIOS["demo"]


@pytest.fixture(scope="module")
def many() -> list[s.Session]:
    return s.preview(AGENT, 400)


def test_same_seed_same_traffic() -> None:
    first, again = s.preview(DEMO, 20), s.preview(DEMO, 20)
    assert first == again
    assert [x.prompt(1) for x in first] == [x.prompt(1) for x in again]
    other = s.preview(s.named("demo", seed=1), 20)
    assert [x.turns for x in other] != [x.turns for x in first]
    assert other[0].prompt(0) != first[0].prompt(0)


def test_a_prompt_grows_by_the_answer_and_fresh_tokens() -> None:
    seen = 0
    for one in s.preview(DEMO, 30):
        for i, (before, turn) in enumerate(itertools.pairwise(one.turns), 1):
            old, new = one.prompt(i - 1), one.prompt(i)
            if turn.compacted:
                assert len(new) < len(old) + before.output + turn.fresh
                continue
            seen += 1
            assert new[: len(old)] == old
            assert len(new) == len(old) + before.output + turn.fresh
    assert seen > 100


def test_sessions_share_tools_and_system_prompt_and_nothing_else() -> None:
    one, two = s.preview(DEMO, 2)
    shared = s.shared_tokens(DEMO)
    assert one.prompt(0)[:shared] == two.prompt(0)[:shared]
    assert one.prompt(0)[shared:][:8] != two.prompt(0)[shared:][:8]


def test_context_never_exceeds_the_limit_and_tokens_stay_in_the_vocabulary() -> None:
    for one in s.preview(s.named("demo", max_context=400), 40):
        for i, turn in enumerate(one.turns):
            prompt = one.prompt(i)
            assert len(prompt) + turn.output <= 400
            assert min(prompt) >= DEMO.first_token
            assert max(prompt) < DEMO.vocab


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("turns", (7, 45, 156), 0.2),
        ("output", (105, 216, 899), 0.05),
        ("fresh", (192, 704, 4032), 0.05),
        ("input", (43308, 104644, 235882), 0.35),
    ],
)
def test_published_quantiles(many: list[s.Session], name: str, published: tuple[int, ...], tolerance: float) -> None:
    values: list[int] = []
    for one in many:
        context = s.shared_tokens(AGENT)
        if name == "turns":
            values.append(len(one.turns))
            continue
        for turn in one.turns:
            if turn.compacted:
                assert isinstance(one, s.Made)
                context = s.shared_tokens(AGENT) + one.summary_tokens
            context += turn.fresh
            values.append({"output": turn.output, "fresh": turn.fresh, "input": context}[name])
            context += turn.output
    assert np.percentile(values, (10, 50, 90)) == pytest.approx(published, rel=tolerance)


def test_arrivals_are_poisson_and_split_over_workers() -> None:
    starts = np.array([x.start_s for x in s.preview(s.named("demo", sessions_per_s=2.0), 2000)])
    gaps = np.diff(starts)
    assert gaps.mean() == pytest.approx(0.5, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # an exponential's
    parts = [list(itertools.islice(s.sessions(DEMO, worker, 3), 5)) for worker in range(3)]
    assert sorted(x.id for part in parts for x in part) == list(range(15))
    assert {x.id: x for part in parts for x in part} == {x.id: x for x in s.preview(DEMO, 15)}


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_arrivals_keep_the_rate_and_have_the_burstiness(burstiness: float) -> None:
    scenario = s.named("demo", arrivals="gamma", sessions_per_s=2.0, burstiness=burstiness)
    gaps = np.diff(list(itertools.islice(s.arrivals(scenario), 20_000)))
    assert gaps.mean() == pytest.approx(0.5, rel=0.06)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_sub_agents_share_their_own_prefix_and_fit_the_context() -> None:
    scenario = s.named("demo", fanout_share=0.5)
    found = [turn for one in s.preview(scenario, 40) for turn in one.turns]
    with_agents = [turn for turn in found if turn.agents]
    later = [turn for one in s.preview(scenario, 40) for turn in one.turns[1:]]
    assert len(with_agents) / len(later) == pytest.approx(0.5, abs=0.1)
    assert {len(turn.agents) for turn in with_agents} == {2, 3, 4}
    agents = [agent for turn in with_agents for agent in turn.agents]
    assert len({agent.id for agent in agents}) == len(agents)
    shared = agents[0].parts(0)[0][1]
    for agent in agents[1:20]:
        assert agent.prompt(0)[:shared] == agents[0].prompt(0)[:shared]
        assert agent.prompt(0)[shared:][:4] != agents[0].prompt(0)[shared:][:4]
    for agent in agents:
        for i, turn in enumerate(agent.turns):
            assert agent.prompt_tokens(i) + turn.output <= scenario.max_context
            assert agent.reusable(i) <= agent.prompt_tokens(i)
    # the parents' own turns are what they are without
    plain = s.preview(s.named("demo"), 40)
    assert [(t.fresh, t.output) for one in plain for t in one.turns] == [(t.fresh, t.output) for t in found]


def test_some_requests_are_dropped_half_way() -> None:
    found = [turn for one in s.preview(s.named("demo", abort_share=0.3), 60) for turn in one.turns]
    dropped = [turn for turn in found if turn.abort_after]
    assert len(dropped) / len(found) == pytest.approx(0.3, abs=0.06)
    assert all(1 <= turn.abort_after <= max(1, turn.output // 2) for turn in dropped if turn.abort_after)
    assert not any(turn.abort_after for one in s.preview(DEMO, 20) for turn in one.turns)


def test_reusable_tokens_are_the_previous_prompt() -> None:
    for one in s.preview(DEMO, 20):
        for i in range(1, len(one.turns)):
            if not one.turns[i].compacted:
                assert one.reusable(i) == len(one.prompt(i - 1))
        assert one.reusable(0) == s.shared_tokens(DEMO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrivals": "uniform"}, "unknown arrivals 'uniform'; there are poisson, gamma, trace"),
        ({"sessions_per_s": 0.0}, "must be above 0"),
        ({"burstiness": 0.0}, "must be above 0"),
        ({"abort_share": 2.0}, "between 0 and 1"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        s.Scenario.from_dict(changes)


def test_joining_midway_skips_turns_but_not_their_tokens() -> None:
    early, late = s.preview(DEMO, 1)[0], s.preview(s.named("demo", join_midway=True), 1)[0]
    assert 0 < late.first_turn < len(late.turns)
    assert late.prompt(late.first_turn) == early.prompt(late.first_turn)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"unknown scenario 'x'; there are agent, agent64k, short, fanout, bursty, demo, soak"
    ):
        s.named("x")
    with pytest.raises(ValueError, match="unknown scenario settings speed"):
        s.Scenario.from_dict({"speed": 1})
    assert s.Scenario.from_dict(DEMO.to_dict()) == DEMO

"""The table of state transitions, and the forms in which registration stores a flow."""

from __future__ import annotations

import json

import pytest

from flowagent.models import LIVE, TERMINAL, TRANSITIONS, FlowSpec, State, sources_of
from flowagent.store.states import IS_LIVE, may_enter, within


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set().union(*TRANSITIONS.values()) == set(State)


def test_nothing_follows_a_terminal_state() -> None:
    assert set(TERMINAL) == {State.COMPLETED, State.FAILED, State.CRASHED, State.CANCELLED}
    assert [state for state in State if state.terminal] == list(TERMINAL)


def test_live_states_are_those_between_claim_and_end() -> None:
    assert (
        {state for state in State if state.live}
        == set(LIVE)
        == set(State) - set(TERMINAL) - {State.SCHEDULED}
    )


@pytest.mark.parametrize("target", State)
def test_sources_are_the_table_read_backwards(target: State) -> None:
    assert set(sources_of(target)) == {state for state in State if target in TRANSITIONS[state]}


def test_every_state_leads_to_an_end_and_can_be_cancelled() -> None:
    for state in set(State) - set(TERMINAL):
        assert State.CANCELLED in TRANSITIONS[state]


def test_what_is_being_cancelled_never_runs_again() -> None:
    assert TRANSITIONS[State.CANCELLING] <= set(TERMINAL)


def test_conditions_of_statements_follow_the_table() -> None:
    assert may_enter(State.PENDING) == "state = 'scheduled'"
    assert may_enter(State.SCHEDULED) == "state IN ('pending', 'running')"
    assert within([State.FAILED], "r.state") == "r.state = 'failed'"
    assert within(LIVE) == IS_LIVE == "state IN ('pending', 'running', 'cancelling')"


@pytest.mark.parametrize(
    "spec",
    [
        FlowSpec("bare", "function", {"type": "Local"}, None),
        FlowSpec(
            "full", "dag", {"type": "Local"}, {"env": {}}, ("a", "b"), ({"name": "p", "required": True},),
            ({"slug": "t", "upstream": []},), ("S",), {"type": "Local"}, "project",
        ),
    ],
)  # fmt: skip
def test_flow_spec_and_its_json_are_inverses(spec: FlowSpec) -> None:
    assert FlowSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_of_a_flow_spec_does_not_depend_on_order() -> None:
    one = FlowSpec("f", "dag", {}, None, labels=("b", "a"), secrets=("y", "x"))
    other = FlowSpec("f", "dag", {}, None, labels=("a", "b"), secrets=("x", "y"))
    assert one.to_json() == other.to_json()

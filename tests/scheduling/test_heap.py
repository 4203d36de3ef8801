from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sqla_fairpool.scheduling.heap import Agenda

items = st.integers(0, 8)
steps = st.one_of(
    st.tuples(st.just("put"), items, st.integers(0, 20)),
    st.tuples(st.just("remove"), items),
)


@given(st.lists(steps, max_size=200))
def test_agenda_is_a_dict_sorted_by_value(script):
    agenda, model = Agenda(), {}
    for step in script:
        if step[0] == "put":
            agenda.put(step[1], step[2])
            model[step[1]] = step[2]
        else:
            agenda.remove(step[1])
            model.pop(step[1], None)
        first = agenda.first()
        assert len(agenda) == len(model)
        if model:
            assert first is not None
            assert first[0] == min(model.values()) == model[first[1]]
        else:
            assert first is None


def test_dead_entries_do_not_pile_up():
    agenda = Agenda()
    for n in range(10_000):
        agenda.put("a", n)
        agenda.put("b", -n)
    assert len(agenda._heap) < 100
    assert agenda.first() == (-9_999, "b")

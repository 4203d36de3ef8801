"""A heap whose keys can be changed, against a dict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sqla_fairpool.scheduling.tags import IndexedHeap

items = st.integers(0, 8)
steps = st.one_of(
    st.tuples(st.just("put"), items, st.integers(0, 20)),
    st.tuples(st.just("remove"), items),
)


@given(st.lists(steps, max_size=200))
def test_heap_is_a_dict_sorted_by_value(script):
    heap, model = IndexedHeap(), {}
    for step in script:
        if step[0] == "put":
            heap.put(step[1], step[2])
            model[step[1]] = step[2]
        else:
            heap.remove(step[1])
            model.pop(step[1], None)
        first = heap.first()
        assert len(heap) == len(model)
        if model:
            assert first is not None
            assert first[0] == min(model.values()) == model[first[1]]
        else:
            assert first is None


def test_replaced_entries_do_not_pile_up():
    heap = IndexedHeap()
    for n in range(10_000):
        heap.put("a", n)
        heap.put("b", -n)
    assert len(heap._heap) < 100
    assert heap.first() == (-9_999, "b")

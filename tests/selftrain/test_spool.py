"""Objects set aside on disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.errors import UserError
from tw_jax.selftrain.spool import Spool

OBJECTS = st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text()))


@given(items=st.lists(OBJECTS, max_size=20), order=st.randoms())
def test_every_object_comes_back_in_any_order(tmp_path_factory, items, order):
    folder = tmp_path_factory.mktemp("spool")
    with Spool(folder) as spool:
        numbers = [spool.append(item) for item in items]
        assert numbers == list(range(len(items))) and len(spool) == len(items)
        assert list(spool) == items
        order.shuffle(numbers)
        assert [spool[number] for number in numbers] == [items[number] for number in numbers]
        spool.append({"behind": 1})  # reading does not move where is written
        assert spool[len(items)] == {"behind": 1}
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot write there"):
        Spool(tmp_path / "missing")

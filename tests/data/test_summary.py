"""Figures of a dataset from those of its parts, by hand."""

import numpy as np
import pyarrow as pa

from recgpt.data.summary import summarise, summarise_part

DAY = 86_400


def histories(lists):
    return pa.table(
        {
            "item_indices": pa.array(
                [[item for item, _ in history] for history in lists], pa.list_(pa.int32())
            ),
            "timestamps": pa.array(
                [[time for _, time in history] for history in lists], pa.list_(pa.int64())
            ),
        }
    )


def test_figures_by_hand():
    is_new = np.array([False, False, True, False])
    first = summarise_part(histories([[(1, 0), (2, DAY)], [(1, DAY)]]), "seconds", DAY, is_new)
    second = summarise_part(histories([[(3, DAY), (1, 3 * DAY)]]), "seconds", DAY, is_new)
    summary = summarise([first, second], np.array([3, 1, 1]), has_timestamps=True)
    assert summary.interactions_per_day == {"1970-01-01": 1, "1970-01-02": 3, "1970-01-04": 1}
    assert summary.users_by_length == {1: 1, 2: 2}
    assert summary.item_counts == [(1, 3), (2, 1), (3, 1)]
    assert (summary.cold_item_share, summary.cold_interaction_share) == (1.0, 1.0)
    assert summary.new_item_share == 1 / 4  # item 2, of the four interactions from the second day on


def test_without_instants_there_are_no_days_and_without_times_no_new_items():
    part = summarise_part(histories([[(1, 5), (1, 6)]]), None, 6, np.array([False, True]))
    summary = summarise([part], np.array([7]), has_timestamps=False)
    assert summary.interactions_per_day == {}
    assert summary.new_item_share is None
    assert (summary.cold_item_share, summary.cold_interaction_share) == (0.0, 0.0)


def test_times_outside_the_calendar_have_no_date():
    part = summarise_part(histories([[(1, 0), (1, 2**60), (1, -(2**60))]]), "seconds", 0, np.zeros(2, bool))
    assert summarise([part], np.array([3]), True).interactions_per_day == {"1970-01-01": 1}

"""Metrics on matrices whose values are known by hand."""

import numpy as np
import pandas as pd
import pytest

from cil.evaluate import average, backward_transfer, forgetting, last, matrix, scores, seen

N = np.nan
THREE = np.array([[0.9, N, N], [0.6, 0.8, N], [0.7, 0.5, 0.9]])
SIZES = np.array([50, 10, 10])


def test_three_tasks_by_task():
    assert seen(THREE).tolist() == pytest.approx([0.9, 0.7, 0.7])
    assert last(THREE) == pytest.approx(0.7)
    assert average(THREE) == pytest.approx((0.9 + 0.7 + 0.7) / 3)
    # The best before the last task: 0.9 of (0.9, 0.6) and 0.8.
    assert forgetting(THREE) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert backward_transfer(THREE) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)


def test_unequal_tasks_by_image():
    assert last(THREE, SIZES) == pytest.approx((50 * 0.7 + 10 * 0.5 + 10 * 0.9) / 70)
    assert average(THREE, SIZES) == pytest.approx((0.9 + (50 * 0.6 + 10 * 0.8) / 60 + 49 / 70) / 3)
    assert forgetting(THREE, SIZES) == pytest.approx((50 * 0.2 + 10 * 0.3) / 60)
    assert backward_transfer(THREE, SIZES) == pytest.approx(-(50 * 0.2 + 10 * 0.3) / 60)


def test_two_tasks_forget():
    """0 after two tasks is a known bug of others."""
    a = np.array([[0.9, N], [0.4, 0.8]])
    assert forgetting(a) == pytest.approx(0.5) and backward_transfer(a) == pytest.approx(-0.5)


def test_forgetting_is_negative_where_a_task_improves_at_last():
    a = np.array([[0.5, N], [0.7, 0.8]])
    assert forgetting(a) == pytest.approx(-0.2) and backward_transfer(a) == pytest.approx(0.2)


def test_one_task_has_no_forgetting():
    a = np.array([[0.9]])
    assert last(a) == average(a) == 0.9
    assert np.isnan(forgetting(a)) and np.isnan(backward_transfer(a))


def table(rows):
    columns = ["task", "on_task", "images", "correct", "accuracy"]
    return pd.DataFrame([(t, j, n, round(n * x), x) for t, j, n, x in rows], columns=columns)


def test_matrix_from_the_table():
    a, sizes = matrix(table([(0, 0, 50, 0.9), (1, 1, 10, 0.8), (1, 0, 50, 0.6)]))
    np.testing.assert_array_equal(a, [[0.9, N], [0.6, 0.8]])
    assert sizes.tolist() == [50, 10]


def test_terminal_joint_training_has_a_last_accuracy_only():
    found = scores(table([(2, 0, 50, 0.7), (2, 1, 10, 0.5), (2, 2, 10, 0.9)]))
    assert found == {"Last": pytest.approx(0.7)}


def test_joint_models_have_nothing_to_forget():
    rows = table([(0, 0, 50, 0.9), (1, 0, 50, 0.6), (1, 1, 10, 0.8)])
    assert list(scores(rows, "joint")) == ["Last", "Avg"] and list(scores(rows)) == ["Last", "Avg", "Fgt", "BWT"]

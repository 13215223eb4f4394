import pytest
import torch

from cil.scenario import ICARL_CIFAR100, Scenario, class_order, relabel


@pytest.mark.parametrize(
    "spec, sizes",
    [("B100-1", [100]), ("B30-40", [30, 40, 30])],
)
def test_tasks(spec, sizes):
    scenario = Scenario(spec, 100)
    assert [len(task.labels) for task in scenario] == sizes
    assert [label for task in scenario for label in task.labels] == list(range(100))


def test_slice_is_the_joint_counterpart():
    scenario = Scenario("B4-2", 10)
    assert scenario[1].labels == range(4, 6)
    assert scenario[:3].labels == range(0, 8)
    assert scenario[-1].labels == range(8, 10)
    labels = torch.tensor([0, 5, -1, 9, 4])
    assert scenario[1].select(labels).tolist() == [1, 4]
    assert scenario[:4].select(labels).tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("spec", ["10-10", "B0-10", "B10-0", "Bx-y", "", "B200-1"])
def test_bad_spec(spec):
    with pytest.raises(ValueError, match="scenario="):
        Scenario(spec, 100)


def test_class_order():
    assert sorted(ICARL_CIFAR100) == list(range(100))
    assert class_order("icarl", 100)[:3] == [87, 0, 52] and class_order("icarl", 100)[-1] == 39
    assert (
        class_order("imagenet100", 100)[:5] == [68, 56, 78, 8, 23] and len(set(class_order("imagenet100", 100))) == 100
    )
    assert class_order("alphabetical", 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="alphabetical"):
        class_order("icarl", 10)


def test_relabel():
    assert relabel(torch.tensor([0, 1, 2, 3, 3]), [3, 1, 0, 2], 3).tolist() == [2, 1, -1, 0, 0]


@pytest.mark.parametrize(
    "order, first, last", [("icarl", [87, 0, 52], [26, 35, 39]), ("imagenet100", [68, 56, 78], None)]
)
@pytest.mark.parametrize(
    "spec, sizes",
    [("B10-10", [10] * 10), ("B5-5", [5] * 20), ("B50-10", [50] + [10] * 5), ("B50-5", [50] + [5] * 10)],
)
def test_task_tables_of_the_paper(spec, sizes, order, first, last):
    """Of both data sets, 100 classes each; a task's labels are positions in the class order."""
    scenario, classes = Scenario(spec, 100), class_order(order, 100)
    assert [len(task.labels) for task in scenario] == sizes
    assert [label for task in scenario for label in task.labels] == list(range(100)) == sorted(classes)
    assert [classes[k] for k in scenario[0].labels][:3] == first
    assert last is None or [classes[k] for k in scenario[-1].labels][-3:] == last
    labels = relabel(torch.arange(100), classes, 100)
    assert [set(task.select(labels).tolist()) for task in scenario] == [
        {classes[k] for k in task.labels} for task in scenario
    ]

import torch

from cil.memory import budget_per_class, herd, remember
from cil.tables import MEMORY


def test_herding_starts_with_the_image_nearest_to_the_mean():
    torch.manual_seed(0)
    features = torch.randn(30, 5)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    assert herd(features, 1) == [int((unit @ unit.mean(0)).argmax())]


def test_herding_never_repeats_and_prefixes_agree():
    torch.manual_seed(0)
    features = torch.randn(40, 8)
    picked = herd(features, 20)
    assert len(set(picked)) == 20 and herd(features, 7) == picked[:7]
    assert sorted(herd(features[:5], 9)) == list(range(5))  # no more than there are


def test_herded_mean_is_nearer_than_a_random_one():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(200, 16) + 1, dim=1)

    def error(rows):
        return (features[rows].mean(0) - features.mean(0)).norm()

    random = torch.stack([error(torch.randperm(200)[:20]) for _ in range(50)])
    assert error(herd(features, 20)) < random.min()


def test_memory_over_tasks_stays_within_budget():
    torch.manual_seed(0)
    memory = None
    for task in range(4):
        labels = torch.arange(2 * task, 2 * task + 2).repeat_interleave(30)
        indices = torch.randperm(1000)[:60]
        previous, m = memory, budget_per_class(50, 2 * (task + 1))
        memory = MEMORY.check(remember(memory, torch.randn(60, 4), labels, indices, m))
        assert len(memory) <= 50 and set(memory.groupby("label").size()) == {m}
        assert set(memory[memory["label"] >= 2 * task]["image"]) <= set(indices.tolist())
        if previous is not None:  # old classes keep their first m
            for label, rows in previous.groupby("label"):
                assert memory[memory["label"] == label]["image"].tolist() == rows["image"].tolist()[:m]

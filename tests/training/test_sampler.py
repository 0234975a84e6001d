import pytest
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.training.sampler import ResumableBatchSampler, SeededDataset, TrainLoader


def batches(sampler, epoch, skip=0):
    sampler.set_epoch(epoch, skip)
    return list(sampler)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    sampler = ResumableBatchSampler(10, 3, seed=1, drop_last=False)
    first = batches(sampler, 0)
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    assert sorted(index for batch in first for index in batch) == list(range(10))
    assert batches(sampler, 0) == first
    assert batches(sampler, 1) != first
    assert batches(ResumableBatchSampler(10, 3, seed=2, drop_last=False), 0) != first


def test_skip_starts_in_the_middle():
    sampler = ResumableBatchSampler(11, 2, seed=1)
    assert len(sampler) == 5
    assert batches(sampler, 3, skip=2) == batches(sampler, 3)[2:]


@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_batches_of_one(drop_last):
    alone = batches(ResumableBatchSampler(11, 4, seed=5, drop_last=drop_last), 2)
    parts = [
        batches(ResumableBatchSampler(11, 2, seed=5, drop_last=drop_last, rank=rank, world_size=2), 2)
        for rank in (0, 1)
    ]
    together = [one + other for one, other in zip(*parts, strict=True)]
    assert together[:2] == alone[:2]
    if not drop_last:
        # 3 are left for 2 processes: the first of the permutation is repeated.
        assert together[2] == [*alone[2], alone[0][0]]


def test_fewer_samples_than_a_batch_is_an_error():
    with pytest.raises(UserError, match=r"run\.batch_size_train: 4 .* 3"):
        ResumableBatchSampler(3, 4, seed=0)


def test_samples_depend_on_seed_epoch_and_index_only(stubs):
    def sample(seed, epoch, index, before=0):
        data = SeededDataset(stubs.Pictures(), seed)
        data.set_epoch(epoch)
        torch.manual_seed(before)
        return data[index]["image"]

    assert torch.equal(sample(1, 2, 3), sample(1, 2, 3, before=99))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(sample(1, 2, 3), sample(*other))


def test_workers_make_the_batches_of_the_main_process(stubs):
    alone = TrainLoader(stubs.Pictures(), 4, seed=3)
    helped = TrainLoader(stubs.Pictures(), 4, seed=3, num_workers=2)
    first, second = list(alone.epoch(1, skip=2)), list(helped.epoch(1, skip=2))
    assert len(first) == len(second) == len(alone) - 2
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["image"], other["image"])


def test_the_loader_leaves_the_global_generator_alone(stubs):
    loader = TrainLoader(stubs.Pictures(noise=0), 4, seed=3, num_workers=1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_set_epoch_reaches_concatenated_sets(stubs):
    parts = [stubs.Pictures(), stubs.Pictures()]
    SeededDataset(torch.utils.data.ConcatDataset(parts), 0).set_epoch(4)
    assert [part.epochs for part in parts] == [[4], [4]]


def test_the_data_set_makes_the_batches(stubs):
    class Own(stubs.Pictures):
        def collater(self, items):
            return len(items)

    assert list(TrainLoader(Own(), 4, seed=0).epoch(0)) == [4] * 5


def test_pictures_of_a_group_come_together_with_another_caption_each_time():
    # 4 groups of 3 pictures with 2 captions each
    groups = [(g, f"{g}-{p}") for g in range(4) for p in range(3) for _ in range(2)]
    sampler = ResumableBatchSampler(len(groups), 6, seed=1, groups=groups)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(24))
        for batch in batches:
            for half in (batch[:3], batch[3:]):
                assert len({groups[i][0] for i in half}) == 1
                assert len({groups[i][1] for i in half}) == 3
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0, skip=2)
    assert list(sampler) == epochs[0][2:]

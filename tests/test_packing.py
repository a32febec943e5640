"""Batches by number: the same for any count of hosts, from any start, whatever becomes of single pictures."""

import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image
from tiny import config

from jpeglm_jax.data import packing, pipeline
from jpeglm_jax.data.flags import flag
from jpeglm_jax.data.pipeline import Data
from jpeglm_jax.data.sources import open_source
from jpeglm_jax.tokenizer import BOS, EOS, PAD

COUNT = 37


@pytest.fixture
def folder(tmp_path):
    """Flags as PNG files."""
    (tmp_path / "photos").mkdir()
    for index in range(COUNT):
        Image.fromarray(flag(index, 48)).save(tmp_path / "photos" / f"{index:03}.png")
    return tmp_path / "photos"


def make(folder, **changes):
    settings = config(folder.parent / "run")
    return Data(dataclasses.replace(settings, data=dataclasses.replace(settings.data, path=str(folder), **changes)))


def batches(data, share=None, train=True):
    return data.batches(data.train if train else data.held_out, data.source._root.parent / "lengths.npz", share)


def shares(hosts):
    return [[range(8 * host // hosts, 8 * (host + 1) // hosts)] for host in range(hosts)]


def rows(elements):
    return np.concatenate([np.concatenate([e["inputs"], e["targets"][:, -1:]], axis=1) for e in elements])


@pytest.mark.parametrize("mode", ["chunks", "rows"])
def test_any_count_of_hosts_makes_the_same_global_batches(folder, mode):
    data = make(folder, packing=mode)
    expected = [rows([batches(data)[number]]) for number in range(9)]
    for hosts in (2, 4):
        parts = [iter(data.iterate(batches(data, share))) for share in shares(hosts)]
        for number in range(5):
            np.testing.assert_array_equal(rows([next(part) for part in parts]), expected[number])
    # And a run that goes on with another count than it began with.
    for hosts in (1, 4):
        parts = [iter(data.iterate(batches(data, share), start=5)) for share in shares(hosts)]
        for number in range(5, 9):
            np.testing.assert_array_equal(rows([next(part) for part in parts]), expected[number])


def test_worker_processes_make_the_same_batches(folder):
    data = make(folder, workers=2, threads=1)
    elements = iter(data.iterate(batches(data), start=2))
    for number in range(2, 6):
        np.testing.assert_array_equal(rows([next(elements)]), rows([batches(data)[number]]))


def test_chunks_are_the_concatenation_of_all_pictures_of_each_epoch(folder):
    data = make(folder)
    epochs = [
        np.concatenate([data.tokens[int(index)] for index in data.train.index(epoch, np.arange(len(data.train)))])
        for epoch in range(3)
    ]
    stream = np.concatenate(epochs)
    count = len(stream) // (67 * 8)
    assert count * 67 * 8 > len(epochs[0]) + len(epochs[1])
    elements = [batches(data)[number] for number in range(count)]
    np.testing.assert_array_equal(np.concatenate([e["inputs"].ravel() for e in elements]), stream[: count * 67 * 8])
    np.testing.assert_array_equal(np.concatenate([e["targets"].ravel() for e in elements]), stream[1 : count * 67 * 8 + 1])


def test_an_epoch_has_each_training_picture_once_and_no_held_out_one(folder):
    data = make(folder)
    held_out = set(data.held_out.index(0, np.arange(len(data.held_out))).tolist())
    orders = [data.train.index(epoch, np.arange(len(data.train))).tolist() for epoch in range(2)]
    for order in orders:
        assert sorted(order) == sorted(set(range(COUNT)) - held_out)
    assert orders[0] != orders[1]
    assert len(held_out) == COUNT // 10  # holdout is 11, but at most a tenth


def test_a_row_is_a_picture(folder):
    data = make(folder, packing="rows", sequence_length=300)
    inputs = batches(data)[0]["inputs"]
    for number, row in enumerate(inputs):
        tokens = data.tokens[int(data.train.index(0, number))]
        assert tokens[0] == BOS and tokens[-1] == EOS
        np.testing.assert_array_equal(row, np.pad(tokens, (0, 300 - len(tokens)), constant_values=PAD))


@pytest.mark.parametrize("mode", ["chunks", "rows"])
def test_held_out_batches_end_with_padding_and_are_never_repeated(folder, mode):
    data = make(folder, packing=mode, holdout=3, sequence_length=300)
    held_out = batches(data, train=False)
    tokens = rows([held_out[number] for number in range(len(held_out))])[:, :-1]
    assert (tokens == BOS).sum() == 3 and (tokens[-1] == PAD).all()


@pytest.mark.parametrize("mode", ["chunks", "rows"])
def test_a_picture_that_breaks_moves_no_other(folder, mode, caplog):
    data = make(folder, packing=mode)
    before = [batches(data)[number] for number in range(12)]
    broken = int(data.train.index(0, 5))
    path = folder / f"{broken:03}.png"
    length = len(data.tokens[broken])
    path.write_bytes(b"not a picture")
    after = [batches(data)[number] for number in range(12)]
    changed = rows(before) != rows(after)
    assert (rows(after)[changed] == PAD).all()
    if mode == "rows":
        assert set(np.flatnonzero(changed.any(axis=1))) <= {5, 5 + len(data.train)} | set(range(34, 96))
    else:
        assert length <= np.concatenate([(b["inputs"] != a["inputs"]).ravel() for a, b in zip(before, after)]).sum()
    assert sum(element["skipped"] for element in after) > 0 == sum(element["skipped"] for element in before)
    assert f"skipped {path.name}" in caplog.text


def test_a_picture_that_changes_its_length_is_skipped(folder):
    data = make(folder)
    batches(data)[0]
    index = int(data.train.index(0, 0))
    Image.effect_noise((48, 48), 90).convert("RGB").save(folder / f"{index:03}.png")
    assert batches(data)[0]["skipped"] == 1


def test_broken_pictures_are_measured_as_nothing(folder, caplog):
    (folder / "007.png").write_bytes(b"")
    lengths = make(folder).lengths(folder.parent / "lengths.npz")
    assert (lengths == 0).nonzero()[0].tolist() == [7]
    assert "skipped 007.png: the file is empty" in caplog.text and "1 of 37 pictures cannot be read" in caplog.text


def test_a_folder_of_broken_pictures_only_is_refused(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the pictures can be read"):
        batches(make(folder))


def test_an_index_of_other_pictures_is_refused(folder):
    batches(make(folder))
    Image.fromarray(flag(99, 48)).save(folder / "new.png")
    with pytest.raises(ValueError, match="made with another set of pictures"):
        batches(make(folder))


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: pickle.dumps([1])])
def test_a_damaged_index_is_refused(folder, damage):
    path = folder.parent / "lengths.npz"
    batches(make(folder))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a length index"):
        batches(make(folder))


@pytest.mark.parametrize("mode", ["chunks", "rows"])
def test_a_host_may_hold_rows_that_are_apart(folder, mode):
    data = make(folder, packing=mode)
    whole, apart = rows([batches(data)[3]]), batches(data, [range(1, 3), range(6, 7)])[3]
    np.testing.assert_array_equal(rows([apart]), whole[[1, 2, 6]])
    assert apart["pictures"] >= 3


class Flaky:
    """A source that fails `times` times for each picture before it gives it."""

    def __init__(self, source, times):
        self.source, self.times, self.failed = source, times, {}

    def __getitem__(self, index):
        self.failed[index] = self.failed.get(index, 0) + 1
        if self.failed[index] <= self.times:
            raise TimeoutError("the bucket does not answer")
        return self.source[index]

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)


@pytest.mark.parametrize("times, lost", [(5, False), (6, True)])
def test_a_source_that_fails_in_passing_is_asked_again_and_costs_nothing(folder, monkeypatch, caplog, times, lost):
    expected = batches(make(folder))[0]
    monkeypatch.setattr(pipeline, "PAUSES", (0.0,) * 5)
    monkeypatch.setattr(pipeline, "open_source", lambda *_: Flaky(open_source(str(folder), ""), times))
    element = batches(make(folder))[0]
    assert element["pictures"] == expected["pictures"] > 1
    assert element["skipped"] == (element["pictures"] if lost else 0)
    assert ("tried 6 times: the bucket does not answer" in caplog.text) == lost
    assert caplog.text.count("the bucket does not answer; trying again") == 5 * element["pictures"]
    if not lost:
        np.testing.assert_array_equal(rows([element]), rows([expected]))


def test_too_many_unreadable_pictures_among_a_thousand_are_fatal():
    few = packing.Unreadable(0.1)
    for _ in range(50):
        few.add(100, 10)
    for count, skipped in ((101, 101), (1001, 102)):
        with pytest.raises(RuntimeError, match=f"{skipped} of {count} pictures cannot be read.* more than 10%"):
            packing.Unreadable(0.1).add(count, skipped)
    few.add(990, 90)
    with pytest.raises(RuntimeError, match="raise data.max_unreadable"):
        few.add(1, 11)


def test_a_source_that_is_broken_is_not_measured_to_its_end(folder):
    (folder / "007.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match="1 of 8 pictures cannot be read"):
        batches(make(folder, max_unreadable=0.0))
    assert not (folder.parent / "lengths.npz").exists()

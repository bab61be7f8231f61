"""Batches of inputs, and examples by number, from whatever a user has."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from pushforward.errors import DataError, OptionError, ResourceError
from pushforward.networks.data import DataStream, Examples
from scenarios import normal

X = normal(0, 7, 3)
Y = torch.arange(7)


def loader(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=3, **options)


@pytest.mark.parametrize(
    "source",
    [
        X,
        X.numpy(),
        list(X.split(2)),
        tuple(X.split([1, 6])),
        loader(),
        [(X[:4], Y[:4]), [X[4:], Y[4:]]],
        [{"labels": Y, "x": X}],
        [{"pixel_values": X[:2]}, {"pixel_values": X[2:].numpy()}],
        [torch.zeros(0, 3, dtype=torch.float64), X],
    ],
    ids=["tensor", "array", "list", "tuple", "loader", "pairs", "dict", "hf", "empty batch"],
)
def test_sources(source):
    batches = list(DataStream(source).inputs())
    torch.testing.assert_close(torch.cat(batches), X)
    assert all(len(batch) for batch in batches)


def test_a_stream_can_be_read_again():
    stream = DataStream(loader())
    assert len(list(stream.inputs())) == len(list(stream.inputs())) == 3


def test_large_tensors_come_in_pieces():
    batches = list(DataStream(torch.zeros(2500, 2)).inputs())
    assert [len(batch) for batch in batches] == [1024, 1024, 452]


def test_integers_become_floats_and_gradients_stop():
    (batch,) = DataStream(torch.arange(6).reshape(2, 3)).inputs()
    assert batch.dtype == torch.get_default_dtype()
    (batch,) = DataStream(X.clone().requires_grad_()).inputs()
    assert not batch.requires_grad


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no examples"),
        (torch.zeros(0, 3), "no examples"),
        (torch.zeros(3), r"shape \(3,\)"),
        ([X, normal(1, 2, 4)], r"examples of shape \(4,\) follow examples of shape \(3,\)"),
        ([{"tokens": X}], r"a mapping with keys \['tokens'\]"),
        ([("text",)], "inputs are str"),
        ([()], "inputs are tuple"),
        (7, "got int"),
    ],
)
def test_unusable_sources_are_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        list(DataStream(source, "the training set").inputs())
    assert "the training set" in caught.value.where


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_damaged_example_is_named(value):
    damaged = normal(2, 6, 3)
    damaged[4, 1] = value
    with pytest.raises(DataError, match="example 4 holds NaN or infinite entries") as caught:
        list(DataStream(damaged.split(3)).inputs())
    assert caught.value.where == "batch 1 of data"


# Examples: random access to inputs and targets


class Reordered:
    """Batches of (X, Y) in another order whenever it is read."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        order = torch.arange(7).roll(self.passes)
        yield from ((X[part], Y[part]) for part in order.split(3))


class Changing:
    """Batches whose inputs, targets or number differ from pass to pass."""

    def __init__(self, change):
        self.change = change
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        x, y = self.change(X.clone(), Y.clone(), self.passes)
        yield from zip(x.split(3), y.split(3), strict=True)


class Squares(Dataset):
    """A map-style data set that counts what is fetched."""

    def __init__(self, count, noise=0.0, damaged=None):
        self.count, self.noise, self.damaged = count, noise, damaged
        self.fetched = []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.fetched.append(i)
        x = torch.tensor([float(i), float(i) ** 2])
        if i == self.damaged:
            x = x / 0
        return x + self.noise * torch.rand(2) if self.noise else x, i % 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def content(batches):
    batches = list(batches)
    inputs = [batch.inputs for batch in batches]
    return torch.cat(inputs), torch.cat([batch.targets for batch in batches])


@pytest.mark.parametrize(
    "source",
    [
        (X, Y),
        [X, Y],
        (X.numpy(), Y.numpy()),
        {"x": X, "y": Y},
        TensorDataset(X, Y),
        Stream(),
        loader(),
        DataLoader(TensorDataset(X, Y), batch_sampler=[[0, 1, 2], [3], [4, 5, 6]]),
        DataLoader(TensorDataset(X, Y), batch_size=2, collate_fn=default_collate, num_workers=1),
        [(X[:4], Y[:4]), [X[4:].numpy(), Y[4:]]],
        [(X[:2], Y[:2]), (X[2:], Y[2:])],
        [{"labels": Y, "pixel_values": X}],
        [(X[:0], Y[:0]), (X, Y)],
    ],
    ids=[
        *("pair", "list", "arrays", "mapping", "dataset", "stream", "loader", "batch sampler"),
        *("worker", "batches", "two batches", "mappings", "empty batch"),
    ],
)
def test_examples_keep_their_order(source):
    examples = Examples.read(source)
    assert examples.num_examples == len(examples) == 7
    for _ in range(2):
        x, y = content(examples.batches(3))
        assert x.dtype == X.dtype
        assert y.dtype == Y.dtype
        assert torch.equal(x, X)
        assert torch.equal(y, Y)
    some = examples.select(torch.tensor([6, 0, 0]))
    assert torch.equal(some.inputs, X[[6, 0, 0]])
    assert torch.equal(some.targets, Y[[6, 0, 0]])
    assert some.indices.tolist() == [6, 0, 0]
    assert len(some) == 3


A, B = normal(3, 5, 2), torch.arange(15).reshape(5, 3)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ((A, B, Y[:5]), tuple),
        (((A, B), Y[:5]), tuple),
        ([(A[:2], B[:2], Y[:2]), (A[2:], B[2:], Y[2:5])], tuple),
        (TensorDataset(A, B, Y[:5]), tuple),
        (({"a": A, "b": B}, Y[:5]), dict),
        ({"a": A, "b": B, "label": Y[:5]}, dict),
        ([{"a": A, "target": Y[:5], "b": B}], dict),
    ],
)
def test_several_inputs(source, kind):
    examples = Examples.read(source)
    (batch,) = examples.batches(9)
    assert isinstance(batch.inputs, kind)
    a, b = batch.inputs if kind is tuple else (batch.inputs["a"], batch.inputs["b"])
    assert torch.equal(a, A)
    assert torch.equal(b, B)
    assert b.dtype == torch.int64  # tokens stay integers
    assert torch.equal(batch.targets, Y[:5])


@pytest.mark.parametrize(
    ("source", "with_targets"),
    [
        (X, False),
        (X.numpy(), False),
        ({"x": X}, False),
        (list(X.split(4)), False),
        ([X[:3], X[3:]], False),
        ([(X,)], False),
        (TensorDataset(X), False),
        ((X, Y), True),
        ([(X, Y)], True),
    ],
)
def test_targets_may_be_missing_where_allowed(source, with_targets):
    (batch,) = Examples.read(source, targets=False).batches(9)
    assert torch.equal(batch.inputs, X)
    assert (batch.targets is not None) == with_targets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_number_types_stay(dtype):
    x = torch.arange(14).reshape(7, 2).to(dtype)
    for source in ((x, Y), [(x[:4], Y[:4]), (x[4:], Y[4:])]):
        (batch,) = Examples.read(source).batches(9)
        assert batch.inputs.dtype == dtype
        assert torch.equal(batch.inputs, x)


def test_tensors_are_not_copied_but_batches_are():
    x = X.clone()
    for source in ((x, Y), TensorDataset(x, Y), DataLoader(TensorDataset(x, Y), batch_size=2)):
        examples = Examples.read(source)
        assert examples._storage.table.inputs.data_ptr() == x.data_ptr()
        (batch,) = examples.batches(7)
        batch.inputs.zero_()
    assert torch.equal(x, X)


def test_a_read_only_array_is_used_where_it_is():
    x = X.numpy().copy()
    x.flags.writeable = False
    examples = Examples.read((x, Y))
    assert examples._storage.table.inputs.data_ptr() == x.ctypes.data
    assert torch.equal(Examples.read((x[::-1], Y)).select(torch.tensor([0])).inputs[0], X[6])


def test_gradients_stop():
    (batch,) = Examples.read((X.clone().requires_grad_(), Y)).batches(9)
    assert not batch.inputs.requires_grad


def test_passes_can_be_resumed():
    examples = Examples.read((X, Y))
    assert [len(batch) for batch in examples.batches(3)] == [3, 3, 1]
    later = list(examples.batches(3, start=3, stop=6))
    assert [batch.indices.tolist() for batch in later] == [[3, 4, 5]]
    assert list(examples.batches(3, start=7)) == []


def test_minibatches_depend_on_the_generator_alone():
    examples = Examples.read((X, Y))

    def order(seed):
        batches = list(examples.minibatches(2, torch.Generator().manual_seed(seed)))
        assert [len(batch) for batch in batches] == [2, 2, 2, 1]
        assert all(torch.equal(batch.targets, Y[batch.indices]) for batch in batches)
        return torch.cat([batch.indices for batch in batches]).tolist()

    assert sorted(order(0)) == list(range(7))
    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_even_and_know_their_numbers(count):
    examples = Examples.read((X, Y))
    shares = [examples.shard(rank, count) for rank in range(count)]
    sizes = [share.num_examples for share in shares]
    assert max(sizes) - min(sizes) <= 1
    batches = [batch for share in shares for batch in share.batches(2)]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    assert torch.equal(content(batches)[0], X)
    last = shares[-1]
    assert last.select(torch.tensor([last.num_examples - 1])).indices.tolist() == [6]
    (whole,) = last.minibatches(9, torch.Generator().manual_seed(0))
    assert sorted(whole.indices.tolist()) == list(range(7))[-last.num_examples :]
    assert last.shard(0, 1).fingerprint() == last.fingerprint()


def test_a_share_of_a_share():
    part = Examples.read((X, Y)).shard(1, 2).shard(1, 2)
    (batch,) = part.batches(9)
    assert batch.indices.tolist() == [5, 6]
    assert torch.equal(batch.inputs, X[5:])
    assert "numbers 5 to 6" in repr(part)


def test_the_fingerprint_tells_data_apart():
    ours = Examples.read((X, Y)).fingerprint()
    assert ours == Examples.read(loader()).fingerprint() == Examples.read([(X, Y)]).fingerprint()
    other, labels = X.clone(), Y.clone()
    other[6, 2] += 1e-12
    labels[0] = 5
    for changed in ((other, Y), (X, labels), (X[:6], Y[:6]), (X.float(), Y), (X[:, :, None], Y)):
        assert Examples.read(changed).fingerprint() != ours


def test_a_single_example_among_many_changes_the_fingerprint():
    inputs = torch.arange(3000.0).reshape(1500, 2)
    targets = torch.zeros(1500)
    ours = Examples.read((inputs, targets)).fingerprint()
    for number in (1, 1023, 1024, 1498):
        other = inputs.clone()
        other[number, 1] += 1
        assert Examples.read((other, targets)).fingerprint() != ours


def test_batches_move_to_the_device():
    examples = Examples.read((X, Y), device="meta")
    (batch,) = examples.batches(9)
    assert batch.inputs.device.type == batch.targets.device.type == "meta"
    assert batch.indices.device.type == "cpu"
    assert Examples.read(examples, device="cpu").select(Y[:1]).inputs.device.type == "cpu"
    assert Examples.read(examples) is examples


# Reading what is large


def test_large_data_are_fetched_by_number():
    dataset = Squares(1000)
    examples = Examples.read(DataLoader(dataset, batch_size=10), cache_bytes=1000)
    assert len(examples) == 1000
    assert len(dataset.fetched) < 300
    assert {0, 999} <= set(dataset.fetched)
    dataset.fetched.clear()
    batch = examples.shard(1, 2).select(torch.tensor([3, 499]))
    assert dataset.fetched == batch.indices.tolist() == [503, 999]
    assert batch.inputs.tolist() == [[503.0, 503.0**2], [999.0, 999.0**2]]
    assert batch.targets.tolist() == [503 % 3, 999 % 3]
    assert examples.fingerprint() == Examples.read(Squares(1000)).fingerprint()


def test_large_data_keep_the_order_of_the_loader():
    order = [[4, 5], [9, 2]]
    loader = DataLoader(Squares(1000), batch_sampler=order)
    for cache in (0, 1000):
        examples = Examples.read(loader, cache_bytes=cache)
        x, _ = content(examples.batches(3))
        assert x[:, 0].tolist() == [4, 5, 9, 2]


def test_large_data_are_fetched_by_the_workers_of_the_loader():
    loader = DataLoader(Squares(20), batch_size=10, num_workers=1)
    x, _ = content(Examples.read(loader, cache_bytes=10).batches(10))
    assert x[:, 0].tolist() == list(range(20))


def test_reading_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    for cache in (0, 1000):
        list(Examples.read(Squares(10), cache_bytes=cache).batches(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_large_stream_is_refused_with_its_size():
    batches = [(torch.zeros(10, 5), torch.zeros(10))] * 3
    with pytest.raises(ResourceError, match="first 20 examples of 24 bytes") as caught:
        Examples.read(batches, cache_bytes=300)
    assert "cache_bytes" in caught.value.advice
    assert len(Examples.read(batches, cache_bytes=720)) == 30


class Memory(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return output


def test_reading_takes_one_copy_of_the_data():
    class Blocks:
        def __iter__(self):
            for i in range(64):
                yield torch.full((16, 256), float(i)), torch.zeros(16)

    with Memory() as memory:
        examples = Examples.read(Blocks())
    size = len(examples) * 257 * 4
    assert size <= memory.peak < 1.2 * size


# What is refused


def test_a_shuffling_loader_is_refused_unread():
    dataset = Squares(9)
    for sampler in (
        {"shuffle": True},
        {"sampler": RandomSampler(dataset)},
        {"sampler": SubsetRandomSampler([1, 2])},
        {"batch_sampler": BatchSampler(RandomSampler(dataset), 2, drop_last=False)},
    ):
        with pytest.raises(DataError, match=r"shuffles between passes.*RandomSampler") as caught:
            Examples.read(DataLoader(dataset, **sampler))
        assert "shuffle=False" in caught.value.advice
    assert dataset.fetched == []
    share = DistributedSampler(dataset, num_replicas=2, rank=0)
    with pytest.raises(DataError, match="share of the data"):
        Examples.read(DataLoader(dataset, sampler=share))


def test_a_shuffling_batch_sampler_is_refused():
    class Shuffling:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from ([0, 1], [2, 3]) if self.passes % 2 else ([2, 3], [0, 1])

    dataset = Squares(4)
    with pytest.raises(DataError, match=r"shuffles between passes.*Shuffling"):
        Examples.read(DataLoader(dataset, batch_sampler=Shuffling()))
    assert dataset.fetched == []


def test_a_shuffling_iterable_is_found_out():
    with pytest.raises(DataError, match="shuffles between passes: 7 of 7 examples") as caught:
        Examples.read(Reordered(), name="the training set")
    assert caught.value.where == "the training set"
    assert "DataLoader(dataset, shuffle=False)" in caught.value.advice


@pytest.mark.parametrize("cache", [2**20, 10], ids=["in memory", "by number"])
def test_random_augmentation_is_found_out(cache):
    with pytest.raises(DataError, match=r"inputs of 9 of 9 .* random augmentation") as caught:
        Examples.read(DataLoader(Squares(9, noise=0.1), batch_size=2), cache_bytes=cache)
    assert "evaluation transform" in caught.value.advice


def swapped(x, y, passes):
    y[:2] = torch.tensor([1, 0] if passes == 1 else [0, 1])
    return x, y


def one_changed(x, y, passes):
    x[5, 0] += passes
    return x, y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_changed, "the inputs of 1 of 7 examples change"),
        (lambda x, y, passes: (x, y + passes), "the targets of 7 of 7 examples change"),
        (swapped, "the targets of 2 of 7 examples change"),
        (lambda x, y, passes: (x + passes, y.roll(passes)), "their order changes too"),
        (lambda x, y, passes: (x[passes:], y[passes:]), "first pass gives 6 examples, the second"),
        (lambda x, y, passes: (x[: 8 - passes], y[: 8 - passes]), "gives 7 .* the second 6"),
        (lambda x, y, passes: (x[: 7 * (2 - passes)], y[: 7 * (2 - passes)]), "the second 0"),
    ],
)
def test_what_changes_between_passes_is_said(change, message):
    with pytest.raises(DataError, match=message):
        Examples.read(Changing(change))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no examples"),
        ((X[:0], Y[:0]), "no examples"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "no examples"),
        (DataLoader(Squares(0)), "no examples"),
        ((X, Y[:6]), "different numbers of examples: inputs 7, targets 6"),
        ([(X[:3], Y[:3]), (X, Y[:6])], "inputs 7, targets 6"),
        ({"a": X, "b": X[:2], "y": Y}, "inputs\\['b'\\] 2, targets 7"),
        ([(X, Y), (normal(1, 2, 4), Y[:2])], r"shape \(4,\) follow examples of shape \(3,\)"),
        ([(X, Y), (X, Y[:, None])], r"targets: examples of shape \(1,\) follow .* \(\)"),
        ([(X, Y), (X.float(), Y)], "float32 follow numbers of type torch.float64"),
        ([(X, Y), (X, X, Y)], r"inputs\[0\], inputs\[1\], targets follows one of inputs, targets"),
        ([(X, Y), ({"x": X}, Y)], "follows one of"),
        (iter([(X, Y)]), "can be read only once"),
        (((X, Y) for _ in range(2)), "generator can be read only once"),
        (X, "a Tensor has no targets"),
        ([X], "has no targets"),
        ((X, Y.tolist()), "targets are a list of numbers"),
        ([(X,)], "a list of 1 has no targets|a tuple of 1 has no targets"),
        ({"x": X}, r"a mapping with keys \['x'\] has no targets"),
        ({"labels": Y}, "has no inputs"),
        (((), Y), "has no inputs"),
        ([(X, ["a"] * 7)], "targets are list"),
        ([{"text": ["a"], "y": Y}], r"inputs\['text'\] are list"),
        ([(X, 3)], "targets are int"),
        ([(X[0], Y[0])], "targets are a single number"),
        ((np.array(["a", "b"]), Y[:2]), "inputs are ndarray"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_unusable_examples_are_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        Examples.read(source, name="the training set")
    assert "the training set" in caught.value.where
    assert caught.value.advice


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["inputs", "targets"])
def test_the_damaged_example_is_numbered(value, column):
    x, y = normal(2, 6, 3), normal(3, 6)
    (x[:, 1] if column == "inputs" else y)[4] = value
    for source in ((x, y), TensorDataset(x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        with pytest.raises(DataError, match=f"{column} of example 4 holds NaN"):
            Examples.read(source)


def test_a_damaged_example_of_large_data_is_found_when_it_is_read():
    examples = Examples.read(Squares(1000, damaged=501), cache_bytes=10)
    with pytest.raises(DataError, match="inputs of example 501 holds NaN"):
        list(examples.batches(100, start=450))


def test_another_shape_in_large_data_is_found_when_it_is_read():
    def padded(rows):
        x, y = default_collate(rows)
        return (x[:, :1] if 501 in x[:, 0] else x), y

    loader = DataLoader(Squares(1000), batch_size=10, collate_fn=padded)
    examples = Examples.read(loader, cache_bytes=10)
    with pytest.raises(DataError, match=r"shape \(1,\) follow examples of shape \(2,\)") as caught:
        list(examples.batches(100))
    assert caught.value.where == "examples 500 to 599 of data"


def test_collating_must_keep_all_examples():
    def every_other(rows):
        return default_collate(rows[::2])

    loader = DataLoader(Squares(100), batch_size=4, collate_fn=every_other)
    with pytest.raises(DataError, match="16 examples were collated to 8"):
        Examples.read(loader, cache_bytes=10)


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.select(torch.tensor([7])),
        lambda e: e.select(torch.tensor([-1])),
        lambda e: e.select(torch.zeros(0, dtype=torch.int64)),
        lambda e: e.batches(0),
        lambda e: e.batches(2, start=8),
        lambda e: e.batches(2, start=3, stop=2),
        lambda e: e.batches(2, stop=9),
        lambda e: e.minibatches(0, torch.Generator()),
        lambda e: e.shard(2, 2),
        lambda e: e.shard(0, 8),
        lambda e: e.shard(-1, 2),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(OptionError):
        call(Examples.read((X, Y)))

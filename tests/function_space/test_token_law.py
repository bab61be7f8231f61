"""Laws of tokens: what is counted, what is drawn, what is refused."""

import pytest
import torch

from pushforward.errors import DataError, LawError, OptionError
from pushforward.function_space.token_law import TokenLaw
from scenarios import generator


def batch(seed=0, num=40, length=5, vocabulary=6):
    return torch.randint(vocabulary, (num, length), generator=generator(seed))


def masked(seed=0, num=60, length=5, *, left=False):
    noise = generator(seed)
    tokens = 1 + torch.randint(5, (num, length), generator=noise)
    sizes = torch.randint(1, length + 1, (num,), generator=noise)
    columns = torch.arange(length)
    real = columns >= length - sizes[:, None] if left else columns < sizes[:, None]
    return {"input_ids": tokens * real, "attention_mask": real.long()}


def same(first, second):
    ours, theirs = first.to_tensors(), second.to_tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def shares(tokens, vocabulary):
    return torch.stack([torch.bincount(c, minlength=vocabulary) for c in tokens.T]).double() / len(
        tokens
    )


@pytest.mark.parametrize("order", ["independent", "bigram", "pooled"])
def test_parts_add_up_to_the_whole_in_any_order(order):
    tokens = batch()
    first, second, third = (TokenLaw.of(part, order=order) for part in tokens.split([7, 3, 30]))
    whole = TokenLaw.of(tokens, order=order)
    assert same(first + second + third, whole)
    assert same(third + first + second, whole)
    assert whole.num_examples == 40


@pytest.mark.parametrize("left", [False, True])
def test_parts_with_a_mask_add_up(left):
    data = masked(left=left)
    head = {key: value[:20] for key, value in data.items()}
    tail = {key: value[20:] for key, value in data.items()}
    assert same(TokenLaw.of(head) + TokenLaw.of(tail), TokenLaw.of(data))


def test_independent_tokens_occur_as_often_as_in_the_data():
    # The uniform variables are stratified: with as many samples as examples, counts are equal.
    tokens = batch(1)
    drawn, lengths = TokenLaw.of(tokens, order="independent").sample(40, generator(2))
    torch.testing.assert_close(shares(drawn, 6), shares(tokens, 6), rtol=0, atol=0)
    assert lengths.tolist() == [5] * 40


def test_independent_positions_are_independent():
    tokens = torch.arange(5).repeat(20)[:, None].repeat(1, 2)  # the second repeats the first
    drawn, _ = TokenLaw.of(tokens, order="independent").sample(4000, generator(3))
    repeated = (drawn[:, 0] == drawn[:, 1]).double().mean()
    assert abs(float(repeated) - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5


@pytest.mark.statistical
def test_bigrams_have_the_transitions_of_each_position():
    tokens = batch(4, num=30, length=3, vocabulary=4)
    drawn, _ = TokenLaw.of(tokens, order="bigram").sample(20000, generator(5))
    for position in (1, 2):
        for previous in range(4):
            rows = tokens[tokens[:, position - 1] == previous, position]
            ours = drawn[drawn[:, position - 1] == previous, position]
            expected = torch.bincount(rows, minlength=4).double() / len(rows)
            found = torch.bincount(ours, minlength=4).double() / len(ours)
            bound = 4 * (expected * (1 - expected) / len(ours)).sqrt()
            assert bool(((found - expected).abs() <= bound + 1e-12).all())


def test_a_chain_that_is_certain_is_reproduced():
    cycle = (torch.arange(4)[:, None] + torch.arange(6)) % 4
    for order in ("bigram", "pooled"):
        drawn, _ = TokenLaw.of(cycle, order=order).sample(16, generator(6))
        assert torch.equal(drawn, (drawn[:, :1] + torch.arange(6)) % 4)
        assert torch.equal(torch.bincount(drawn[:, 0]), torch.full((4,), 4))


def test_pooled_transitions_hold_at_positions_where_they_were_never_seen():
    # 0 is followed by 1 at the beginning only, and comes third in the last row.
    tokens = torch.tensor([[0, 1, 2, 3], [2, 2, 0, 1]])
    pooled = TokenLaw.of(tokens, order="pooled")
    drawn, _ = pooled.sample(200, generator(7))
    followers = drawn[:, 1:][drawn[:, :-1] == 0]
    assert followers.unique().tolist() == [1]


@pytest.mark.parametrize("left", [False, True])
def test_masks_have_the_lengths_and_the_side_of_the_data(left):
    data = masked(8, left=left)
    law = TokenLaw.of(data)
    drawn = law.inputs(60, generator(9))
    mask = drawn["attention_mask"]
    assert torch.equal(
        torch.bincount(mask.sum(1), minlength=6),
        torch.bincount(data["attention_mask"].sum(1), minlength=6),
    )
    steps = mask[:, 1:] - mask[:, :-1]
    assert bool((steps >= 0).all() if left else (steps <= 0).all())
    assert bool(((drawn["input_ids"] == 0) == (mask == 0)).all())
    assert mask.dtype == torch.int64


def test_a_token_that_only_ever_came_last_can_be_followed():
    data = {
        "input_ids": torch.tensor([[1, 2, 0], [1, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    drawn, lengths = TokenLaw.of(data).sample(400, generator(10))
    odd = (drawn[:, 1] == 2) & (lengths == 3)
    assert bool(odd.any())
    assert drawn[odd, 2].unique().tolist() == [4]


def test_the_same_stream_gives_the_same_tokens():
    law = TokenLaw.of(batch())
    first, second = (law.sample(50, generator(11))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, law.sample(50, generator(12))[0])


def test_tensors_bring_everything_back():
    for data in (batch().int(), masked(left=True)):
        law = TokenLaw.of(data, order="pooled")
        back = TokenLaw.from_tensors(law.to_tensors())
        assert same(back, law)
        assert (back.token_type, back.mask_type) == (law.token_type, law.mask_type)
        assert (back.padded_left, back.padding) == (law.padded_left, law.padding)
        assert back.num_bytes == law.num_bytes > 0


def test_tokens_keep_their_type():
    assert TokenLaw.of(batch().int()).inputs(4, generator(0)).dtype == torch.int32


def test_damaged_tensors_are_refused():
    tensors = TokenLaw.of(batch()).to_tensors()
    negative = {**tensors, "counts": -tensors["counts"]}
    fewer = {**tensors, "lengths": tensors["lengths"] - tensors["lengths"].sign()}
    shorter = {**tensors, "lengths": tensors["lengths"][-3:]}
    missing = {key: value for key, value in tensors.items() if key != "codes"}
    for damaged in (negative, fewer, shorter, missing):
        with pytest.raises(LawError, match="token law"):
            TokenLaw.from_tensors(damaged)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(3, 4), "float32"),
        (torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(0, 4, dtype=torch.int64), "no tokens"),
        (torch.full((2, 2), -1), "from -1"),
        (torch.full((2, 2), 2**21), "from 2097152"),
        ({"input_ids": torch.zeros(2, 2).long(), "position_ids": torch.zeros(2, 2)}, "position"),
        ({"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 2)}, "mask"),
    ],
)
def test_what_are_no_tokens_is_refused(inputs, message):
    with pytest.raises(DataError, match=message):
        TokenLaw.of(inputs)


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([[1, 0, 1]], [[1, 0, 1]]),  # in the middle
        ([[1, 1, 0], [0, 1, 1]], [[1, 1, 0], [0, 1, 1]]),  # on both sides
        ([[1, 0, 2]], [[1, 0, 0]]),  # two tokens
        ([[1, 1], [0, 0]], [[1, 1], [0, 0]]),  # nothing else
    ],
)
def test_odd_padding_is_refused(tokens, mask):
    with pytest.raises(DataError, match="attention_mask"):
        TokenLaw.of({"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)})


def test_laws_of_different_sequences_do_not_add_up():
    law = TokenLaw.of(batch())
    for other in (
        TokenLaw.of(batch(length=4)),
        TokenLaw.of(batch(), order="pooled"),
        TokenLaw.of(batch().int()),
        TokenLaw.of(masked()),
    ):
        with pytest.raises(DataError, match="follows"):
            law + other
    with pytest.raises(DataError, match="padding"):
        TokenLaw.of(masked()) + TokenLaw.of(masked(left=True))


def test_unknown_options_are_refused():
    with pytest.raises(OptionError, match="trigram"):
        TokenLaw.of(batch(), order="trigram")
    with pytest.raises(OptionError, match="0 samples"):
        TokenLaw.of(batch()).sample(0, generator(0))

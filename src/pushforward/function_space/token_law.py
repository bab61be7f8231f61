"""A law of token sequences: what is counted of them, and how new ones are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from pushforward.errors import DataError, LawError, OptionError
from pushforward.options import choice

__all__ = ["TokenLaw", "TokenOrder"]

TokenOrder: TypeAlias = Literal["independent", "bigram", "pooled"]
"""How a token depends on those before it: not at all, on the last one in a way that depends on the
position, or on the last one in the same way everywhere."""

_BITS = 21  # of a position or a token: three of them fit a non-negative 64-bit integer
_TOKENS, _MASK = "input_ids", "attention_mask"
_MASK_TYPES = (torch.bool, torch.int64, torch.int32, torch.float32, torch.float64)
_TOKEN_TYPES = (torch.int64, torch.int32)

_ODD_PADDING = {
    "what": "the padding is not one token on one side",
    "where": _MASK,
    "advice": "Pad every sequence on the same side, with the same token.",
}
_DAMAGED = {"where": "token law", "advice": "Summarise the data anew."}


@dataclass(frozen=True, eq=False)
class TokenLaw:
    """Counts of tokens, and the law that they define: a Markov chain of order 0 or 1.

    Whole sequences are not kept, but counts of neighbours say much of them: where most tokens have
    a single successor, as in few sequences over a large vocabulary, a sequence that is drawn is
    mostly one of the data; and sequences of two tokens are their counts. Sequences are counted from
    their first token, also where the padding is in front. Laws of parts of the data add up to the
    law of all of it.

    Parameters
    ----------
    order
        What is counted.
    length
        ``T``, padding included.
    lengths
        ``(T + 1,)``: how many sequences have so many tokens.
    codes, counts
        ``(m,)`` each: ``position * 2^42 + token`` in increasing order, and how often.
    pair_codes, pair_counts
        ``(q,)`` each: ``position * 2^42 + previous * 2^21 + token``, the position being that of the
        token (0 throughout if pooled); empty for ``independent``.
    padding
        The token behind the end or before the beginning; -1 where there is none.
    padded_left
        Whether padding is in front.
    token_type
        Integer type of the tokens.
    mask_type
        Type of the attention mask; None: the network is called with the tokens alone.

    Examples
    --------
    >>> import torch
    >>> law = TokenLaw.of(torch.tensor([[0, 5, 1], [1, 5, 0]]), order="independent")
    >>> law.sample(4, torch.Generator().manual_seed(0))[0][:, 1].tolist()
    [5, 5, 5, 5]
    """

    order: TokenOrder
    length: int
    lengths: Int64[Tensor, " sizes"]
    codes: Int64[Tensor, " m"]
    counts: Int64[Tensor, " m"]
    pair_codes: Int64[Tensor, " q"]
    pair_counts: Int64[Tensor, " q"]
    padding: int = -1
    padded_left: bool | None = None
    token_type: torch.dtype = torch.int64
    mask_type: torch.dtype | None = None

    @classmethod
    def of(cls, inputs: Tensor | Mapping[str, Any], *, order: TokenOrder = "bigram") -> TokenLaw:
        """Count a batch.

        Parameters
        ----------
        inputs
            Integers ``(B, T)``, or a mapping with them as ``input_ids`` and, if sequences differ in
            length, an ``attention_mask`` ``(B, T)`` that is 0 on the padding.
        order
            What is counted: ``independent`` keeps the tokens of each position, at most ``T`` times
            the vocabulary in numbers; the others also which token follows which.

        Returns
        -------
        TokenLaw
            Of this batch; ``+`` adds that of the next.

        Raises
        ------
        DataError
            When they are no such integers, a mapping holds anything else, or the padding is in the
            middle, on both sides, or not one and the same token.
        OptionError
            For an unknown order.
        """
        choice(order, "order", get_args(TokenOrder))
        tokens, mask = _columns(inputs)
        token_type, mask_type = tokens.dtype, None if mask is None else mask.dtype
        tokens = tokens.detach().to("cpu", torch.int64)
        real = torch.ones_like(tokens, dtype=torch.bool)
        padding, left = -1, None
        if mask is not None:
            real = mask.detach().cpu() != 0
            padding, left = _padding(tokens, real)
        lengths = real.sum(1)
        if left:
            tokens, real = _shifted(tokens, lengths), real.flip(1)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        codes, counts = _counted(_code(positions, torch.zeros_like(tokens), tokens)[real])
        pairs, pair_counts = codes[:0], counts[:0]
        if order != "independent":
            places = positions if order == "bigram" else torch.zeros_like(positions)
            both = _code(places[:, 1:], tokens[:, :-1], tokens[:, 1:])
            pairs, pair_counts = _counted(both[real[:, 1:]])
        return cls(
            order,
            tokens.shape[1],
            torch.bincount(lengths, minlength=tokens.shape[1] + 1),
            codes,
            counts,
            pairs,
            pair_counts,
            padding,
            left,
            token_type,
            mask_type,
        )

    @property
    def num_examples(self) -> int:
        """How many sequences were counted."""
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        stored = (self.lengths, self.codes, self.counts, self.pair_codes, self.pair_counts)
        return sum(t.numel() * t.element_size() for t in stored)

    def __add__(self, other: TokenLaw) -> TokenLaw:
        """The law of both sets of examples.

        Returns
        -------
        TokenLaw
            Neither is changed; the order of the two does not matter.

        Raises
        ------
        DataError
            When they count different things, or their sequences differ in form.
        """
        for name in ("order", "length", "token_type", "mask_type"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(
                    f"{name} {getattr(other, name)} follows {getattr(self, name)}",
                    where="tokens",
                    advice="Only sequences of one form add up; pad them all to one length.",
                )
        paddings = {law.padding for law in (self, other)} - {-1}
        sides = {law.padded_left for law in (self, other)} - {None}
        if len(paddings) > 1 or len(sides) > 1:
            raise DataError(**_ODD_PADDING)
        return TokenLaw(
            self.order,
            self.length,
            self.lengths + other.lengths,
            *_merged((self.codes, self.counts), (other.codes, other.counts)),
            *_merged((self.pair_codes, self.pair_counts), (other.pair_codes, other.pair_counts)),
            max(self.padding, other.padding),
            other.padded_left if self.padded_left is None else self.padded_left,
            self.token_type,
            self.mask_type,
        )

    def sample(
        self, num: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "num T"], Int64[Tensor, " num"]]:
        """Draw sequences.

        At every position the `num` uniform variables behind the tokens are stratified (a Latin
        hypercube over positions), so that with independent tokens each occurs as often as it
        should, up to one. Errors of means over the samples are smaller than of independent ones.

        Parameters
        ----------
        num
            How many.
        generator
            On the CPU.

        Returns
        -------
        tokens : Tensor
            ``(num, T)``, padded as the data were.
        lengths : Tensor
            ``(num,)``: tokens that are no padding.

        Raises
        ------
        OptionError
            If `num` is no positive number.
        """
        if num < 1:
            raise OptionError(f"{num} samples", where="num", advice="Draw at least one.")
        reached = self.lengths.cumsum(0)
        lengths = torch.searchsorted(
            reached, _share(_uniforms(num, generator), reached[-1]), right=True
        )
        tokens = torch.full((num, self.length), self.padding)
        previous = torch.zeros(num, dtype=torch.int64)
        marginals = _Table.of(self.codes, self.counts)
        transitions = _Table.of(self.pair_codes, self.pair_counts)
        for position in range(int(lengths.max())):
            uniforms = _uniforms(num, generator)
            here = torch.full_like(previous, position)
            drawn, _ = marginals.draw(_code(here, torch.zeros_like(here)), uniforms)
            if self.order != "independent" and position > 0:
                place = here if self.order == "bigram" else torch.zeros_like(here)
                following, known = transitions.draw(_code(place, previous), uniforms)
                # A token that only ever came last has no successor: then any of this position.
                drawn = torch.where(known, following, drawn)
            tokens[:, position] = torch.where(position < lengths, drawn, tokens[:, position])
            previous = drawn
        if self.padded_left:
            tokens = _shifted(tokens, lengths, forward=True)
        return tokens, lengths

    def inputs(self, num: int, generator: torch.Generator) -> Tensor | dict[str, Tensor]:
        """Draw sequences in the form that the network is called with.

        Parameters
        ----------
        num
            How many.
        generator
            On the CPU.

        Returns
        -------
        Tensor or dict
            Tokens ``(num, T)``, or ``input_ids`` and ``attention_mask``, in the types of the data.
        """
        tokens, lengths = self.sample(num, generator)
        if self.mask_type is None:
            return tokens.to(self.token_type)
        behind = torch.arange(self.length) < lengths[:, None]
        mask = behind.flip(1) if self.padded_left else behind
        return {_TOKENS: tokens.to(self.token_type), _MASK: mask.to(self.mask_type)}

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for a file.

        Returns
        -------
        dict[str, Tensor]
            For `from_tensors`.
        """
        side = -1 if self.padded_left is None else int(self.padded_left)
        settings = [
            get_args(TokenOrder).index(self.order),
            self.padding,
            side,
            _TOKEN_TYPES.index(self.token_type),
            -1 if self.mask_type is None else _MASK_TYPES.index(self.mask_type),
        ]
        return {
            "settings": torch.tensor(settings),
            "lengths": self.lengths,
            "codes": self.codes,
            "counts": self.counts,
            "pair_codes": self.pair_codes,
            "pair_counts": self.pair_counts,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TokenLaw:
        """The law that `to_tensors` took apart.

        Parameters
        ----------
        tensors
            By name.

        Returns
        -------
        TokenLaw
            Equal in every count.

        Raises
        ------
        LawError
            When something is missing or does not fit together.
        """
        names = ("lengths", "codes", "counts", "pair_codes", "pair_counts")
        try:
            order, padding, side, token, mask = (int(x) for x in tensors["settings"])
            lengths, codes, counts, pairs, pair_counts = (tensors[name].cpu() for name in names)
            law = cls(
                get_args(TokenOrder)[order],
                len(lengths) - 1,
                lengths,
                codes,
                counts,
                pairs,
                pair_counts,
                padding,
                None if side < 0 else bool(side),
                _TOKEN_TYPES[token],
                None if mask < 0 else _MASK_TYPES[mask],
            )
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise LawError(f"incomplete ({error})", **_DAMAGED) from error
        law._check()
        return law

    def _check(self) -> None:
        tables = ((self.codes, self.counts), (self.pair_codes, self.pair_counts))
        sound = all(
            c.dtype == n.dtype == torch.int64
            and c.shape == n.shape == (len(c),)
            and bool((n > 0).all())
            and bool((c[1:] > c[:-1]).all())
            and bool((c >= 0).all())
            for c, n in tables
        )
        sound = sound and self.lengths.dtype == torch.int64 and bool((self.lengths >= 0).all())
        if not sound:
            raise LawError("its counts are not counts", **_DAMAGED)
        # How many sequences reach each position is said twice: by lengths, and by the tokens there.
        reaching = self.lengths.flip(0).cumsum(0).flip(0)[1:]
        there = torch.zeros_like(reaching)
        positions = self.codes >> (2 * _BITS)
        if len(positions) and int(positions.max()) >= self.length:
            raise LawError("a position is beyond the end", **_DAMAGED)
        if not torch.equal(there.index_add(0, positions, self.counts), reaching):
            raise LawError("tokens and lengths of the sequences disagree", **_DAMAGED)


@dataclass(frozen=True)
class _Table:
    """Sorted codes with counts; a draw is among the codes that share all but the last token."""

    codes: Int64[Tensor, " m"]
    before: Int64[Tensor, " sums"]

    @classmethod
    def of(cls, codes: Tensor, counts: Tensor) -> _Table:
        return cls(codes, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def draw(self, first: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and whether there were any, for groups that begin at the codes `first`."""
        if len(self.codes) == 0:
            return torch.zeros_like(first), torch.zeros_like(first, dtype=torch.bool)
        low = self.before[torch.searchsorted(self.codes, first)]
        high = self.before[torch.searchsorted(self.codes, first + (1 << _BITS))]
        rank = low + _share(uniforms, high - low)
        index = torch.searchsorted(self.before, rank, right=True) - 1
        chosen = self.codes[index.clamp(max=len(self.codes) - 1)]
        return chosen & ((1 << _BITS) - 1), high > low


def _columns(inputs: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    mask = None
    tokens: Any = inputs
    if isinstance(inputs, Mapping):
        others = sorted(set(map(str, inputs)) - {_TOKENS, _MASK})
        if others or _TOKENS not in inputs:
            raise DataError(
                f"a mapping with {', '.join(map(str, inputs))}",
                where="tokens",
                advice=f"Only {_TOKENS} and {_MASK} have a law; let the module make the rest.",
            )
        tokens, mask = inputs[_TOKENS], inputs.get(_MASK)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in _TOKEN_TYPES:
        kind = (
            f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens)
        )
        raise DataError(
            f"tokens are {kind}", where="tokens", advice="Give 64- or 32-bit integers (B, T)."
        )
    if tokens.numel() == 0:
        raise DataError("no tokens", where="tokens", advice="Give at least one sequence.")
    if int(tokens.min()) < 0 or int(tokens.max()) >> _BITS or tokens.shape[1] >> _BITS:
        raise DataError(
            f"tokens from {int(tokens.min())} to {int(tokens.max())}",
            where="tokens",
            advice=f"Number them from 0 to {2**_BITS - 1}.",
        )
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.shape != tokens.shape or mask.dtype not in _MASK_TYPES
    ):
        raise DataError(
            "the attention mask is not one", where=_MASK, advice=f"Shape it like {_TOKENS}."
        )
    return tokens, mask


def _padding(tokens: Tensor, real: Tensor) -> tuple[int, bool | None]:
    """The padding token and whether it is in front."""
    if bool(real.all()):
        return -1, None
    padding = tokens[~real].unique()
    falls = (real[:, 1:] < real[:, :-1]).any()
    rises = (real[:, 1:] > real[:, :-1]).any()
    if not bool(real.any(1).all()):
        raise DataError("a sequence is empty", where=_MASK, advice="Leave it out.")
    if len(padding) > 1 or (bool(falls) and bool(rises)):
        raise DataError(**_ODD_PADDING)
    return int(padding[0]), bool(rises)


def _shifted(tokens: Tensor, lengths: Tensor, *, forward: bool = False) -> Tensor:
    """Padding moved from the front to the end, or back again (`forward`)."""
    width = tokens.shape[1]
    gap = (width - lengths)[:, None]
    columns = torch.arange(width) + (-gap if forward else gap)
    return tokens.gather(1, columns % width)


def _code(position: Tensor, previous: Tensor, token: Tensor | None = None) -> Tensor:
    group = ((position << _BITS) | previous) << _BITS
    return group if token is None else group | token


def _counted(codes: Tensor) -> tuple[Tensor, Tensor]:
    unique, counts = codes.unique(return_counts=True)
    return unique, counts


def _merged(*tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    codes, counts = (torch.cat(columns) for columns in zip(*tables, strict=True))
    unique, where = codes.unique(return_inverse=True)
    return unique, torch.zeros_like(unique).index_add(0, where, counts)


def _uniforms(num: int, generator: torch.Generator) -> Float64[Tensor, " num"]:
    """One uniform variable in each of `num` equal intervals, in random order."""
    place = torch.randperm(num, generator=generator)
    return (place + torch.rand(num, generator=generator, dtype=torch.float64)) / num


def _share(uniforms: Tensor, total: Tensor) -> Tensor:
    """Whole numbers below `total` (0 where that is 0)."""
    return torch.minimum((uniforms * total).long(), (total - 1).clamp(min=0))

"""What every sampler is: a Markov kernel that moves many chains, none knowing the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.networks.parameters import ParameterSpace
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.typing import Params

__all__ = ["Kernel", "State"]

State: TypeAlias = dict[str, Tensor]
"""All there is to know of some chains: tensors whose first axis is that of the chains."""


class Kernel(ABC):
    """A Markov kernel with the law it leaves invariant.

    A kernel is a frozen description: target and settings. What changes is the `State`, tensors with
    one row for each chain, step sizes and whatever else is adapted included. So chains can be split
    and joined by their rows, and a state on disk is all that a run needs to go on. A kernel never
    draws random numbers itself; every step gets the fixed amount that `noise_size` names. Rows must
    not influence each other.
    """

    name: str
    """As users call it: ``"HMC"``."""

    @property
    @abstractmethod
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters that are sampled."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the parameters."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the chains are."""

    @property
    @abstractmethod
    def start_size(self) -> NoiseSize:
        """Random numbers that `start` takes for each chain."""

    @property
    @abstractmethod
    def noise_size(self) -> NoiseSize:
        """Random numbers that a step takes for each chain."""

    @abstractmethod
    def start(self, initial: Params | None, noise: Noise) -> State:
        """The chains at their beginning.

        Parameters
        ----------
        initial
            Tensors ``(chains, *shape)`` by name, latent variables included where the kernel has
            them and the caller knows them; None for the kernel's own choice.
        noise
            Of size `start_size`.

        Returns
        -------
        dict
            A state.
        """

    @abstractmethod
    def step(self, state: State, noise: Noise) -> State:
        """Move every chain once, leaving the target law invariant; nothing is adapted.

        Parameters
        ----------
        state
            Not changed.
        noise
            Of size `noise_size`.

        Returns
        -------
        dict
            The next state, with the same names and shapes.
        """

    def warm_up(self, state: State, noise: Noise, step: int, total: int) -> State:  # noqa: ARG002
        """Move every chain once and learn from it how to move better.

        Parameters
        ----------
        state
            Not changed.
        noise
            Of size `noise_size`.
        step, total
            This is step ``step`` of ``total``, counted from 0. What is learned is frozen with the
            last.

        Returns
        -------
        dict
            The next state.
        """
        return self.step(state, noise)

    @abstractmethod
    def vectors(self, state: State) -> Float[Tensor, "chains P"]:
        """The parameters of each chain, laid out by `space`.

        Returns
        -------
        Tensor
            ``(chains, P)``.
        """

    @abstractmethod
    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Numbers about the last step that are recorded with every draw.

        Returns
        -------
        dict
            ``(chains,)`` each, always under the same names. The names with a meaning to the runner
            are ``"acceptance"`` (probability), ``"potential"`` (minus log density), ``"divergent"``
            and ``"step_size"``.
        """

    @property
    @abstractmethod
    def bytes_per_chain(self) -> int:
        """Memory that one chain takes while it is moved."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Target and settings in JSON's types: what tells this kernel from others.

        Returns
        -------
        dict
            Fingerprints of network and data among them.
        """

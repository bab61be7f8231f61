"""``pushforward distance``; what it needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pushforward.cli.options import ExampleOptions, NetworkOptions
from pushforward.cli.pages import (
    check_writable,
    make_folder,
    page_environment,
    refuse_overwriting,
    size_of,
)
from pushforward.cli.wording import in_words_of_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pushforward.function_space.network import ReferenceNetwork
    from pushforward.function_space.summary import FunctionSummary, InputMoments
    from pushforward.function_space.versions import VersionDistances
    from pushforward.typing import Params

__all__ = ["Distance", "EstimatorName", "MetricName", "compressed_versions"]

MetricName = Literal["euclidean", "softmax", "kl", "fisher"]
EstimatorName = Literal[
    "auto", "gated", "gaussian", "anchored", "reference", "sampled", "synthetic"
]

_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class Distance:
    """Say how far other weights are from a network as functions, without its training data.

    First summarise the network over its data: --data, and --save-summary. From then on --summary
    stands for them: no example is in it. Other weights are those of files (--other), or the
    network's own, pruned (--prune) or quantised (--quantise). With --data the distances on the data
    themselves are shown beside the estimates.

    Parameters
    ----------
    network
        The network, with the weights from which distances are measured. With --summary the weights
        are those in that file.
    data
        NumPy archive (.npz) of examples x, over which the network is summarised; with --summary,
        examples on which its estimates are checked.
    summary
        File of an earlier --save-summary.
    save_summary
        Keep the summary in this file.
    examples
        How the arrays are named and scaled.
    other
        Safetensors files with other weights of the same network.
    prune
        Shares of the weights to set to 0, smallest first, in every tensor: 0.3 0.5.
    quantise
        Numbers of bits to round the weights to, on a symmetric grid for every tensor: 8 4.
    metric
        How outputs are compared; several may be given. euclidean: half the squared difference;
        softmax: the same of probabilities; kl: in nats; fisher: its second-order form.
    estimator
        auto: what the summary favours.
    classes
        Keep moments for each target y apart.
    clusters
        Keep so many clusters of the inputs apart.
    input_moments
        What to keep of the covariance of the inputs: full, diagonal, or a number of directions.
    layer_moments
        Keep moments of the layers too, for the estimator anchored.
    outputs
        Numbers of the outputs that count, such as those of one head. Default: all.
    output
        Folder for index.html and result.json.
    json
        Write the distances to this file too.
    seed
        Of draws and clusters.
    title
        Heading of the page.
    """

    network: NetworkOptions
    data: Path | None = None
    summary: Path | None = None
    save_summary: Path | None = None
    examples: ExampleOptions = ExampleOptions()  # noqa: RUF009 - frozen
    other: tuple[Path, ...] = ()
    prune: tuple[float, ...] = ()
    quantise: tuple[int, ...] = ()
    metric: tuple[MetricName, ...] = ("euclidean",)
    estimator: EstimatorName = "auto"
    classes: Literal["targets"] | None = None
    clusters: int | None = None
    input_moments: str | None = None
    layer_moments: bool = False
    outputs: tuple[int, ...] = ()
    output: Path = Path("distance")
    json: Path | None = None
    seed: int = 0
    title: str = ""

    def run(self, command: str) -> None:
        """Make or read the summary, print the distances, and write the page.

        Parameters
        ----------
        command
            How the page can be made again, shown on it.
        """
        self._check()
        from pushforward.cli.loading import load_network
        from pushforward.function_space.versions import measure_versions
        from pushforward.report import page
        from pushforward.report.function_space import function_space_section

        net = load_network(self.network, seed=self.seed)
        known = self._read(net) if self.summary is not None else None
        inputs = None if self.data is None else self._inputs(net, self.data)
        # Whatever can be refused is refused before the pass over the data, not after it.
        versions = self._versions(net)
        reference = self._reference(net, inputs) if known is None else known.reference
        if versions:
            self._check_question(reference)
        self._check_places(with_page=bool(versions))
        with in_words_of_options():
            summary = self._make(net, inputs) if known is None else known
        print(summary, flush=True)
        if self.save_summary is not None:
            summary.save(self.save_summary)
            print(f"Summary: {self.save_summary}")
        if not versions:
            return
        with in_words_of_options():
            found = measure_versions(
                summary,
                versions,
                metrics=self.metric,
                estimator=None if self.estimator == "auto" else self.estimator,
                outputs=list(self.outputs) or None,
                data=inputs,
                seed=self.seed,
            )
        _print_distances(found, self.network.network)
        if self.json is not None:
            page.write_json({"command": command, **found.to_dict()}, self.json)
        section = function_space_section(found, about=self._about(summary))
        factory = self.network.network.rpartition(":")[2]
        source = {"Examples": str(self.data)} if self.data is not None else {}
        if self.summary is not None:
            source["Summary"] = str(self.summary)
        written = page.write(
            page.Report(
                title=self.title or f"How far {factory} moved",
                subtitle=f"{size_of(self.network, net)}, summarised over "
                f"{summary.num_examples:,} examples",
                sections=(section,),
                environment=page_environment(self.network, net, command, self.seed, source),
            ),
            self.output / "index.html",
        )
        print(section.verdict.headline)
        print(f"Report: {written}")

    def _check(self) -> None:
        """Refuse options that contradict each other, before anything is loaded.

        Raises
        ------
        OptionError
            With what is missing or too much.
        """
        from pushforward.errors import OptionError
        from pushforward.options import whole_number

        if self.data is None and self.summary is None:
            raise OptionError(
                "there is nothing to measure from",
                where="--data and --summary",
                advice="Give --data FILE.npz to summarise the network, or --summary FILE.",
            )
        kept = {
            "--classes": self.classes is not None,
            "--clusters": self.clusters is not None,
            "--input-moments": self.input_moments is not None,
            "--layer-moments": self.layer_moments,
        }
        given = [name for name, is_given in kept.items() if is_given]
        if self.summary is not None and given:
            raise OptionError(
                f"{self.summary} has been made already",
                where=" and ".join(given),
                advice="What is kept is chosen when a summary is made: leave out --summary, and "
                "give --data.",
            )
        if not (self.other or self.prune or self.quantise or self.save_summary):
            raise OptionError(
                "no other weights are given",
                where="pushforward distance",
                advice="Give --other FILE, --prune SHARE or --quantise BITS, or keep the summary "
                "with --save-summary FILE.",
            )
        if self.classes is not None and self.clusters is not None:
            raise OptionError(
                "both are given",
                where="--classes and --clusters",
                advice="Choose one: what is kept apart is either.",
            )
        if len(set(self.metric)) < len(self.metric):
            raise OptionError(" ".join(self.metric), where="--metric", advice="Name each once.")
        if self.estimator == "anchored" and self.summary is None and not self.layer_moments:
            raise OptionError(
                "it needs moments of the layers, which are not kept",
                where="--estimator anchored",
                advice="Add --layer-moments.",
            )
        if self.clusters is not None:
            whole_number(self.clusters, "--clusters")
        advice = "Give a whole number from 0 on, below 2^63."
        whole_number(self.seed, "--seed", least=0, most=_SEED_LIMIT - 1, advice=advice)
        _moments(self.input_moments)
        self._check_overwriting()

    def _check_overwriting(self) -> None:
        """Refuse to write where something is read, or where something else is written."""
        read = [
            ("--data", self.data),
            ("--weights", self.network.weights),
            ("--summary", self.summary),
            *(("--other", path) for path in self.other),
        ]
        written = [("--save-summary", self.save_summary), ("--json", self.json)]
        if self.other or self.prune or self.quantise:
            names = ("index.html", "result.json")
            written = [*(("a file of --output", self.output / name) for name in names), *written]
        refuse_overwriting(read, written)

    def _check_places(self, *, with_page: bool) -> None:
        """Refuse files that cannot be written before the work, not after it."""
        if self.save_summary is not None:
            check_writable(self.save_summary)
        if with_page:
            make_folder(self.output)
            for name in ("index.html", "result.json"):
                check_writable(self.output / name)
            if self.json is not None:
                check_writable(self.json)

    def _reference(self, net: nn.Module, inputs: Tensor | None) -> ReferenceNetwork:
        """The network as it will be summarised, tried on a few examples."""
        from pushforward.errors import NetworkError
        from pushforward.function_space.network import ReferenceNetwork

        assert inputs is not None
        reference = ReferenceNetwork.of(net, tuple(inputs.shape[1:]))
        try:
            return reference.seen_on(inputs[:2])
        except NetworkError as error:
            if "cannot take" not in error.what:
                raise
            raise NetworkError(
                error.what,
                where=f"{self.network.network} on {self.data}",
                advice="Give the shape of one example with --input-shape, or choose another array "
                "with --key; token ids need --tokens.",
            ) from error

    def _check_question(self, reference: ReferenceNetwork) -> None:
        """Refuse outputs, metrics and estimators that the network does not have."""
        from pushforward.errors import UnsupportedLayerError
        from pushforward.function_space.metrics import check_axes, check_probabilities
        from pushforward.function_space.network import select_outputs

        count = prod(reference.output_shape)
        with in_words_of_options():
            chosen = select_outputs(count, list(self.outputs) or None)
            for metric in self.metric:
                check_axes(reference.output_shape, metric)
                check_probabilities(count if chosen is None else len(chosen), metric)
        if self.estimator not in {"auto", "synthetic"}:
            try:
                _ = reference.graph
            except UnsupportedLayerError as error:
                raise UnsupportedLayerError(
                    f"it takes a chain of known layers ({error.where}: {error.what})",
                    where=f"--estimator {self.estimator}",
                    advice="Leave it out, or use --estimator synthetic, for any other network.",
                ) from error

    def _read(self, net: nn.Module) -> FunctionSummary:
        """The summary of a file; `net` gets its weights.

        Returns
        -------
        FunctionSummary
            Of the network.

        Raises
        ------
        WeightsError
            When other weights than those of the summary were given for the network.
        """
        from pushforward.errors import WeightsError
        from pushforward.function_space.summary import FunctionSummary

        assert self.summary is not None
        summary = FunctionSummary.load(self.summary, net)
        reference = summary.reference
        given = self.network.weights
        if given is not None and not reference.unchanged(reference.tensors_of(net)):
            raise WeightsError(
                f"these are not the weights of which {self.summary} is a summary",
                where=str(given),
                advice="Leave out --weights, since the summary has them; measure these with "
                f"--other {given}.",
            )
        net.load_state_dict(reference.module.state_dict())
        return summary

    def _make(self, net: nn.Module, inputs: Tensor | None) -> FunctionSummary:
        from pushforward.cli.loading import load_examples
        from pushforward.function_space.summarize import summarize

        assert self.data is not None
        assert inputs is not None
        data: Tensor | tuple[Tensor, Tensor] = inputs
        if self.classes is not None:
            data = load_examples(
                self.data, self.examples, device=self.network.device, dtype=_dtype(net)
            )
        return summarize(
            net,
            data,
            classes=self.classes,
            clusters=self.clusters,
            input_moments=_moments(self.input_moments),
            layer_moments=self.layer_moments,
            seed=self.seed,
        )

    def _inputs(self, net: nn.Module, path: Path) -> Tensor:
        from pushforward.cli.loading import load_inputs

        return load_inputs(path, self.examples, device=self.network.device, dtype=_dtype(net))

    def _versions(self, net: nn.Module) -> dict[str, Params]:
        """Weights of all files, and compressed ones, by name."""
        names = [path.name for path in self.other]
        clear = len(set(names)) == len(names)
        versions = {(p.name if clear else str(p)): _weights(net, p) for p in self.other}
        return versions | compressed_versions(net, self.prune, self.quantise)

    def _about(self, summary: FunctionSummary) -> str:
        count = f"{summary.num_examples:,} examples"
        if self.summary is not None:
            checked = "" if self.data is None else f", checked on those of {self.data.name}"
            return f"The network is known from {self.summary.name}, made of {count}{checked}."
        assert self.data is not None
        return f"The network was summarised over the {count} of {self.data.name}."


def compressed_versions(
    net: nn.Module, shares: Sequence[float], bits: Sequence[int]
) -> dict[str, Params]:
    """Pruned and quantised versions of a network, by name.

    Parameters
    ----------
    net
        With the weights to compress.
    shares
        Of the weights that are set to 0.
    bits
        That the weights are rounded to.

    Returns
    -------
    dict
        Tensors by name, as a summary takes them.

    Raises
    ------
    OptionError
        For a share or a number of bits that is none.
    """
    from pushforward.errors import OptionError
    from pushforward.function_space.compression import pruned, quantised

    versions = {}
    try:
        for share in shares:
            versions[f"{100 * share:g} % pruned"] = pruned(net, share)
        for number in bits:
            versions[f"{number} bits"] = quantised(net, number)
    except OptionError as error:
        option = "--prune" if error.where == "share" else "--quantise"
        raise OptionError(error.what, where=option, advice=error.advice) from error
    return versions


def _weights(net: nn.Module, path: Path) -> Params:
    """Tensors of a file, which have to be those of the network, and finite.

    Returns
    -------
    Params
        By name.

    Raises
    ------
    WeightsError
        When they are not.
    """
    import copy

    from pushforward.cli.loading import load_weights
    from pushforward.errors import WeightsError

    other = copy.deepcopy(net)
    load_weights(other, path)
    named = (*other.named_parameters(), *other.named_buffers())
    tensors = {name: tensor.detach() for name, tensor in named}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise WeightsError(
                f"{name!r} holds NaN or infinite entries",
                where=str(path),
                advice="Use weights from before training diverged.",
            )
    return tensors


def _moments(text: str | None) -> InputMoments:
    """Read ``--input-moments``.

    Returns
    -------
    str or int
        As `pushforward.summarize` takes it.

    Raises
    ------
    OptionError
        When it is neither a name nor a positive number.
    """
    from pushforward.errors import OptionError

    if text in {None, "full"}:
        return "full"
    if text == "diagonal":
        return "diagonal"
    assert text is not None
    if not text.isdecimal() or int(text) == 0:
        raise OptionError(
            f"{text!r}",
            where="--input-moments",
            advice="Choose full, diagonal, or a positive number of directions.",
        )
    return int(text)


def _dtype(net: nn.Module) -> torch.dtype | None:
    parameter = next(net.parameters(), None)
    return None if parameter is None else parameter.dtype


def _print_distances(found: VersionDistances, name: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pushforward.report.formatting import number, with_error
    from pushforward.report.function_space import percent

    several = len(found.metrics) > 1
    checked = any(row.truth is not None for row in found.rows)
    table = Table()
    table.add_column("version", overflow="fold")
    if several:
        table.add_column("metric")
    for heading in ("distance ± error", "of variance", *(["on the data"] if checked else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        cells = [escape(row.name), *([row.metric] if several else [])]
        cells.append(with_error(float(row.estimate), float(row.estimate.standard_error)))
        cells.append(percent(row.share))
        if checked:
            cells.append("" if row.truth is None else number(row.truth))
        table.add_row(*cells)
    console = Console()
    console.print(
        f"Distance from {name} by the {found.estimator} estimator", markup=False, highlight=False
    )
    console.print(table)
    for metric, check in found.checks:
        if check.status != "pass":
            console.print(f"{metric}: {check}", markup=False, highlight=False)

"""Engines: the protocol that each implements, the table of their names, and how one is loaded by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Protocol

from ksweep.utils.errors import RequestError, SpecError
from ksweep.utils.imports import check_has, is_dotted_name, load_named

if TYPE_CHECKING:
    from ksweep.inference.prompts import PlannedAv, PromptedModel
    from ksweep.inference.request import DecodingOptions, Draw, DrawBatch

DEFAULT_ENGINE = "builtin"
"""Its draws have had no engine in their keys since before there was a choice, and its identity stays empty."""

ENGINES = {
    DEFAULT_ENGINE: "ksweep.inference.engine:BuiltinEngine",
    "naive": "ksweep.inference.naive_engine:NaiveEngine",
    "vllm": "ksweep.inference.vllm_engine:VllmEngine",
}
"""Names of engines for `sampling.engine`; any other is named as "package.module:name"."""


class Engine(Protocol):
    """Samples draws from AVs. One instance serves all streams of a process, and several streams may run in turns.

    An engine may also have `loads_weights = True`, if it loads the weights of AVs itself from files (`prompts.ModelFiles`), and a
    method `refuses(av, temperature=...)`, which says of a `prompts.PlannedAv` (None: an AV that is not in such files) why it will
    not draw such texts from it, or None.
    """

    @property
    def identity(self) -> Mapping[str, str]:
        """What the draws' keys say of the engine: its name, its version, and whether noise is keyed.

        Whatever gives other draws for the same seed needs another identity.
        """

    def supports(self, verbalizer: PromptedModel) -> str | None:
        """Return why this engine cannot draw from an AV, or None if it can."""

    def generate(
        self, verbalizer: PromptedModel, batches: Iterable[DrawBatch], options: DecodingOptions
    ) -> Iterator[tuple[int, Draw]]:
        """Yield every draw of every batch once, in any order, with its batch's number (0, 1, ...).

        A batch is pulled when the engine has room for its draws, because pulling claims it: no other rank will draw it. A draw
        holds its tokens with the stop token, and their log probability under the model itself (temperature 1, no top_p). The
        stream ends early once `options.should_stop()` returns true.
        """

    def numerics(self, verbalizer: PromptedModel, max_new_tokens: int) -> Mapping[str, str]:
        """Return how texts of up to that length are computed (precision, attention, ...), for the run record."""


@cache
def load_engine(name: str) -> Engine:
    """Return this process's instance of an engine.

    Args:
        name: one of `ENGINES`, or the "package.module:name" of an `Engine`, or of a class or function that returns one.

    Raises:
        SpecError: there is no such engine, or it lacks a method or an identity.
    """
    if name not in ENGINES and not is_dotted_name(name):
        raise SpecError(
            f"sampling.engine={name!r} is neither one of {', '.join(ENGINES)} nor a dotted name (package.module:name)"
        )
    engine = load_named(ENGINES.get(name, name), "sampling.engine")
    if isinstance(engine, type) or (callable(engine) and not hasattr(engine, "generate")):
        engine = engine()
    check_has(engine, ("identity", "supports", "generate", "numerics"), f"sampling.engine={name}")
    if name != DEFAULT_ENGINE and not engine.identity:
        raise SpecError(
            f"sampling.engine={name}: its identity is empty, so its draws would be taken for those of the built-in engine. State "
            "its name and version there."
        )
    return engine  # type: ignore[no-any-return]


def engine_identity(name: str) -> dict[str, str]:
    """Return what the keys of draws hold of an engine; nothing is imported for the built-in one, which adds nothing."""
    return {} if name == DEFAULT_ENGINE else dict(load_engine(name).identity)


def loads_weights(name: str) -> bool:
    """Return whether an engine loads the weights of AVs itself; nothing is imported for the built-in one."""
    return name != DEFAULT_ENGINE and bool(getattr(load_engine(name), "loads_weights", False))


def planned_refusal(name: str, av: PlannedAv | None, *, temperature: float) -> str | None:
    """Return why an engine will not draw such texts from an AV that is not loaded yet, or None if it knows no reason."""
    refuses = None if name == DEFAULT_ENGINE else getattr(load_engine(name), "refuses", None)
    reason: str | None = None if refuses is None else refuses(av, temperature=temperature)
    return reason


def engine_for(name: str, verbalizer: PromptedModel) -> Engine:
    """Return an engine that can draw from an AV.

    Raises:
        RequestError: the engine says that it cannot; the message has its reason.
    """
    engine = load_engine(name)
    if reason := engine.supports(verbalizer):
        raise RequestError(f"the engine {name} cannot draw from this AV: {reason}. Choose another sampling.engine.")
    return engine

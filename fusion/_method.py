"""What a merge word is to every engine: its functions, what they ask for, its parameters for one tensor.

method = Method.of("ties")
params = method.check({"density": {"layers": [0.2, 0.8]}}, k=2, base=True, weights=True)
concrete = method.resolve(params, name, layer)
stats = {}
for index in range(method.needed(concrete)):
    running = Running()
    for number, region in enumerate(regions):  # each with stats=stats
        running.add(number, method.call_pass(index, region, concrete))
    stats = method.settle({**stats, **running.values()}, concrete, weights)
merged = [method.call(replace(region, stats=stats), concrete).tensor for region in regions]
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from fusion import words
from fusion._params import leaves, resolved, varies
from fusion._say import nearest
from fusion._types import fit

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.merge._x import Outputs, Reading

UNITS = ("element", "row", "tensor", "adapter")
SCOPES = ("tensor", "model")


@dataclass(frozen=True)
class Region:
    """The same region of K models, and all that a method may ask for besides its parameters."""

    # (K, n) float32; UNIT tensor: (K, *shape); SEQUENTIAL: one (*shape) after another
    tensors: Tensor | Iterator[Tensor]
    base: Tensor | None  # (n,) or (*shape)
    weights: Tensor  # (K,) float32
    name: str
    shape: tuple[int, ...]  # of the whole tensor
    layer: tuple[int, int] | None = None  # index and count
    start: int = 0  # of the region in the flattened tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # combined and settled results of the earlier passes
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    merged: Tensor | None = None  # what a post word follows: its `tensor`

    @property
    def stacked(self) -> Tensor:
        """The models' regions, for those that get them all at once: every method but the sequential ones."""
        return cast("Tensor", self.tensors)

    def supply(self, name: str) -> Any:
        """What an argument of that name gets."""
        if name == "draw":
            from fusion.merge._draw import Draw

            one = self.stacked[0]
            return Draw(self.seed, self.name, self.start, one.numel(), self.step, one.device)
        return self.merged if name == "tensor" else vars(self)[name]


SUPPLIED = ("tensors", "tensor", "base", "weights", "stats", "inputs", "draw", "name", "shape", "layer")


@dataclass(frozen=True)
class Method:
    """A word of the room `merge`, or of `post`, ready to be called."""

    word: str
    room: str
    function: Callable[..., Any]
    passes: tuple[Callable[..., Mapping[str, Reading]], ...]  # statistics, in order
    parameters: Mapping[str, words.Parameter]
    constants: Mapping[str, Any]
    settler: Callable[..., Mapping[str, Tensor]] | None  # the module's `settle`
    stayer: Callable[..., bool] | None  # the module's `equal_stays`
    counter: Callable[..., int] | None = None  # the module's `passes`

    @classmethod
    @functools.cache
    def of(cls, word: str, room: str = "merge") -> Method:
        """The word's method; imports its module. ValueError with the nearest guess when there is no such word."""
        found = words.find(room, word)
        function = words.load(room, word)
        module = vars(words.module(found))
        passes = module.get("statistics", ())
        method = cls(
            word,
            room,
            function,
            tuple(passes) if isinstance(passes, tuple | list) else (passes,),
            {parameter.name: parameter for parameter in found.parameters},
            found.constants,
            module.get("settle"),
            module.get("equal_stays"),
            module.get("passes"),
        )
        for helper in (*method.passes, method.settler, method.stayer, method.counter):
            for name in () if helper is None else _asked(helper):
                assert name in SUPPLIED or name in method.parameters, f"{word}: {helper} asks for '{name}'"
        assert method.unit in UNITS and method.constants.get("SCOPE", "tensor") in SCOPES
        return method

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """Names of what the function and its passes ask for besides parameters: "base", "weights", "inputs", ..."""
        return frozenset(n for f in (self.function, *self.passes) for n in _asked(f) if n in SUPPLIED)

    @property
    def base_required(self) -> bool:
        return any(_asked(f).get("base") is inspect.Parameter.empty for f in (self.function, *self.passes))

    @property
    def unit(self) -> str:
        """element | row | tensor | adapter."""
        return str(self.constants.get("UNIT", "element"))

    @property
    def sequential(self) -> bool:
        return bool(self.constants.get("SEQUENTIAL", False))

    @property
    def models(self) -> tuple[int, int | None]:
        """Fewest and most models."""
        fewest, most = self.constants.get("MODELS", (1, None))
        return fewest, most

    @property
    def inputs(self) -> Mapping[str, str]:
        """Sidecar statistics it reads: name -> "tensor" (whole) or "element" (the same region)."""
        return dict(self.constants.get("INPUTS", {}))

    @property
    def optional(self) -> tuple[str, ...]:
        """Of the sidecar statistics, those that may be missing everywhere; the method then gets None for them."""
        return tuple(self.constants.get("OPTIONAL", ()))

    @property
    def extras(self) -> Mapping[str, str]:
        """By-products: name -> dtype."""
        return dict(self.constants.get("EXTRAS", {}))

    def scope(self, params: Mapping[str, Any]) -> str:
        """tensor | model: whether statistics are of one tensor or of all together; without any, of one tensor."""
        every = {parameter.name: parameter.default for parameter in self.parameters.values()} | dict(params)
        if not any(name in every and varies(every[name]) for name in self.parameters) and not self.needed(every):
            return "tensor"
        return str(every["scope"]) if "scope" in self.parameters else str(self.constants.get("SCOPE", "tensor"))

    def check(
        self,
        params: Mapping[str, Any],
        k: int,
        *,
        base: bool = True,
        weights: bool = False,
        live: bool = False,
        place: str = "",
    ) -> dict[str, Any]:
        """The given parameters, fitted to their annotations; ValueError, one sentence, for what the method can't take.

        `k` models; `base`, `weights`: whether they were given (see `weighed`); `live`: shards of a model in training. A
        base that the method does not look at is no error: it still lends its configuration and the tensors that are
        copied.
        """
        at = f"{place}: " if place else ""
        fitted: dict[str, Any] = {}
        for name, value in params.items():
            if name not in self.parameters:
                raise ValueError(f"{at}{self.word} has no parameter '{name}'{nearest(name, self.parameters)}")
            fitted[name] = self._fitted(name, value, k, f"{at}{self.word}.{name}")
        for name, parameter in self.parameters.items():
            if parameter.required and name not in params:
                raise ValueError(f"{at}{self.word} needs '{name}'")
        if self.room != "merge":
            return fitted
        fewest, most = self.models
        if k < fewest or (most is not None and k > most):
            allowed = f"at least {fewest}" if most is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise ValueError(f"{at}{self.word} merges {allowed} models, besides the base, and was given {k}")
        if self.base_required and not base:
            raise ValueError(f"{at}{self.word} works on what changed since a common base; give it: base")
        if weights and "weights" not in self.needs:
            raise ValueError(
                f"{at}{self.word} weighs the models itself, or not at all; leave the weights out, or all 1"
            )
        if live and (self.unit != "element" or self.sequential):
            raise ValueError(
                f"{at}{self.word} needs whole {'rows' if self.unit == 'row' else 'tensors'}, and shards of a model in "
                f"training have parts of them; element methods go there: linear, task_arithmetic, ties, dare, ..."
            )
        if self.scope(fitted) == "model":
            for name in sorted({n for f in (*self.passes, self.settler) if f is not None for n in _asked(f)}):
                if name in fitted and varies(fitted[name]):
                    raise ValueError(
                        f"{at}{self.word}.{name} goes into one statistic of the whole model (scope: model), so it "
                        f"cannot depend on the layer or the tensor; give a number"
                    )
        return fitted

    def _fitted(self, name: str, value: Any, k: int, place: str) -> Any:
        annotation = self.parameters[name].annotation
        given = list(value) if isinstance(value, tuple) else value
        each = isinstance(given, list) and "Sequence" in annotation
        if each and len(given) != k and self.room == "merge":
            raise ValueError(f"{place}: {len(given)} values for {k} models; give one, or one for each model")
        for leaf, between in leaves(given, place, each):
            # what is interpolated comes out as a number with a fraction
            if between and (isinstance(leaf, bool) or not isinstance(leaf, int | float)):
                raise ValueError(f"{place}: layers interpolates between numbers, and {leaf!r:.60} is none")
            if isinstance(leaf, float) and math.isnan(leaf):
                raise ValueError(f"{place}: a number is needed here, not NaN")
            _, allowed = fit(float(leaf) if between else leaf, annotation)
            if allowed:
                raise ValueError(f"{place}: {allowed} is needed here, not {type(leaf).__name__} {leaf!r:.60}")
        return given

    def resolve(self, params: Mapping[str, Any], name: str, layer: tuple[int, int] | None = None) -> dict[str, Any]:
        """All parameters of the method for one tensor: given ones without their mappings, defaults for the others."""
        defaults = _asked(self.function)
        return {
            one: resolved(params[one], name, layer, f"{self.word}.{one}") if one in params else defaults[one]
            for one in self.parameters
        }

    def needed(self, params: Mapping[str, Any]) -> int:
        """How many of the statistics passes these parameters need, the first ones; all, unless the module says."""
        if self.counter is None:
            return len(self.passes)
        return self.counter(**{n: params[n] for n in _asked(self.counter)})

    def call_pass(self, index: int, region: Region, params: Mapping[str, Any]) -> Mapping[str, Reading]:
        """The readings of statistics pass `index` on one region; `region.stats` has the earlier passes' results."""
        if index >= self.needed(params):
            return {}
        return self.passes[index](**_arguments(self.passes[index], region, params))

    def settle(
        self, stats: Mapping[str, Tensor], params: Mapping[str, Any], weights: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """What later passes and the map see in `stats`; to be called once after each pass, on all results so far."""
        if self.settler is None or not stats:
            return stats
        supplied = {"stats": stats, "weights": weights}
        return self.settler(**{n: supplied[n] if n in supplied else params[n] for n in _asked(self.settler)})

    def call(self, region: Region, params: Mapping[str, Any]) -> Outputs:
        """The merged region, with by-products."""
        from fusion.merge._x import Outputs

        out = self.function(**_arguments(self.function, region, params))
        return out if isinstance(out, Outputs) else Outputs(out)

    def equal_stays(self, weights: Tensor, params: Mapping[str, Any]) -> bool:
        """Whether models that all agree, base included, come out as they are."""
        if self.stayer is None:
            return True
        return bool(self.stayer(**{n: weights if n == "weights" else params[n] for n in _asked(self.stayer)}))


def weighed(weights: Sequence[float] | None) -> bool:
    """Whether weights were given: 1 each says what leaving them out says."""
    return weights is not None and any(float(one) != 1 for one in weights)


@functools.cache
def _asked(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Argument names of a function, with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def _arguments(function: Callable[..., Any], region: Region, params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] if name in params else region.supply(name) for name in _asked(function)}

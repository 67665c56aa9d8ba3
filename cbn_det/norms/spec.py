"""Norms by name: ``"CBN(window=8)"`` to a layer, and the one table of names."""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_NORMS: dict[str, type[nn.Module]] = {}
_WIDEST = 4096  # channels of a layer that is built only to be looked at

T = TypeVar("T", bound=type[nn.Module])


def register_norm(name: str) -> Callable[[T], T]:
    """Class decorator: makes a norm valid wherever a config names one.

    The class is called as ``cls(num_features, **options)`` with the options of the config string,
    which are checked against its signature::

        @register_norm("MyNorm")
        class MyNorm2d(nn.BatchNorm2d):
            def __init__(self, num_features, *, strength=1.0): ...

        NORM: "MyNorm(strength=0.5)"

    Raises:
        ValueError: the name is taken, or is not an identifier or several joined by +.
    """

    def decorator(cls: T) -> T:
        if not _is_name(name):
            raise ValueError(
                f"{name!r} cannot name a norm: expected an identifier, or several joined by +"
            )
        if _NORMS.get(name, cls) is not cls:
            raise ValueError(f"a norm named {name!r} is registered already: {_NORMS[name]}")
        _NORMS[name] = cls
        return cls

    return decorator


def known_norms() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_NORMS)


def norm_class(name: str) -> type[nn.Module]:
    """The class registered under a name."""
    return _NORMS[name]


def name_of(cls: type[nn.Module]) -> str | None:
    """The name that a class is registered under, None if it is not."""
    return next((name for name, known in _NORMS.items() if known is cls), None)


def options_of(cls: type[nn.Module]) -> dict[str, Any]:
    """Option names and defaults of a norm: those of its constructor and, where this hands further
    keywords on, of the constructors that it has from bases outside torch."""
    options: dict[str, Any] = {}
    constructors = [base for base in cls.__mro__ if "__init__" in vars(base)]
    for at, base in enumerate(constructors):
        if at and base.__module__.startswith("torch."):
            break
        _, _, *parameters = inspect.signature(base.__init__).parameters.values()
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                options.setdefault(p.name, p.default)
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return options


def shown_options(layer: nn.Module) -> str:
    """The options of a layer as a config spells them, with what they have come to there: times in
    optimiser steps, once these are known, and the number of groups that its channels allow. That a
    layer has weight and bias goes without saying."""
    options = dict(layer.options())
    if options.get("affine"):
        del options["affine"]
    for name, value in options.items():
        if hasattr(layer, f"{name}_steps"):
            steps = getattr(layer, f"{name}_steps")
            options[name] = round(value, 3) if steps is None else steps
        options[name] = getattr(layer, f"{name}_used", options[name])
    return _listed(options)


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits ``"CBN(window=8)"`` into ``("CBN", {"window": 8})``; a bare name has no options.

    Raises:
        ValueError: not of that form; says what the form is.
    """
    name, bracket, options_text = spec.strip().partition("(")
    name = name.rstrip()
    if _is_name(name) and not bracket:
        return name, {}
    try:
        call = ast.parse(f"norm({options_text}", mode="eval").body
        is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if not (_is_name(name) and bracket and is_call) or call.args:
            raise ValueError("not a call with named options")
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in options or len(options) != len(call.keywords):
            raise ValueError("an option without a name, or twice")
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read the norm {spec!r} ({error}). Expected a name, or a name with options and"
            ' plain values, such as NORM: "CBN(window=8, burn_in=3000)"; as an override of a'
            " LazyConfig it needs inner quotes: 'model.backbone.norm=\"CBN(window=8)\"'"
        ) from None
    return name, options


def _is_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("+"))


def try_norm(spec: str) -> nn.Module:
    """Builds a layer that a config string names, of whatever width its options allow: which widths
    they fit is for the places where layers are built to tell.

    Raises:
        ValueError: as :func:`build_norm`.
    """
    values = parse_spec(spec)[1].values()
    # so many groups, say, divide as many channels
    widths = [value for value in values if type(value) is int and 0 < value <= _WIDEST]
    for width in (32, *widths):
        with contextlib.suppress(ValueError):
            return build_norm(spec, width)
    return build_norm(spec, 32)


def build_norm(spec: str, num_features: int, **defaults: Any) -> nn.Module:
    """Builds the layer that a config string names.

    Args:
        spec: a registered name, with options in parentheses or without: ``"CBN(window=8)"``.
        num_features: channels.
        defaults: options that the string may override.

    Raises:
        ValueError: unknown name or option, or a value out of range; lists what is known.
    """
    name, options = parse_spec(spec)
    if name not in _NORMS:
        raise ValueError(f"unknown norm {name!r} in {spec!r}. Known: {', '.join(sorted(_NORMS))}")
    known = options_of(_NORMS[name])
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"norm {spec!r}: {name} has no option {unknown[0]!r}. Its options: {_listed(known)}"
        )
    try:
        return _NORMS[name](num_features, **{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"norm {spec!r}: {error}") from error

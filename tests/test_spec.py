"""Norms by name."""

import pytest
import torch
from torch import nn

from cbn_det.norms import CBN2d, build_norm, known_norms, parse_spec, register_norm, spec


@pytest.fixture
def clean_table(monkeypatch):
    monkeypatch.setattr(spec, "_NORMS", dict(spec._NORMS))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("CBN", ("CBN", {})),
        (" CBN ", ("CBN", {})),
        ("CBN()", ("CBN", {})),
        ("CBN(window=8)", ("CBN", {"window": 8})),
        (
            "CBN( window = 8, compensation='none', positions=None, momentum=1e-2,)",
            ("CBN", {"window": 8, "compensation": "none", "positions": None, "momentum": 0.01}),
        ),
        ("X(a=-1, b=(1, 2), c={'e': [True]})", ("X", {"a": -1, "b": (1, 2), "c": {"e": [True]}})),
        ("SomebodysNorm", ("SomebodysNorm", {})),
    ],
)
def test_parse(text, expected):
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "CBN(",
        "CBN(8)",
        "CBN(window=8",
        "CBN(window=x)",
        "CBN(window=print(1))",
        "CBN(window=8, window=4)",
        "CBN(**{'window': 4})",
        "CBN(*[4])",
        "CBN, BN",
        "CBN;BN",
        "a.CBN(window=4)",
        "CBN(window=4)(eps=1)",
        "lambda: 0",
        "CBN-8",
        "1",
        "CBN(window==4)",
        "CBN\x00",
    ],
)
def test_parse_errors_show_the_form(text):
    with pytest.raises(ValueError, match=r'NORM: "CBN\(window=8, burn_in=3000\)".*inner quotes'):
        parse_spec(text)


def test_nothing_in_a_spec_is_evaluated(tmp_path):
    with pytest.raises(ValueError):
        parse_spec(f"CBN(window=open({str(tmp_path / 'x')!r}, 'w'))")
    assert not list(tmp_path.iterdir())


def test_build():
    norm = build_norm("CBN(window=8, burn_in=3)", 12, eps=1e-3, window=2)
    assert type(norm) is CBN2d and norm.num_features == 12
    assert (norm.window, norm.burn_in, norm.eps) == (8, 3, 1e-3)  # the string wins over defaults
    assert isinstance(norm, nn.BatchNorm2d)


def test_class_names_start_with_the_name_in_configs():
    for name in known_norms():
        assert spec._NORMS[name].__name__.startswith(name.replace("+", ""))


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown norm 'CBM'.*Known:.*CBN"):
        build_norm("CBM(window=3)", 4)


def test_unknown_option_lists_the_known():
    with pytest.raises(
        ValueError, match=r"CBN has no option 'windows'.*window=4.*compensation='taylor'"
    ):
        build_norm("CBN(windows=3)", 4)
    with pytest.raises(ValueError, match="no option 'num_features'"):
        build_norm("CBN(num_features=3)", 4)


@pytest.mark.parametrize(
    "text, named",
    [
        ("CBN(window=0)", "window=0"),
        ("CBN(window='4')", "window='4'"),
        ("CBN(burn_in=1.5)", "burn_in=1.5"),
        ("CBN(compensation='drop')", "taylor"),
        ("CBN(momentum='a')", "CBN(momentum='a')"),
        ("CBN(compensation='exact')", "compensation='exact'"),
        ("CBN(positions='a')", "CBN(positions='a')"),
        ("CBN(eps='a')", "CBN(eps='a')"),
    ],
)
def test_bad_values_are_one_clear_error_that_shows_the_spec(text, named):
    with pytest.raises(ValueError) as error:
        build_norm(text, 4)
    assert text in str(error.value) and named in str(error.value)


def test_a_norm_of_the_users_own(clean_table):
    @register_norm("MyNorm")
    class MyNorm2d(nn.BatchNorm2d):
        def __init__(self, num_features, *, strength=1.0):
            super().__init__(num_features)
            self.strength = strength

    assert {"CBN", "MyNorm"} <= set(known_norms())
    norm = build_norm("MyNorm(strength=0.5)", 3)
    assert type(norm) is MyNorm2d and norm.strength == 0.5
    assert build_norm("MyNorm", 3)(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="no option 'window'.*strength=1.0"):
        build_norm("MyNorm(window=4)", 3)
    assert register_norm("MyNorm")(MyNorm2d) is MyNorm2d  # the same class again does no harm


def test_options_that_a_class_hands_on_to_its_base(clean_table):
    @register_norm("Mine")
    class Mine2d(CBN2d):
        def __init__(self, num_features, *, strength=1.0, window=2, **shared):
            super().__init__(num_features, window=window, **shared)
            self.strength = strength

    norm = build_norm("Mine(strength=0.5, burn_in=3)", 4)
    assert (norm.window, norm.burn_in) == (2, 3)
    own = {"strength": 0.5, "window": 2, "burn_in": 3}
    assert norm.options() == build_norm("CBN", 4).options() | own
    with pytest.raises(ValueError, match="no option 'device'.*strength=1.0, window=2, burn_in="):
        build_norm("Mine(device='cpu')", 4)


def test_a_value_that_the_users_class_cannot_take(clean_table):
    @register_norm("Scaled")
    class Scaled2d(nn.BatchNorm2d):
        def __init__(self, num_features, *, scale):
            super().__init__(num_features)
            self.scale = scale + 1.0

    assert build_norm("Scaled(scale=2)", 4).scale == 3.0
    for text in ("Scaled(scale='a')", "Scaled"):
        with pytest.raises(ValueError, match="norm .Scaled"):
            build_norm(text, 4)


def test_a_taken_name_and_a_bad_one(clean_table):
    with pytest.raises(ValueError, match="'CBN' is registered already.*CBN2d"):
        register_norm("CBN")(nn.BatchNorm2d)
    for name in ("my norm", "", "CBN(window=2)"):
        with pytest.raises(ValueError, match="cannot name a norm"):
            register_norm(name)(nn.BatchNorm2d)
    assert build_norm("CBN", 4).window == 4

"""Keys are the same in every process and differ exactly where the content differs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksweep import Sampling
from ksweep.utils.fingerprint import canonical_json, fingerprint

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_canonical_json_of_sampling_equals_the_text_worked_out_by_hand() -> None:
    expected = '{"engine":"builtin","max_new_tokens":200,"num_draws":16,"seed":0,"temperature":1,"top_p":1}'
    assert canonical_json(Sampling()) == expected


def test_fingerprint_in_another_process_is_the_same() -> None:
    code = (
        "from ksweep import Sampling; from ksweep.utils import fingerprint as f; print(f.fingerprint(Sampling(temperature=0.7)))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == fingerprint(Sampling(temperature=0.7))


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=4), plain, max_size=4))
def test_fingerprint_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


def test_fingerprint_of_one_and_one_point_zero_is_the_same() -> None:
    assert fingerprint(Sampling(temperature=1)) == fingerprint(Sampling(temperature=1.0))


def test_fingerprint_differs_when_any_field_differs() -> None:
    base = Sampling()
    others = [replace(base, temperature=0.9), replace(base, top_p=0.5), replace(base, seed=1), replace(base, num_draws=17)]
    assert len({fingerprint(s) for s in [base, *others]}) == 5


def test_one_and_true_do_not_share_a_fingerprint() -> None:
    assert fingerprint({"a": 1}) != fingerprint({"a": True})


@pytest.mark.parametrize("bad", [len, {1, 2}, object(), Path("x"), float("nan"), float("inf"), {1: 2}, b"x", Sampling])
def test_a_value_without_a_stable_form_is_refused_with_its_path(bad: object) -> None:
    with pytest.raises(TypeError, match=r"value\.spec\[1\]"):
        fingerprint({"spec": [0, bad]})
